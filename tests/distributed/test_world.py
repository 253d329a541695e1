"""Ranks, axes and collectives; what one returns is the same everywhere."""

import socket
from pathlib import Path

import pytest
import torch

from rlhf_fast.distributed.sharding import shard_module
from rlhf_fast.distributed.world import World
from rlhf_fast.errors import EnvironmentFault
from rlhf_fast.models.vocabulary import target_logprobs
from tests.distributed.ranks import on_ranks
from tests.models.tiny import build, next_token_targets, random_sequences


def _facts(world: World) -> dict[str, object]:
    parts = world.gather_rows(torch.arange(world.rank + 1) + 10 * world.rank)
    sent = torch.tensor([world.rank + 5])
    world.broadcast([sent], source=2)
    world.barrier()
    return {
        "place": (world.rank, world.replica, world.shard_rank),
        "sizes": (world.size, world.replicas, world.shards),
        "main": world.is_main,
        "mesh": world.shard_mesh.mesh.tolist(),
        "sum": world.sum(torch.tensor([1.0, world.rank])).tolist(),
        "any": (world.any(world.rank == 3), world.any(False)),
        "rows": [part.tolist() for part in parts],
        "sent": int(sent),
    }


def test_four_ranks_as_two_replicas() -> None:
    found = on_ranks(4, _facts, replicas=2)
    assert [f["place"] for f in found] == [(0, 0, 0), (1, 0, 1), (2, 1, 0), (3, 1, 1)]
    assert [f["mesh"] for f in found] == [[0, 1], [0, 1], [2, 3], [2, 3]]
    for facts in found:
        assert facts["sizes"] == (4, 2, 2)
        assert facts["sum"] == [4.0, 6.0]
        assert facts["any"] == (True, False)
        assert facts["rows"] == [[0], [10, 11], [20, 21, 22], [30, 31, 32, 33]]
        assert facts["sent"] == 7
    assert [f["main"] for f in found] == [True, False, False, False]


def _fails_on_one(world: World) -> None:
    if world.rank == 1:
        raise ValueError("the reason")
    world.barrier()


def test_the_harness_reports_the_rank_that_failed() -> None:
    with pytest.raises(AssertionError, match=r"rank 1:[\s\S]*the reason"):
        on_ranks(2, _fails_on_one)


def test_one_rank_needs_no_process_group() -> None:
    world = World.join(torch.device("cpu"))
    value = torch.ones(2)
    assert world.sum(value) is value
    assert world.gather_rows(value)[0] is value
    assert world.any(True)
    assert not world.any(False)
    assert (world.is_main, world.shards, world.replicas, world.mesh) == (True, 1, 1, None)
    assert not torch.distributed.is_initialized()
    world.barrier()
    world.leave()


def test_replicas_must_divide_the_ranks() -> None:
    with pytest.raises(EnvironmentFault, match="RF7050"):
        World.join(torch.device("cpu"), replicas=2, rank=0, size=3)


def test_a_rank_that_finds_no_other_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}.items():
        monkeypatch.setenv(name, value)
    for name, value in {"RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(EnvironmentFault, match=r"RF7054.*rank 1 of 2"):
        World.join(torch.device("cpu"), timeout_seconds=1.0)
    assert not torch.distributed.is_initialized()


def _train(world: World) -> None:
    module = build("llama")
    shard_module(module, world, dtype="float32")
    sequences = random_sequences([5, 4])
    targets = next_token_targets(sequences)
    logprobs, _ = target_logprobs(module, sequences, targets, temperature=1.0, with_entropy=False)
    logprobs.sum().backward()


def _threads_at_the_end(world: World) -> list[str]:
    _train(world)
    world.sum(torch.ones(3))
    world.leave()
    tasks = Path("/proc/self/task")
    return [(task / "comm").read_text().strip() for task in tasks.iterdir()]


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="needs Linux")
def test_no_thread_of_a_group_is_left_when_ranks_have_left() -> None:
    """One that drops a tensor while the interpreter ends aborts a job that is done."""
    for names in on_ranks(2, _threads_at_the_end):
        assert not [name for name in names if "gloo" in name]
