"""PPO steps of `rlhf_fast.stages.ppo.PPOTrainer` on the case of `bench.ppo.case`.

    python -m bench.ppo.our_step CASE_JSON      # a child of bench_step, see bench.ppo.side

Lengths are forced by a generator that hands the engine one request a prompt, each with its own
`max_new_tokens`. The engine is not told beforehand which of them will be long.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from rlhf_fast.config import (
    AlgorithmConfig,
    KLConfig,
    OptimConfig,
    PPOConfig,
    RewardConfig,
    RolloutConfig,
    RunConfig,
    SamplingConfig,
)
from rlhf_fast.data import collate_prompts
from rlhf_fast.engine.hybrid import HybridEngine
from rlhf_fast.engine.requests import requests_of, rollout_of
from rlhf_fast.models.roles import Actor
from rlhf_fast.protocols import FinishedScorer
from rlhf_fast.stages.collector import old_objects_apart
from rlhf_fast.stages.ppo import PPOTrainer
from rlhf_fast.types import PromptBatch, Rollout, SamplingParams

from ..distributed.bench_step import build_tokenizer
from . import resident
from .case import Case, Models, build_models, warm_libraries
from .meter import Meter
from .side import Turns

TREND = {
    "score": "objective/scores",
    "kl": "objective/kl",
    "policy_loss": "loss/policy_avg",
    "value_loss": "loss/value_avg",
    "entropy": "policy/entropy_avg",
}


class FixedLengths:
    """`Generator` whose sample i has `lengths[i]` tokens; one sample a prompt."""

    def __init__(self, engine: HybridEngine, lengths: list[int], actor: Actor) -> None:
        self.engine = engine
        self.lengths = lengths
        self.actor = actor

    def generate(
        self,
        prompts: PromptBatch,
        sampling: SamplingParams,
        *,
        samples_per_prompt: int,
        seeds: Sequence[int],
        scorer: FinishedScorer | None = None,
    ) -> Rollout:
        """See `rlhf_fast.protocols.Generator`."""
        each = [replace(sampling, max_new_tokens=n) for n in self.lengths]
        # What the engine knows of rows that are still running: the limit of all, as TRL does.
        expected = dict.fromkeys(prompts.uid, float(sampling.max_new_tokens))
        version = self.actor.weight_version
        out = self.engine.complete(requests_of(prompts, each, samples_per_prompt, seeds, expected))
        return rollout_of(prompts, sampling, samples_per_prompt, out, version)


def settings(case: Case, folder: str) -> PPOConfig:
    """TRL's rules where the two differ by default."""
    optim = OptimConfig(lr=case.lr, schedule="constant", max_grad_norm=0.0)
    return PPOConfig(
        run=RunConfig(output_dir=folder, device="cpu", seed=1),
        rollout=RolloutConfig(prompts=case.episodes),
        sampling=SamplingConfig(max_new_tokens=case.most),
        reward=RewardConfig(normalize=False, clip=0.0, missing_eos="none"),
        kl=KLConfig(coef=case.kl_coef),
        algorithm=AlgorithmConfig(
            ppo_epochs=case.epochs,
            minibatches=case.minibatches,
            whiten_unbiased=True,
            old_logprobs=case.anchor,
            rollout_correction=2.0 if case.anchor == "rollout" else 0.0,
        ),
        actor_optim=optim,
        critic_optim=optim,
        side_by_side=case.side_by_side,
        microbatch_tokens=case.microbatch_tokens,
    )


def prompt_rows(case: Case) -> list[dict[str, str]]:
    """The prompts of the case as a data set."""
    return [{"prompt": " ".join(f"w{i}" for i in prompt)} for prompt in case.prompts()]


def build_trainer(case: Case, models: Models, folder: str) -> PPOTrainer:
    """The trainer, generating the lengths of the case."""
    tokenizer = build_tokenizer(case.vocab)
    trainer = PPOTrainer(
        settings(case, folder),
        model=models.policy,
        reference=models.reference,
        critic=models.critic,
        reward_model=models.reward,
        reward_tokenizer=tokenizer,
        tokenizer=tokenizer,
        train_dataset=prompt_rows(case),
        quiet=True,
    )
    actor = trainer.roles.actor
    assert isinstance(actor, Actor)
    # The trainer's engine over the same memory, but for the token that ends a response.
    engine = HybridEngine(actor.module, eos_ids=(), weight_version=lambda: actor.weight_version)
    trainer.roles.generator = FixedLengths(engine, case.response_lengths(), actor)
    return trainer


def one_step(trainer: PPOTrainer, meter: Meter) -> dict[str, Any]:
    """A step of the learner, measured."""
    meter.begin()
    batch = [trainer.data[i] for i in trainer.sampler.next_batch()]
    output = trainer.learner.step(collate_prompts(batch))
    found: dict[str, Any] = meter.end()
    metrics = output.metrics
    return found | {
        "trend": {name: metrics[key] for name, key in TREND.items()},
        "tokens": int(output.experience.scored.rollout.lengths.sum()),
    }


def main() -> None:
    """Build the trainer, say so, and step when told to."""
    turns = Turns()
    case = Case.from_json(sys.argv[1])
    torch.set_num_threads(case.threads)
    warm_libraries()
    empty = resident.resident()
    models = build_models(case)
    base = resident.resident()
    with tempfile.TemporaryDirectory() as folder:
        trainer = build_trainer(case, models, folder)
        meter = Meter(base)
        trainer.learner.phase = meter.phase
        turns.tell({"version": "", "models_bytes": base - empty})
        with old_objects_apart():  # as in `train`
            while turns.wait():
                turns.tell(one_step(trainer, meter))


if __name__ == "__main__":
    main()
