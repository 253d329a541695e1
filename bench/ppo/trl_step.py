"""PPO steps of `trl.experimental.ppo.PPOTrainer`, driven from outside: its code is not touched.

    python -m bench.ppo.trl_step CASE_JSON      # a child of bench_step, see bench.ppo.side

Its `train()` runs as it is. What it calls is wrapped where it looks it up, and each call says which
phase begins:

    unwrap_model_for_generation   generate while it is open, score when it closes
    gc.collect                    gc while it runs; the first of a step ends score, begins prepare
    accelerator.accumulate        update
    accelerator.gather_for_metrics   the rest: metrics, log, scheduler

Lengths are forced through `generate`'s own means: a stopping criterion ends row i after its number
of tokens, and transformers fills up with the pad token, where TRL lets a response end. A pad token
that was drawn before that becomes another token before anything reads it.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import SimpleNamespace
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from ..distributed.bench_step import build_tokenizer
from . import resident
from .case import PAD, Case, build_models, warm_libraries
from .meter import REST, Meter
from .side import Turns

WANTED = "1.12.0"
NOT_INSTALLED = f"trl is not installed (pip install trl=={WANTED})"
VALUE_COEF = 1.0  # policy and critic share no weight, so it only scales the critic's gradient
INSTEAD = 1  # of a pad token
STEPS = 100_000  # more than anybody asks for
TREND = {
    "score": "objective/scores",
    "kl": "objective/kl",
    "policy_loss": "loss/policy_avg",
    "value_loss": "loss/value_avg",
    "entropy": "policy/entropy_avg",
}


class Ended(Exception):
    """No further step is wanted."""


class FixedLengths(StoppingCriteria):
    """Ends row i after `lengths[i]` tokens, none of which is the pad token.

    transformers pads rows that ended only if some criterion has an attribute of this name.
    """

    def __init__(self, prompt: int, lengths: list[int]) -> None:
        self.eos_token_id = None
        self._ends = torch.tensor(lengths) + prompt

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        last, tokens = input_ids[:, -1], input_ids.shape[1]
        last.masked_fill_((last == PAD) & (self._ends >= tokens), INSTEAD)
        return self._ends <= tokens


def force_lengths(model: Any, case: Case) -> None:
    """Have this one model's `generate` end its rows as the case says."""
    original, lengths = model.generate, case.response_lengths()

    def generate(**arguments: Any) -> Any:
        criteria = StoppingCriteriaList([FixedLengths(case.prompt, lengths)])
        return original(**arguments, stopping_criteria=criteria)

    model.generate = generate


class Gate:
    """A data loader that waits for a word before each batch; what runs between two is a step."""

    def __init__(self, loader: Any, turns: Turns, meter: Meter, trend: dict[str, float]) -> None:
        self.loader = loader
        self.turns = turns
        self.meter = meter
        self.trend = trend

    def __iter__(self) -> Iterator[Any]:
        batches: Iterator[Any] = iter(())
        while self.turns.wait():
            self.meter.begin()
            batch = next(batches, None)
            if batch is None:
                batches = iter(self.loader)
                batch = next(batches)
            yield batch
            self.turns.tell(self.meter.end() | {"trend": self.trend})
        raise Ended


def watch(trainer: Any, meter: Meter, trend: dict[str, float]) -> None:
    """Put the meter around what `train()` calls."""
    from trl.experimental.ppo import ppo_trainer

    names: Any = ppo_trainer
    unwrap, collector = names.unwrap_model_for_generation, names.gc
    accelerator, log = trainer.accelerator, trainer.log
    accumulate, gather = accelerator.accumulate, accelerator.gather_for_metrics

    @contextmanager
    def unwrapped(*arguments: Any, **options: Any) -> Iterator[Any]:
        meter.enter("generate")
        with unwrap(*arguments, **options) as model:
            yield model
        meter.enter("score")

    def collect() -> int:
        before = meter.enter("gc")
        found: int = collector.collect()
        meter.enter("prepare" if before == "score" else REST)
        return found

    def accumulating(*models: Any) -> Any:
        meter.enter("update")
        return accumulate(*models)

    def gathered(value: Any, *arguments: Any) -> Any:
        meter.enter(REST)
        return gather(value, *arguments)

    def logged(metrics: dict[str, float], *arguments: Any) -> None:
        trend.update({name: float(metrics[key]) for name, key in TREND.items()})
        log(metrics, *arguments)

    names.unwrap_model_for_generation = unwrapped
    names.gc = SimpleNamespace(collect=collect)
    accelerator.accumulate, accelerator.gather_for_metrics = accumulating, gathered
    trainer.log = logged


def settings(case: Case, folder: str) -> Any:
    """One optimizer step a minibatch: `train()` cuts a batch of one microbatch into minibatches."""
    from trl.experimental.ppo import PPOConfig

    return PPOConfig(
        output_dir=folder,
        per_device_train_batch_size=case.episodes,
        gradient_accumulation_steps=1,
        num_mini_batches=case.minibatches,
        num_ppo_epochs=case.epochs,
        total_episodes=STEPS * case.episodes,
        local_rollout_forward_batch_size=case.episodes,
        num_sample_generations=0,
        response_length=case.most,
        stop_token=None,
        temperature=1.0,
        missing_eos_penalty=None,
        kl_coef=case.kl_coef,
        vf_coef=VALUE_COEF,
        learning_rate=case.lr,
        lr_scheduler_type="constant",
        adam_beta1=0.9,
        adam_beta2=0.95,
        adam_epsilon=1e-5,
        weight_decay=0.0,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        seed=1,
    )


def main() -> None:
    """Build the trainer, say so, and step when told to."""
    turns = Turns()
    case = Case.from_json(sys.argv[1])
    torch.set_num_threads(case.threads)
    try:
        import trl
        from datasets import Dataset
        from trl.experimental.ppo import PPOTrainer
    except ImportError as problem:
        turns.tell({"absent": absence(problem)})
        return
    warm_libraries()
    empty = resident.resident()
    models = build_models(case)
    force_lengths(models.policy, case)
    base = resident.resident()
    with tempfile.TemporaryDirectory() as folder:
        trainer = PPOTrainer(
            args=settings(case, folder),
            processing_class=build_tokenizer(case.vocab),
            model=models.policy,
            ref_model=models.reference,
            reward_model=models.reward,
            value_model=models.critic,
            train_dataset=Dataset.from_dict({"input_ids": case.prompts()}),
        )
        meter, trend = Meter(base), dict[str, float]()
        watch(trainer, meter, trend)
        trainer.dataloader = Gate(trainer.dataloader, turns, meter, trend)
        turns.tell({"version": trl.__version__, "models_bytes": base - empty})
        with suppress(Ended):
            trainer.train()


def missing(python: str) -> str:
    """Why no process of TRL's need be started: this interpreter, if it is the one, has no TRL."""
    return "" if python or importlib.util.find_spec("trl") is not None else NOT_INSTALLED


def absence(problem: ImportError) -> str:
    """Why TRL is not measured."""
    try:
        import trl
    except ImportError:
        return NOT_INSTALLED
    return f"trl {trl.__version__} has no PPO ({problem}): pip install trl=={WANTED}"


if __name__ == "__main__":
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    main()
