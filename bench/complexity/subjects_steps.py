"""The phases of a PPO step on small Llamas, one size at a time."""

from __future__ import annotations

import tempfile
from typing import Any

import torch

from rlhf_fast.data import collate_prompts
from rlhf_fast.distributed.world import World

from ..distributed import bench_step
from .subject import Run, Subject

Sizes = dict[str, list[int]]
FIXED = {"hidden": 64, "layers": 2, "vocab": 512, "prompts": 16, "new_tokens": 16}
MICROBATCH_TOKENS = 512
# Attention reads what came before: scores of T tokens cost between T and its square.
BY_LENGTH = {"generate": 2.0, "score": 2.0, "prepare": 1.0, "update": 2.0, "step": 2.0}
LINEAR = {"generate": 1.0, "score": 1.0, "prepare": 1.0, "update": 1.0, "step": 1.0}
BY_MODEL = {"generate": 1.0, "score": 1.0, "update": 1.0, "step": 1.0}
BY_WIDTH = dict.fromkeys(BY_MODEL, 2.0)


def step(**sizes: int) -> Run:
    """A step that gives the seconds of its phases; the trainer is built and warm."""
    options = bench_step.parse([])
    for name, value in (FIXED | sizes).items():
        setattr(options, name, value)
    # A microbatch holds the longest row, and no step is one microbatch larger than another's.
    row = bench_step.PROMPT_TOKENS + options.new_tokens
    options.microbatch_tokens = max(MICROBATCH_TOKENS, row)
    folder = tempfile.TemporaryDirectory()
    world = World(torch.device("cpu"))
    config = bench_step.settings(options, "alone", 1, folder.name)
    trainer = bench_step.build_trainer(config, bench_step.build_models(options), options, world)
    meter = bench_step.Meter(world, bench_step.Traffic())
    trainer.learner.phase = meter.phase

    def run(_kept: Any = folder) -> dict[str, float]:
        batch = [trainer.data[i] for i in trainer.sampler.next_batch()]
        trainer.learner.step(collate_prompts(batch))
        return {**meter.seconds, "step": sum(meter.seconds.values())}

    return run


def subjects() -> list[Subject]:
    """All of them."""

    def of(axis: str, key: str, sizes: Sizes, orders: dict[str, float], memory: float) -> Subject:
        return Subject("PPO step", axis, lambda size: step(**{key: size}), sizes, orders, memory)

    def doubling(tiny: int, first: int, count: int) -> Sizes:
        quick = max(3, count - 2)
        return {
            "tiny": [tiny << k for k in range(2)],
            "quick": [first << k for k in range(quick)],
            "cpu": [first << k for k in range(count)],
        }

    return [
        of("batch", "prompts", doubling(2, 16, 5), LINEAR, 1.0),
        of("response tokens", "new_tokens", doubling(2, 16, 5), BY_LENGTH, 1.0),
        of("vocabulary", "vocab", doubling(32, 1024, 5), BY_MODEL, 1.0),
        of("layers", "layers", doubling(1, 1, 4), BY_MODEL, 1.0),
        of("width", "hidden", doubling(16, 64, 4), BY_WIDTH, 2.0),
    ]
