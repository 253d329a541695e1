"""Stages in a program that called `torch.set_default_device`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from rlhf_fast.config import (
    AlgorithmConfig,
    DataConfig,
    EvalConfig,
    PPOConfig,
    RewardConfig,
    RewardModelConfig,
    RolloutConfig,
    RunConfig,
    SamplingConfig,
    SFTConfig,
)
from rlhf_fast.stages.evaluate import run_evaluate
from rlhf_fast.stages.ppo import run_ppo
from rlhf_fast.stages.reward_model import run_reward_model
from rlhf_fast.stages.sft import run_sft
from tests.stages.tiny_runs import (
    as_pairs,
    demonstrations,
    metric_lines,
    model_directory,
    ranked,
    write_rows,
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("default_device")
    model_directory(folder / "base", initializer_range=0.6)
    write_rows(folder / "texts.jsonl", demonstrations(24))
    write_rows(folder / "pairs.jsonl", as_pairs(ranked(24, 2)))
    return folder


def stages(base: Path, out: Path) -> list[object]:
    """SFT, reward model, PPO with a critic and evaluation; all that they wrote down."""
    texts = str(base / "texts.jsonl")
    lengths = {"max_prompt_length": 16, "max_length": 48}

    def run(name: str) -> RunConfig:
        return RunConfig(output_dir=str(out / name), threads=1, save_every=1)

    sft = run_sft(
        SFTConfig(
            model=str(base / "base"),
            run=run("sft"),
            data=DataConfig(train=texts, eval=texts, **lengths),
            max_steps=2,
            batch_size=8,
        ),
        quiet=True,
    )
    judge = run_reward_model(
        RewardModelConfig(
            model=sft.model_dir,
            run=run("rm"),
            data=DataConfig(train=str(base / "pairs.jsonl"), **lengths),
            max_steps=2,
            batch_size=8,
        ),
        quiet=True,
    )
    ppo = run_ppo(
        PPOConfig(
            actor=sft.model_dir,
            reward=RewardConfig(model=judge.model_dir),
            run=run("ppo"),
            data=DataConfig(train=texts, **lengths),
            rollout=RolloutConfig(prompts=8),
            sampling=SamplingConfig(max_new_tokens=6),
            algorithm=AlgorithmConfig(ppo_epochs=1, minibatches=2),
            total_steps=2,
        )
    )
    result = run_evaluate(
        EvalConfig(
            model=str(ppo.model_dir),
            reference=sft.model_dir,
            run=run("eval"),
            data=DataConfig(eval=texts, **lengths),
            sampling=SamplingConfig(max_new_tokens=6),
            reward=RewardConfig(model=judge.model_dir),
            samples_per_prompt=2,
        ),
        quiet=True,
    )
    logs = [metric_lines(out / name) for name in ("sft", "rm", "ppo")]
    return [*logs, json.dumps([str(estimate) for estimate in result.estimates.items()])]


def test_the_default_device_of_a_program_changes_nothing(base: Path, tmp_path: Path) -> None:
    want = stages(base, tmp_path / "host")
    torch.set_default_device("meta")  # what is made without a device has no data
    try:
        found = stages(base, tmp_path / "meta")
    finally:
        torch.set_default_device(None)
    assert found == want
