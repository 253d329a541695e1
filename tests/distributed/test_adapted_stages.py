"""SFT and reward model with an adapter on a trunk that is cut in two: as in one process."""

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rlhf_fast.config import AdapterConfig, OptimConfig
from rlhf_fast.distributed.world import World
from rlhf_fast.stages.reward_model import run_reward_model
from rlhf_fast.stages.sft import run_sft
from tests.distributed.ranks import on_ranks
from tests.stages.killed_runs import reward_config, sft_config
from tests.stages.tiny_runs import (
    demonstrations,
    metric_lines,
    model_directory,
    ranked,
    write_rows,
)

LORA = AdapterConfig(rank=4, alpha=16.0)
# eps of Adam: an entry whose gradient is rounding alone must not move by the learning rate.
OPTIM = OptimConfig(lr=5e-3, eps=1e-4)
STAGES = ("sft", "rm")


def run_stages(world, base: Path, out: Path):
    """Both on the same base model; the loss of each."""
    changes = {"lora": LORA, "optim": OPTIM, "gradient_checkpointing": True}
    sft = dataclasses.replace(
        sft_config(base, out),
        eval_every=2,
        **changes,
    )
    held_out = dataclasses.replace(sft.data, eval=str(base / "held_out.jsonl"))
    sft = dataclasses.replace(sft, data=held_out)
    judge = dataclasses.replace(reward_config(base, out), model=str(base / "base"), **changes)
    first = run_sft(sft, quiet=True, world=world)
    second = run_reward_model(judge, quiet=True, world=world)
    return first.train_loss, second.train_loss


def _stages(world: World, base: str, out: str):
    return run_stages(world, Path(base), Path(out))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapted")
    model_directory(folder / "base")
    write_rows(folder / "train.jsonl", demonstrations(24))
    write_rows(folder / "held_out.jsonl", demonstrations(8, seed=9))
    write_rows(folder / "ranked.jsonl", ranked(24, 3))
    run_stages(None, folder, folder / "alone")
    found = on_ranks(2, _stages, str(folder), str(folder / "shards"))
    assert found[0] == found[1]
    return folder


@pytest.mark.parametrize("stage", STAGES)
def test_losses_on_two_shards_are_those_of_one_process(base, stage):
    alone, shards = metric_lines(base / "alone" / stage), metric_lines(base / "shards" / stage)
    assert len(alone) == len(shards) == 5
    assert alone[-1]["loss/train"] < alone[0]["loss/train"]
    for step, (expected, found) in enumerate(zip(alone, shards, strict=True)):
        assert found == pytest.approx(expected, abs=1e-5, rel=1e-5), step


@pytest.mark.parametrize("stage", STAGES)
def test_the_adapter_exported_from_two_shards_is_that_of_one_process(base, stage):
    name = "adapter_model.safetensors"
    expected = load_file(base / "alone" / stage / "model" / name)
    found = load_file(base / "shards" / stage / "model" / name)
    assert set(found) == set(expected)
    assert any("lora_B" in key and tensor.any() for key, tensor in expected.items())
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor, rtol=1e-5, atol=1e-5, msg=key)
