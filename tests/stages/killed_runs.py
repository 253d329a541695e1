"""The child process of the kill test; importable, so that a fork server can start it."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from rlhf_fast.config import DataConfig, OptimConfig, RewardModelConfig, RunConfig, SFTConfig
from rlhf_fast.stages.reward_model import run_reward_model
from rlhf_fast.stages.sft import run_sft


def pipeline(base: str, out: str) -> None:
    """SFT, then a reward model on its export, both with a checkpoint every other step."""
    torch.set_num_threads(1)
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    source, target = Path(base), Path(out)
    sft = SFTConfig(
        model=str(source / "base"),
        run=RunConfig(output_dir=str(target / "sft"), save_every=2, device="cpu"),
        data=DataConfig(train=str(source / "train.jsonl"), max_length=48),
        optim=OptimConfig(lr=1e-2),
        max_steps=7,
        batch_size=8,
        microbatch_tokens=64,
    )
    run_sft(sft, quiet=True)
    reward = RewardModelConfig(
        model=str(target / "sft" / "model"),
        run=RunConfig(output_dir=str(target / "rm"), save_every=2, device="cpu"),
        data=DataConfig(train=str(source / "ranked.jsonl"), max_length=48),
        optim=OptimConfig(lr=1e-2),
        max_steps=7,
        batch_size=4,
        microbatch_tokens=128,
        eval_fraction=0.25,
    )
    run_reward_model(reward, quiet=True)
