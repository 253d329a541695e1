"""A training run of TRL's for `bench_learning`: `python -m bench.ppo.learn_trl CASE_JSON`.

RLOO and GRPO take the rule as a reward function. PPO takes a module: `RuleModel` looks like a
sequence classifier to `get_reward` and asks the rule.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_fast.models.loading import critic_from
from rlhf_fast.tasks.reviews import prompt_split

from .learning_task import Curve, LearningCase, load
from .side import Turns
from .trl_step import absence


class RuleModel(nn.Module):
    """The rule as `trl.experimental.utils.get_reward` calls a classifier.

    Its "hidden states" are the ids; its head scores whole rows and says so at every position.
    """

    base_model_prefix = "trunk"

    def __init__(self, curve: Curve) -> None:
        super().__init__()
        self.curve = curve
        self.context = 0  # tokens of the prompts of this batch, padding included

    def trunk(self, input_ids: Tensor, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(hidden_states=[input_ids])

    def score(self, ids: Tensor) -> Tensor:
        """[B, T, 1] float32 of [B, T] ids; pad ids are 0 here, and no word is."""
        tokenizer = self.curve.tokenizer
        prompts = tokenizer.batch_decode(ids[:, : self.context], skip_special_tokens=True)
        responses = [row[row != tokenizer.pad_token_id].tolist() for row in ids[:, self.context :]]
        rewards = torch.tensor(self.curve(prompts, [], responses))
        return rewards[:, None, None].expand(*ids.shape, 1)


class Contexts:
    """A data loader that tells the rule how wide the prompts are."""

    def __init__(self, loader: Any, rule: RuleModel) -> None:
        self.loader = loader
        self.rule = rule

    def __iter__(self) -> Iterator[Any]:
        for batch in self.loader:
            self.rule.context = batch["input_ids"].shape[1]
            yield batch


def shared(case: LearningCase, folder: str) -> dict[str, Any]:
    """What the three trainers are told alike."""
    return {
        "output_dir": folder,
        "learning_rate": case.lr,
        "lr_scheduler_type": "constant",
        "adam_beta1": 0.9,
        "adam_beta2": 0.95,
        "adam_epsilon": 1e-8,
        "weight_decay": 0.0,
        "max_grad_norm": 0.0,
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "temperature": 1.0,
        "seed": case.seed,
    }


def ppo(case: LearningCase, curve: Curve, model: Any, folder: str) -> Any:
    """`trl.experimental.ppo.PPOTrainer`."""
    from datasets import Dataset
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    tokenizer, rule = curve.tokenizer, RuleModel(curve)
    trainer = PPOTrainer(
        args=PPOConfig(
            **shared(case, folder),
            per_device_train_batch_size=case.episodes,
            gradient_accumulation_steps=1,
            num_mini_batches=case.minibatches,
            num_ppo_epochs=case.epochs,
            total_episodes=case.steps * case.episodes,
            local_rollout_forward_batch_size=case.episodes,
            num_sample_generations=0,
            response_length=case.response,
            stop_token="eos",
            missing_eos_penalty=None,
            kl_coef=case.kl_coef,
            vf_coef=1.0,
        ),
        processing_class=tokenizer,
        model=model,
        ref_model=load(case)[0],
        reward_model=rule,
        value_model=critic_from(model),
        train_dataset=Dataset.from_dict({"input_ids": tokenizer(prompt_split()[0])["input_ids"]}),
    )
    trainer.dataloader = Contexts(trainer.dataloader, rule)
    return trainer


def grouped(case: LearningCase, curve: Curve, model: Any, folder: str) -> Any:
    """`trl.GRPOTrainer` or `trl.RLOOTrainer`."""
    import trl
    from datasets import Dataset

    name = case.algorithm.upper()
    rules: dict[str, Any] = {"loss_type": "dapo"} if case.algorithm == "grpo" else {}
    settings = getattr(trl, f"{name}Config")(
        **shared(case, folder),
        **rules,
        per_device_train_batch_size=case.episodes // case.minibatches,
        steps_per_generation=case.minibatches,
        gradient_accumulation_steps=1,
        num_iterations=case.epochs,
        num_generations=case.group,
        max_completion_length=case.response,
        max_steps=case.steps * case.epochs * case.minibatches,
        beta=case.kl_coef,
    )
    return getattr(trl, f"{name}Trainer")(
        model=model,
        reward_funcs=curve,
        args=settings,
        processing_class=curve.tokenizer,
        train_dataset=Dataset.from_dict({"prompt": prompt_split()[0]}),
    )


def main() -> None:
    """Run once and answer."""
    turns = Turns()
    case = LearningCase.from_json(sys.argv[1])
    torch.set_num_threads(case.threads)
    try:
        import trl  # noqa: F401
        from trl.experimental.ppo import PPOTrainer  # noqa: F401
    except ImportError as problem:
        turns.tell({"absent": absence(problem)})
        return
    model, tokenizer = load(case)
    curve = Curve(tokenizer)
    curve.__name__ = "rule"  # type: ignore[attr-defined]  # TRL names reward functions in its log
    with tempfile.TemporaryDirectory() as folder:
        build = ppo if case.algorithm == "ppo" else grouped
        trainer = build(case, curve, model, folder)
        curve.start()
        trainer.train()
        turns.tell(curve.found())


if __name__ == "__main__":
    main()
