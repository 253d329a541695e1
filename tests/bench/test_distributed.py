"""The distributed benchmark counts what moves, and runs as it is documented."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

from bench.distributed import bench_step
from bench.distributed.traffic import Traffic
from rlhf_fast.distributed.collectives import all_gather_rows
from rlhf_fast.distributed.world import World
from tests.distributed.ranks import on_ranks

ROOT = Path(__file__).resolve().parents[2]
RANKS = 2
HIDDEN = 8
SMALLEST = ["--hidden", "32", "--layers", "2", "--vocab", "64", "--new-tokens", "4"]
SMALLEST += ["--prompts", "4", "--steps", "1"]


def _counted(world: World) -> tuple[dict[str, int], dict[str, int]]:
    """Known collectives, each under a phase of its own; what is outside is not counted."""
    traffic, group = Traffic(), world.shard_mesh.get_group()
    layer = nn.Linear(HIDDEN, HIDDEN, bias=False)
    original = dist.all_reduce
    with traffic.counting():
        traffic.phase = "sum"
        world.sum(torch.ones(10))
        traffic.phase = "int64 in a positional group"
        dist.all_reduce(torch.ones(10, dtype=torch.int64), dist.ReduceOp.SUM, group)
        traffic.phase = "rows"  # through a name that a module of the engine has bound
        all_gather_rows(torch.empty(6), torch.ones(3), group)
        traffic.phase = "broadcast"
        world.broadcast([torch.ones(5)])
        traffic.phase = "build"
        fully_shard(layer, mesh=world.shard_mesh)
        traffic.phase = "forward"
        out = layer(torch.ones(3, HIDDEN))
        traffic.phase = "backward"
        out.sum().backward()
    world.sum(torch.ones(10))
    assert dist.all_reduce is original
    taken = traffic.take()
    assert traffic.take() == ({}, {})
    return taken


def test_traffic_of_known_collectives():
    for nbytes, calls in on_ranks(RANKS, _counted):
        gathered = HIDDEN * HIDDEN * 4 // RANKS
        assert nbytes == {
            "sum": 40,
            "int64 in a positional group": 80,
            "rows": 12,
            "broadcast": 20,
            "forward": gathered,
            "backward": gathered,  # a root stays gathered; its gradient is scattered
        }
        assert set(calls.values()) == {1}


def _rows(world: World) -> list[bench_step.Row]:
    """Of this world, in the views that it has."""
    views = ["tp", "copies"] if world.size > 1 else ["alone"]
    return [bench_step.measure(world, view, bench_step.parse(SMALLEST)) for view in views]


def test_step_on_one_and_two_ranks():
    [[alone]], (pair, other) = on_ranks(1, _rows), on_ranks(2, _rows)
    cut, copies = pair
    for row in (alone, cut, copies):
        # Rotary frequencies are held beside the parameters.
        assert row.parameter_bytes == pytest.approx(row.parameter_formula, rel=5e-3)
        assert row.seconds["step"] >= row.seconds["update"] > 0
    assert cut.parameter_formula < 0.51 * alone.parameter_formula
    assert not any(alone.received.values())
    assert [row.received for row in pair] == [row.received for row in other]
    # docs/distributed.md: layers of P parameters in fp32, one microbatch of each of 3 models.
    layers = 2 * (4 * 32 * 32 + 3 * 32 * 128)
    tokens = 2 * 20
    embedding = tokens * (4 * 32 + 8)
    head = tokens * (8 * 32 + 48)
    least = 3 * (layers * 4 // 2 + embedding)
    assert least <= cut.received["score"] <= least + 2 * head
    # Whole models: gradients of actor and critic, once an optimizer step, of which there are two.
    gradients = 2 * (2 * layers + 3 * 64 * 32) * 4
    assert gradients <= copies.received["update"] <= 1.1 * gradients


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [[2], pytest.param([1, 2], marks=pytest.mark.long)], ids=str)
def test_it_starts_torchrun_itself(
    ranks: list[int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    report = tmp_path / "step.json"
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{ROOT / 'kernels'}")
    arguments = ["--ranks", ",".join(map(str, ranks)), "--views", "gather", "--json", str(report)]
    assert bench_step.main([*arguments, *SMALLEST]) == 0
    views = [(count, "gather" if count > 1 else "alone") for count in ranks]
    printed = capfd.readouterr().out
    assert [f"{count} ranks, {view}" in printed for count, view in views] == [True] * len(ranks)
    found = json.loads(report.read_text())
    assert found["environment"]["torch"] == torch.__version__
    assert [(row["ranks"], row["view"]) for row in found["rows"]] == views
