"""`PPOTrainer` and `PPOConfig` with the constructor of TRL 1.12's, on our trainer.

    from rlhf_fast.integrations.trl_ppo import PPOConfig, PPOTrainer

in the place of `from trl.experimental.ppo import PPOConfig, PPOTrainer`, which TRL removed after
that release. Needs no TRL.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DataCollatorWithPadding, TrainerState

from rlhf_fast.data import DataReport, LoadedData, PromptExample, collate_prompts
from rlhf_fast.errors import ConfigError
from rlhf_fast.integrations.trl_ppo_config import RUN_NAME, PPOConfig
from rlhf_fast.ppo.trainer import StepOutput
from rlhf_fast.protocols import FinishedScorer, Generator
from rlhf_fast.seeds import derive_seed
from rlhf_fast.stages import ppo as stage
from rlhf_fast.types import PromptBatch, Rollout, SamplingParams

__all__ = ["PPOConfig", "PPOTrainer"]


class PPOTrainer:
    """PPO as TRL 1.12's trainer of this name is called, in one process.

    As there: the rollout is `per_device_train_batch_size` x `gradient_accumulation_steps` prompts;
    a response ends at `stop_token` and at nothing if there is none; `missing_eos_penalty` is
    subtracted where the tokenizer's EOS is missing, whatever the stop token; raw scores, the KL to
    the reference in the reward, Bessel's correction in whitening, AdamW without clipping.

    Differs:
        * One optimizer step a minibatch. In TRL it is one each `gradient_accumulation_steps`
          microbatches, so one a pass, however many minibatches.
        * A loss is a mean over the tokens of an optimizer step, in TRL over microbatches of means.
        * The score lands on the last token of the response, in TRL one slot later where there is
          room, and the value of that slot is trained.
        * The learning rate decays by optimizer step, in TRL by rollout.
        * Policy and critic have an AdamW each at the same rate, where `vf_coef` has no part; it
          must be above 0.
        * Old log-probs are recomputed. Samples are keyed by `seed`, step and prompt.
        * Weights are trained in fp32; `bf16` is the type of products.
        * What is saved on the way, metrics and samples lie in `output_dir/run`; the policy in
          `output_dir` once `save_model` is called. `resume_from_checkpoint` continues that run;
          without it a run found there is discarded.

    Args:
        args: settings.
        processing_class: tokenizer of all models.
        model: the policy, trained in place.
        ref_model: frozen reference; None copies the policy as it is.
        reward_model: sequence classifier with one label.
        train_dataset: rows with `input_ids`; leading pad tokens are dropped.
        value_model: sequence classifier with one label, trained in place.
        data_collator: None, or one that pads, which has nothing to do here.
        eval_dataset: prompts of `generate_completions`, rows with `input_ids`.
        optimizers: not supported.
        callbacks: not supported; see `PPOTrainer` of `rlhf_fast.stages.ppo`, `on_step`.
        peft_config: not supported; see docs/lora.md.

    Attributes:
        state: `log_history` has the metrics of every step, `global_step` and `epoch`.

    Raises:
        ConfigError: RF1080, naming everything that cannot be followed; or as our trainer.
    """

    def __init__(
        self,
        args: PPOConfig,
        processing_class: Any,
        model: nn.Module,
        ref_model: nn.Module | None,
        reward_model: nn.Module,
        train_dataset: Any,
        value_model: nn.Module,
        data_collator: Any = None,
        eval_dataset: Any = None,
        optimizers: tuple[Any, Any] = (None, None),
        callbacks: list[Any] | None = None,
        peft_config: Any = None,
    ) -> None:
        given = {
            "data_collator": data_collator is not None
            and not isinstance(data_collator, DataCollatorWithPadding),
            "optimizers": any(o is not None for o in optimizers),
            "callbacks": bool(callbacks),
            "peft_config": peft_config is not None,
        }
        faults = args.faults() + [f"{name} was given" for name, wrong in given.items() if wrong]
        for name, rows in (("train_dataset", train_dataset), ("eval_dataset", eval_dataset)):
            if rows is not None and "input_ids" not in rows[0]:
                faults.append(f"{name} has no column input_ids")
        if faults:
            raise ConfigError(
                "RF1080",
                f"{len(faults)} setting{'s' * (len(faults) > 1)} of TRL's PPO trainer cannot be "
                "followed",
                where="; ".join(faults),
                remedy="leave them at their defaults, or see docs/migrating_from_trl.md",
            )
        self.args = args
        self.processing_class = processing_class
        self.model = model
        self.reward_model = reward_model
        self.state = TrainerState()
        self.train_data = _prompts(train_dataset, processing_class, "train")
        self.eval_data = (
            None if eval_dataset is None else _prompts(eval_dataset, processing_class, "eval")
        )
        args.fill_sizes(len(self.train_data))
        eos = processing_class.eos_token_id
        stop = eos if args.stop_token == "eos" else args.stop_token_id
        self.trainer = stage.PPOTrainer(
            args.settings(max(len(e) for e in self.train_data.examples)),
            model=model,
            tokenizer=processing_class,
            train_dataset=self.train_data,
            reference=ref_model,
            critic=value_model,
            reward_model=reward_model,
            reward_tokenizer=processing_class,
            on_step=self._on_step,
            end_ids=() if stop is None else (stop,),
            quiet=bool(args.disable_tqdm),
        )
        roles = self.trainer.roles
        if args.missing_eos_penalty is not None and stop != eos:
            roles.generator = _EndsWithEOS(roles.generator, eos)

    def train(self) -> stage.PPOResult:
        """Train for `total_episodes`, rounded up to whole rollouts."""
        return self.trainer.train()

    def save_model(self, output_dir: str | None = None) -> None:
        """The policy and its tokenizer in `output_dir`, or that of `args`, beside what is there."""
        target = Path(output_dir or self.args.output_dir or ".")
        draft = target / f".{RUN_NAME}-export"
        target.mkdir(parents=True, exist_ok=True)
        self.trainer.save_model(draft)
        for file in draft.iterdir():
            os.replace(file, target / file.name)
        draft.rmdir()

    def generate_completions(self, sampling: bool = False) -> list[dict[str, Any]]:
        """Answer the prompts of `eval_dataset` almost greedily, score and print the first ones.

        Args:
            sampling: the first `per_device_eval_batch_size` prompts only.

        Returns:
            A row a prompt: `query`, `model response` and `score`; none without `eval_dataset`.
        """
        if self.eval_data is None:
            return []
        examples = self.eval_data.examples
        chosen = examples[: self.args.per_device_eval_batch_size] if sampling else examples
        roles = self.trainer.roles
        rollout = roles.generator.generate(
            collate_prompts(chosen).to(self.trainer.device),
            SamplingParams(max_new_tokens=self.args.response_length, temperature=0.01),
            samples_per_prompt=1,
            seeds=[derive_seed(self.args.seed, self.state.global_step, e.uid) for e in chosen],
        )
        with roles.scoring():
            scores = roles.reward.score(rollout).scores.tolist()
        texts = self.processing_class.batch_decode(rollout.response_ids())
        table = [
            {"query": e.text, "model response": text, "score": score}
            for e, text, score in zip(chosen, texts, scores, strict=True)
        ]
        for row in table[:5]:
            print(f"{row['query']} -> {row['model response']} ({row['score']:.3f})")
        return table

    def _on_step(self, step: int, output: StepOutput) -> Mapping[str, float] | None:
        args, state = self.args, self.state
        state.global_step = step
        state.epoch = output.metrics["episode"] / len(self.train_data)
        state.log_history.append({**output.metrics, "step": step, "epoch": state.epoch})
        if args.num_sample_generations > 0 and args.num_total_batches is not None:
            every = max(1, args.num_total_batches // args.num_sample_generations)
            if (step - 1) % every == 0:
                self.generate_completions(sampling=True)
        return None


class _EndsWithEOS:
    """`Generator` whose rows count as ended where they hold an EOS, as TRL's penalty reads them."""

    def __init__(self, generator: Generator, eos: int) -> None:
        self.generator = generator
        self.eos = eos

    def generate(
        self,
        prompts: PromptBatch,
        sampling: SamplingParams,
        *,
        samples_per_prompt: int,
        seeds: Sequence[int],
        scorer: FinishedScorer | None = None,
    ) -> Rollout:
        """See `Generator`."""
        rollout = self.generator.generate(
            prompts, sampling, samples_per_prompt=samples_per_prompt, seeds=seeds, scorer=scorer
        )
        found: Tensor = (rollout.responses == self.eos) & rollout.response_mask
        return replace(rollout, ended=found.any(1))


def _prompts(rows: Any, tokenizer: Any, name: str) -> LoadedData[PromptExample]:
    """Prompts of a dataset of token ids."""
    report, digest = DataReport(name, source="input_ids"), hashlib.sha256()
    examples = []
    for index, row in enumerate(rows):
        ids = list(row["input_ids"])
        # Left padding is no part of a prompt; a prompt of nothing but padding is refused later.
        while len(ids) > 1 and ids[0] == tokenizer.pad_token_id:
            del ids[0]
        example = PromptExample(
            torch.tensor(ids, dtype=torch.int64),
            tokenizer.decode(ids),
            {},
            derive_seed(index, *ids),
            f"row {index}",
        )
        digest.update(example.key)
        examples.append(example)
        report.tokens += len(ids)
        report.longest = max(report.longest, len(ids))
    report.read = report.kept = len(examples)
    return LoadedData(tuple(examples), report, digest.hexdigest())
