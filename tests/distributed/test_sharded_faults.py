"""Several ranks save into one directory, and one of them fails, dies, or the power goes."""

from __future__ import annotations

import errno
import os
import signal
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard, distribute_tensor, zeros

from rlhf_fast.distributed import BackgroundSaver, CheckpointWriter, load, save, steps
from rlhf_fast.distributed.agreement import share
from rlhf_fast.distributed.checkpoint_directory import STATE_NAME, unfinished
from rlhf_fast.distributed.checkpoint_writer import Piece
from rlhf_fast.distributed.dcp import ShardReader, ShardWriter
from rlhf_fast.distributed.durable import LOCAL, FileSystem
from rlhf_fast.distributed.world import World
from rlhf_fast.errors import CheckpointError, EnvironmentFault, RLHFError
from tests.distributed.ranks import on_ranks
from tests.distributed.test_checkpoint_faults import FaultyFileSystem, PowerCut
from tests.distributed.test_checkpoint_faults import memory_path as memory_path


def state_of(world: World, value: float) -> dict[str, Any]:
    w = distribute_tensor(torch.full((5, 3), value), world.shard_mesh, [Shard(0)])
    return {"actor": {"w": w}, "rng": {"plain": torch.full((2,), value)}}


def write(world: World, root: Path, step: int, fs: FileSystem = LOCAL) -> Path:
    tensors = state_of(world, float(step))
    return save(root, step, tensors=tensors, state={"value": step}, keep_last=1, world=world, fs=fs)


def value_at(root: Path) -> float:
    """The one value that everything in the newest checkpoint has, as one process reads it."""
    found = load(root)
    values = {found.state["value"], float(found.step)}
    for group in found.tensors.values():
        values |= {v for t in group.values() for v in t.flatten().tolist()}
    assert len(values) == 1
    return values.pop()


def _errors(world: World, folder: Path) -> None:
    for failing in range(world.size):
        root, last = folder / f"{failing}", 1.0
        write(world, root, 1)
        for fail_at in range(1, 100):
            fs, step = FaultyFileSystem(fail_at, errno.ENOSPC), fail_at + 1
            error: RLHFError | None = None
            try:
                write(world, root, step, fs if world.rank == failing else LOCAL)
            except EnvironmentFault as caught:
                error = caught
            codes = share(world, error and error.code)  # and rank 0 has pruned
            assert codes in (["RF7101"] * world.size, [None] * world.size), "all or nobody"
            found = value_at(root)
            # A failure to sync the parent comes after the rename: the new one may be there.
            assert found in ((last, step) if error else (step,))
            assert not error or unfinished(root) == []
            last = found
            if share(world, fs.calls < fail_at)[failing]:
                break
        assert fail_at > (3 if failing else 15), "the sweep covered every call"


def _background(world: World, root: Path) -> None:
    saver = BackgroundSaver(root, keep_last=1, world=world)
    tensors = state_of(world, 1.0)
    saver.save(1, tensors=tensors, state={"value": 1})
    tensors["actor"]["w"].fill_(7.0)  # while it is being written
    tensors["rng"]["plain"].fill_(7.0)
    assert saver.wait() == root / "step-00000001"
    assert value_at(root) == 1
    fs = FaultyFileSystem(3, errno.ENOSPC) if world.rank == 1 else LOCAL
    failing = BackgroundSaver(root, keep_last=1, world=world, fs=fs)
    failing.save(2, tensors=state_of(world, 2.0), state={"value": 2})
    polls = _polls_until_it_fails(failing)
    assert len(set(share(world, polls))) == 1, "all ranks learn of it in the same step"
    assert unfinished(root) == []
    assert value_at(root) == 1
    failing.save(3, tensors=state_of(world, 3.0), state={"value": 3})
    failing.abandon()
    world.barrier()
    assert value_at(root) == 1
    saver.save(4, tensors=state_of(world, 4.0), state={"value": 4})
    assert saver.wait() == root / "step-00000004"
    assert saver.poll() is None
    world.barrier()  # rank 0 prunes
    assert unfinished(root) == []


def _polls_until_it_fails(saver: BackgroundSaver) -> int:
    for polls in range(10**6):
        try:
            assert saver.poll() is None
        except EnvironmentFault:
            return polls
    raise AssertionError("it did not fail")


def _disagreements(world: World, folder: Path) -> None:
    """What one rank alone meets, on saving and on loading."""
    tensors = state_of(world, 1.0)
    if world.rank == 1:
        tensors["rng"]["odd"] = torch.zeros(2, dtype=torch.complex64)
    with pytest.raises(CheckpointError, match="complex64") as caught:
        save(folder, 1, tensors=tensors, state={}, keep_last=1, world=world)
    assert caught.value.code == "RF8004"
    assert str(caught.value).startswith("RF8004: rank 1") == (world.rank == 0)

    partial = state_of(world, 1.0)
    shape = (5, 3) if world.rank else (6, 3)  # another model on one rank
    partial["actor"]["w"] = zeros(*shape, device_mesh=world.mesh["shard"], placements=[Shard(0)])  # type: ignore[index]
    with pytest.raises(CheckpointError, match="do not make up the state"):
        save(folder, 1, tensors=partial, state={}, keep_last=1, world=world)
    world.barrier()  # rank 0 cleans up
    assert steps(folder) == unfinished(folder) == []

    for step in (1, 2):
        write_keeping = state_of(world, float(step))
        save(folder, step, tensors=write_keeping, state={"value": step}, keep_last=2, world=world)
    shards = sorted((folder / "step-00000002").glob("actor*"))
    assert len(shards) == 2
    if world.is_main:
        shards[-1].write_bytes(shards[-1].read_bytes()[:-1] + b"\x01")
    world.barrier()
    found = load(folder, world=world)
    assert found.step == 1, "passed over by all ranks alike"
    assert any("rank-00001.safetensors" in notice for notice in found.notices)
    with pytest.raises(CheckpointError, match=r"RF8001.*does not match its checksum"):
        load(folder, 2, world=world)


