"""PPO steps as pieces of `bench.gpu_suite`: seconds and bytes by phase, and what 200 steps leave.

Random weights; the reward is a function. `full` trains a policy and a critic of their own beside a
frozen reference, `lora` adapters of one frozen trunk in bf16.
"""

from __future__ import annotations

import gc
import statistics
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from rlhf_fast.config import (
    AlgorithmConfig,
    PPOConfig,
    RewardConfig,
    RolloutConfig,
    RunConfig,
    SamplingConfig,
)
from rlhf_fast.config_lora import LoraConfig
from rlhf_fast.data import collate_prompts
from rlhf_fast.distributed.world import World
from rlhf_fast.stages.ppo import PPOTrainer

from .distributed import bench_step
from .engine.bench_generate import SHAPES
from .engine.gpu_pieces import Setup

WARMUPS, STEPS = 1, 3
CYCLES = 200
SETTLED = 5  # cycles after which nothing more is to come


@dataclass(frozen=True)
class Load:
    """What a step has to do."""

    shape: str
    lora_rank: int = 0
    prompts: int = 64
    prompt_tokens: int = 256
    new_tokens: int = 256
    microbatch_tokens: int = 8192

    def tiny(self) -> Load:
        """The same kind of step at its smallest."""
        return Load("tiny", min(self.lora_rank, 2), 4, 5, 4, 64)


FULL_1B = Load("1b")
LORA_8B = Load("8b", lora_rank=64)
CYCLE = Load("small", prompts=32, prompt_tokens=16, new_tokens=32)


def build(setup: Setup, load: Load, folder: str) -> PPOTrainer:
    """The trainer of a load on the device."""
    shape = SHAPES[load.shape]
    on_gpu = setup.device.type == "cuda"
    config = PPOConfig(
        run=RunConfig(
            output_dir=folder,
            device=str(setup.device),
            dtype="bfloat16" if on_gpu else "float32",
        ),
        rollout=RolloutConfig(prompts=load.prompts),
        sampling=SamplingConfig(max_new_tokens=load.new_tokens),
        reward=RewardConfig(),
        algorithm=AlgorithmConfig(ppo_epochs=1, minibatches=2),
        lora=LoraConfig(rank=load.lora_rank),
        gradient_checkpointing=on_gpu,
        microbatch_tokens=load.microbatch_tokens,
    )
    generator = torch.Generator().manual_seed(1)
    count = max(64, load.prompts)
    words = torch.randint(4, shape.vocab, (count, load.prompt_tokens), generator=generator)
    frozen_trunk = load.lora_rank > 0 and on_gpu
    return PPOTrainer(
        config,
        model=shape.build(setup.device, torch.bfloat16 if frozen_trunk else torch.float32),
        tokenizer=bench_step.build_tokenizer(shape.vocab),
        reward_function=bench_step.reward,
        train_dataset=[{"prompt": " ".join(f"w{i}" for i in row)} for row in words.tolist()],
        quiet=True,
        world=World(setup.device),
    )


def one_step(trainer: PPOTrainer) -> int:
    """A step; returns the tokens that were sampled."""
    batch = [trainer.data[i] for i in trainer.sampler.next_batch()]
    output = trainer.learner.step(collate_prompts(batch))
    return int(output.experience.scored.rollout.response_mask.sum())


def step(setup: Setup, load: Load) -> dict[str, Any]:
    """Seconds of the phases of a step, and bytes by phase and role, predicted and held."""
    load = load.tiny() if setup.tiny else load
    with ExitStack() as stack:
        trainer = build(setup, load, stack.enter_context(tempfile.TemporaryDirectory()))
        trainer.watch_memory()
        watch = trainer.memory_watch
        assert watch is not None
        meter = bench_step.Meter(trainer.world, bench_step.Traffic())
        trainer.learner.phase = watch.around(meter.phase)
        samples, tokens = [], 0
        for index in range(WARMUPS + STEPS):
            tokens = one_step(trainer)
            if index >= WARMUPS:
                samples.append({**meter.seconds, "step": sum(meter.seconds.values())})
        report = trainer.memory_report()
    median = {name: statistics.median(s[name] for s in samples) for name in samples[0]}
    memory: dict[str, dict[str, int]] = {}
    for phase, slot, _, held in report.rows():
        roles = memory.setdefault(phase, {})
        if slot.place == "device":
            roles[slot.role] = roles.get(slot.role, 0) + held
    row = {
        "case": f"{load.shape}, {'LoRA' if load.lora_rank else 'full'}",
        "phases": median,
        "samples": samples,
        "tokens": tokens,
        "tokens_per_second": tokens / median["step"],
        "memory": memory,
        "peak_allocated": dict(report.allocated),
    }
    return {
        "passed": report.worst() < 0.05,
        "largest_difference_to_the_plan": report.worst(),
        "rows": [row],
    }


def leaks(setup: Setup) -> dict[str, Any]:
    """Live tensors and allocated bytes after each of many steps; passed if neither grows."""
    load = CYCLE.tiny() if setup.tiny else CYCLE
    cycles = 4 * SETTLED if setup.tiny else CYCLES
    counts, allocated = [], []
    with tempfile.TemporaryDirectory() as folder:
        trainer = build(setup, load, folder)
        for _ in range(cycles):
            one_step(trainer)
            gc.collect()
            counts.append(sum(issubclass(type(x), torch.Tensor) for x in gc.get_objects()))
            allocated.append(setup.allocated())
    return {
        "passed": not grows(counts) and not grows(allocated),
        "cycles": cycles,
        "live_tensors": counts,
        "allocated_bytes": allocated,
    }


def grows(values: list[int]) -> bool:
    """Whether the least of the last quarter exceeds the most of what came before it settled.

    A rollout of other lengths holds other pages, so single values differ; a leak lifts them all.
    """
    last = values[-max(1, len(values) // 4) :]
    return min(last) > max(values[SETTLED : 2 * SETTLED])


def pieces(setup: Setup) -> dict[str, Callable[[], dict[str, Any]]]:
    """All of them, the most important first."""
    return {
        "step-1b-full": partial(step, setup, FULL_1B),
        "step-8b-lora": partial(step, setup, LORA_8B),
        "leaks": partial(leaks, setup),
    }
