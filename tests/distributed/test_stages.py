"""SFT, reward model and PPO on 2 ranks follow the run of one process, and each other."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rlhf_fast.distributed.world import World
from rlhf_fast.stages.ppo import run_ppo
from rlhf_fast.stages.reward_model import run_reward_model
from rlhf_fast.stages.sft import run_sft
from tests.distributed.ranks import on_ranks
from tests.stages.killed_runs import ppo_config, reward_config, sft_config
from tests.stages.tiny_runs import (
    demonstrations,
    metric_lines,
    model_directory,
    ranked,
    write_rows,
)

UNLIKE = ("rollout/preemptions",)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    model_directory(folder / "base")
    write_rows(folder / "train.jsonl", demonstrations(24))
    write_rows(folder / "ranked.jsonl", ranked(24, 3))
    prompts = [{"prompt": row["prompt"]} for row in demonstrations(20, seed=3)]
    write_rows(folder / "prompts.jsonl", prompts)
    run_stages(None, folder, folder / "alone")
    return folder


def run_stages(world, base: Path, out: Path, **changes):
    """All three; PPO starts from the models of the run of one process."""
    run_sft(sft_config(base, out), quiet=True, world=world)
    models = base / "alone"
    rm = reward_config(base, out)
    rm = dataclasses.replace(rm, model=str(models / "sft" / "model"))
    run_reward_model(rm, quiet=True, world=world)
    config = ppo_config(base, models)
    run = dataclasses.replace(config.run, output_dir=str(out / "ppo"))
    return run_ppo(dataclasses.replace(config, run=run, **changes), world=world)


def _stages(world: World, base: str, out: str):
    result = run_stages(world, Path(base), Path(out))
    return result.metrics, result.steps


def lines_of(folder: Path):
    return [
        {name: value for name, value in line.items() if name not in UNLIKE}
        for line in metric_lines(folder)
    ]


@pytest.fixture(scope="module")
def two(base):
    """Two shards of one model (whole models in PPO), and two whole models."""
    shards = on_ranks(2, _stages, str(base), str(base / "shards"))
    copies = on_ranks(2, _stages, str(base), str(base / "copies"), replicas=2)
    return [*shards, *copies]


@pytest.mark.parametrize("form", ["shards", "copies"])
@pytest.mark.parametrize("stage", ["sft", "rm", "ppo"])
def test_two_ranks_follow_one_process(base, two, stage, form):
    alone, ranks = lines_of(base / "alone" / stage), lines_of(base / form / stage)
    assert len(alone) == len(ranks) == 5
    for step, (expected, found) in enumerate(zip(alone, ranks, strict=True)):
        tolerance = 1e-5 if step == 0 else 1e-3
        assert found == pytest.approx(expected, abs=tolerance, rel=tolerance), step


def test_two_ranks_sample_the_same_tokens(base, two):
    alone = (base / "alone" / "ppo" / "samples.jsonl").read_text().splitlines()
    ranks = (base / "copies" / "ppo" / "samples.jsonl").read_text().splitlines()
    for a, b in zip(alone, ranks, strict=True):
        one, other = json.loads(a), json.loads(b)
        assert one.pop("score") == pytest.approx(other.pop("score"), abs=1e-3)
        assert one == other
    assert two[0] == two[1]
    assert two[2] == two[3]
    for stage in ("sft", "rm", "ppo"):
        expected = load_file(base / "alone" / stage / "model" / "model.safetensors")
        for form in ("shards", "copies"):
            found = load_file(base / form / stage / "model" / "model.safetensors")
            assert set(found) == set(expected)
            for name, tensor in expected.items():
                torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-3)