class _Dies(FileSystem):
    def __init__(self, at: int) -> None:
        self.left = at

    def sync(self, descriptor: int) -> None:
        self.left -= 1
        if not self.left:
            os.kill(os.getpid(), signal.SIGKILL)
        super().sync(descriptor)


def _dies(world: World, root: Path, rank: int, at: int) -> None:
    write(world, root, 1)
    write(world, root, 2, _Dies(at) if world.rank == rank else LOCAL)


def _plain_dcp(world: World, root: Path) -> None:
    """DCP's own entry points, with their collectives, over our storage."""
    writer = CheckpointWriter(root, 1, world=world)
    writer.begin()
    flat = {f"{g}/{n}": t for g, named in state_of(world, 1.0).items() for n, t in named.items()}
    dcp.save(flat, storage_writer=ShardWriter(writer))
    if world.is_main:
        writer.add_bytes(STATE_NAME, b'{"value":1}')
    writer.commit()
    assert value_at(root) == 1
    mesh = world.shard_mesh
    target = {"w": zeros(5, 3, device_mesh=mesh, placements=[Shard(1)])}
    dcp.load(target, storage_reader=ShardReader(load(root, world=world).tensors["actor"]))
    assert isinstance(target["w"], DTensor)
    assert torch.equal(target["w"].full_tensor(), torch.ones(5, 3))


def test_an_error_on_one_rank_is_an_error_on_all(memory_path: Path) -> None:
    on_ranks(2, _errors, memory_path)


def test_background_saves_of_several_ranks(memory_path: Path) -> None:
    on_ranks(2, _background, memory_path)


def test_ranks_that_differ(memory_path: Path) -> None:
    on_ranks(2, _disagreements, memory_path)


def test_dcp_itself_saves_and_loads_through_our_storage(memory_path: Path) -> None:
    on_ranks(2, _plain_dcp, memory_path)


@pytest.mark.parametrize(("rank", "at"), [(0, 1), (0, 4), (1, 1)])
def test_a_rank_that_is_killed_leaves_a_checkpoint(memory_path: Path, rank: int, at: int) -> None:
    # The other rank may say first that it has lost this one.
    lost = rf"rank {rank} died|rank {1 - rank}:[\s\S]*(closed|reset) by peer"
    with pytest.raises(AssertionError, match=lost):
        on_ranks(2, _dies, memory_path, rank, at)
    assert value_at(memory_path) == 1
    assert len(unfinished(memory_path)) <= 1
    on_ranks(2, write, memory_path, 3)
    assert value_at(memory_path) == 3
    assert unfinished(memory_path) == []


# ---- a power cut, in every call of either of two ranks that are threads of this process ----------


@dataclass(frozen=True)
class _Threads(World):
    """A rank that is a thread: what the writer asks of a world, over a barrier."""

    barrier_: Any = None
    slots: list[Any] = field(default_factory=list)

    def gather_rows(self, rows: Tensor) -> list[Tensor]:
        self.slots[self.rank] = rows
        self.barrier_.wait()
        found = list(self.slots)
        self.barrier_.wait()
        return found


class _OneDisk(FaultyFileSystem):
    """One fault for both ranks, whichever makes the fatal call."""

    def __init__(self, fail_at: int) -> None:
        super().__init__(fail_at)
        self._lock = threading.RLock()

    def __getattribute__(self, name: str) -> Any:
        found = super().__getattribute__(name)
        if name not in FileSystem.__dict__ or name.startswith("_"):
            return found

        def locked(*arguments: Any) -> Any:
            with self._lock:
                return found(*arguments)

        return locked


def _write_by_threads(root: Path, step: int, fs: FileSystem) -> list[BaseException]:
    barrier, slots = threading.Barrier(2), [None, None]
    failures: list[BaseException] = []

    def work(rank: int) -> None:
        world = _Threads(
            *(torch.device("cpu"), rank, 2, rank),
            mesh="threads",  # type: ignore[arg-type]
            barrier_=barrier,
            slots=slots,
        )
        writer = CheckpointWriter(root, step, fs, world=world)
        try:
            writer.begin()
            half = torch.full((20,), float(step))
            writer.add_pieces("actor", {"w": Piece(half, (20 * rank,), (40,))})
            if rank == 0:
                writer.add_bytes(STATE_NAME, b'{"value":%d}' % step)
            writer.sync()
            writer.collect()
            writer.commit()
        except BaseException as error:
            failures.append(error)
            barrier.abort()

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return failures


@pytest.mark.parametrize("loses", [False, True], ids=["kept", "lost"])
def test_power_cut_at_every_call_of_two_ranks(memory_path: Path, loses: bool) -> None:
    outcomes = set()
    for fail_at in range(1, 100):
        root = memory_path / f"{fail_at}"
        assert _write_by_threads(root, 1, LOCAL) == []
        fs = _OneDisk(fail_at)
        failures = _write_by_threads(root, 2, fs)
        if loses:
            fs.lose_unsynced()
        if not failures:
            assert value_at(root) == 2
            break
        assert any(isinstance(error, PowerCut) for error in failures)
        assert value_at(root) in (1, 2)
        outcomes.add(value_at(root))
        assert _write_by_threads(root, 3, LOCAL) == []
        assert value_at(root) == 3
        assert unfinished(root) == []
    assert fs.calls == fail_at - 1 > 15, "the sweep covered every call"
    assert outcomes == {1, 2}
