"""The child process of the kill test; importable, so that a fork server can start it."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # the first optimizer step imports it: once here, not in every child
import transformers.models.llama.modeling_llama  # noqa: F401 - as above

from rlhf_fast.config import (
    AlgorithmConfig,
    DataConfig,
    KLConfig,
    OptimConfig,
    PPOConfig,
    PtxConfig,
    RewardConfig,
    RewardModelConfig,
    RolloutConfig,
    RunConfig,
    SamplingConfig,
    SFTConfig,
)
from rlhf_fast.stages.ppo import PPOTrainer
from rlhf_fast.stages.reward_model import run_reward_model
from rlhf_fast.stages.sft import run_sft
from tests.stages.tiny_runs import demonstrations, model_directory, ranked, write_rows

STAGES = ("sft", "rm", "ppo")
# The calls that make a file or a name durable: dying in one is dying inside a save or an export.
_DURABLE_CALLS = ("fsync", "replace", "unlink", "rmdir")


def sft_config(source: Path, target: Path) -> SFTConfig:
    return SFTConfig(
        model=str(source / "base"),
        run=RunConfig(output_dir=str(target / "sft"), save_every=2, device="cpu"),
        data=DataConfig(train=str(source / "train.jsonl"), max_length=48),
        optim=OptimConfig(lr=1e-2),
        max_steps=5,
        batch_size=8,
        microbatch_tokens=64,
    )


def reward_config(source: Path, target: Path) -> RewardModelConfig:
    return RewardModelConfig(
        model=str(target / "sft" / "model"),
        run=RunConfig(output_dir=str(target / "rm"), save_every=2, device="cpu"),
        data=DataConfig(train=str(source / "ranked.jsonl"), max_length=48),
        optim=OptimConfig(lr=1e-2),
        max_steps=5,
        batch_size=4,
        microbatch_tokens=128,
        eval_fraction=0.25,
    )


def ppo_config(source: Path, target: Path) -> PPOConfig:
    """Everything that has state: critic, adaptive KL, normalised rewards, PPO-ptx, minibatches.

    Its checkpoints are written in the background.
    """
    return PPOConfig(
        actor=str(target / "sft" / "model"),
        run=RunConfig(output_dir=str(target / "ppo"), save_every=2, device="cpu", async_save="on"),
        data=DataConfig(train=str(source / "prompts.jsonl"), max_prompt_length=12, max_length=48),
        rollout=RolloutConfig(prompts=6, samples_per_prompt=2),
        sampling=SamplingConfig(max_new_tokens=6),
        reward=RewardConfig(model=str(target / "rm" / "model")),
        kl=KLConfig(coef=0.1, adaptive=True, target=0.5, horizon=50),
        algorithm=AlgorithmConfig(ppo_epochs=2, minibatches=2),
        ptx=PtxConfig(coef=0.5, data=str(source / "train.jsonl"), batch_size=4),
        actor_optim=OptimConfig(lr=1e-2),
        critic_optim=OptimConfig(lr=1e-2),
        total_steps=5,
        sample_every=1,
        microbatch_tokens=128,
    )


def before_ppo(folder: Path) -> Path:
    """A folder with all that `ppo_config` names: data, and the first two stages done."""
    model_directory(folder / "base")
    write_rows(folder / "train.jsonl", demonstrations(24))
    write_rows(folder / "ranked.jsonl", ranked(24, 3))
    prompts = [{"prompt": row["prompt"]} for row in demonstrations(20, seed=3)]
    write_rows(folder / "prompts.jsonl", prompts)
    run_sft(sft_config(folder, folder), quiet=True)
    run_reward_model(reward_config(folder, folder), quiet=True)
    return folder


def pipeline(base: str, out: str, dies_at: int = 0, counted: str = "") -> None:
    """SFT, a reward model on its export, PPO on both; a checkpoint every other step.

    Args:
        base: folder with the starting model and the data.
        out: folder of the three runs.
        dies_at: SIGKILL itself in the middle of this durable call, counted from 1; 0 lives on.
        counted: file that gets the number of durable calls, if it finished.
    """
    torch.set_num_threads(1)
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    calls = _count_durable_calls(dies_at)
    source, target = Path(base), Path(out)
    run_sft(sft_config(source, target), quiet=True)
    run_reward_model(reward_config(source, target), quiet=True)
    PPOTrainer(ppo_config(source, target), quiet=True).train()
    if counted:
        Path(counted).write_text(str(calls["seen"]), encoding="ascii")


def _count_durable_calls(dies_at: int) -> dict[str, int]:
    calls = {"seen": 0}

    def wrapped(original: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            calls["seen"] += 1
            if calls["seen"] == dies_at:
                # Every other death comes after the call took effect.
                if dies_at % 2:
                    with contextlib.suppress(OSError):
                        original(*arguments, **options)
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*arguments, **options)

        return call

    for name in _DURABLE_CALLS:
        setattr(os, name, wrapped(getattr(os, name)))
    return calls
