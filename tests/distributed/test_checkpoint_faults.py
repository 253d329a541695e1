"""Stop the world at every single system call of a save: an old or a new state is always there.

`FaultyFileSystem` fails (an error the program can see) or cuts the power (nothing runs any more) at
its k-th call. After a power cut it also takes away what was never fsynced, in the worst way POSIX
allows: contents of unsynced files are cut in half, and names whose directory was not synced are
    undone.
"""

from __future__ import annotations

import errno
import os
import random
import resource
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_fast.distributed import load, make_newest, save, steps
from rlhf_fast.distributed.checkpoint_directory import unfinished
from rlhf_fast.distributed.durable import FileSystem, replace_together, write_atomically
from rlhf_fast.errors import EnvironmentFault, RLHFError
from tests.forking import in_child


class PowerCut(BaseException):
    """Nothing after this instant happens."""


class FaultyFileSystem(FileSystem):
    def __init__(self, fail_at: int, error: int | None = None) -> None:
        self.calls = 0
        self._fail_at = fail_at
        self._errno = error
        self._dead = False
        self._paths: dict[int, Path] = {}
        self._unsynced_files: set[Path] = set()
        self._undo: list[tuple[Path, Callable[[], None]]] = []

    def _call(self) -> None:
        if self._dead:
            raise PowerCut
        self.calls += 1
        if self.calls == self._fail_at:
            if self._errno is None:
                self._dead = True
                raise PowerCut
            raise OSError(self._errno, os.strerror(self._errno))

    def lose_unsynced(self) -> None:
        for path in self._unsynced_files:
            if path.exists():
                os.truncate(path, path.stat().st_size // 2)
        for _, undo in reversed(self._undo):
            undo()

    def make_directory(self, path: Path) -> None:
        self._call()
        super().make_directory(path)
        self._undo.append((path.parent, lambda: shutil.rmtree(path, ignore_errors=True)))

    def create(self, path: Path) -> int:
        self._call()
        descriptor = super().create(path)
        self._paths[descriptor] = path
        self._unsynced_files.add(path)
        self._undo.append((path.parent, lambda: path.unlink(missing_ok=True)))
        return descriptor

    def write(self, descriptor: int, data: memoryview) -> int:
        try:
            self._call()
        except BaseException:
            os.write(descriptor, data[: len(data) // 2])
            raise
        return super().write(descriptor, data[: max(1, len(data) // 2)])  # short writes are legal

    def sync(self, descriptor: int) -> None:
        self._call()
        self._unsynced_files.discard(self._paths[descriptor])

    def close(self, descriptor: int) -> None:
        super().close(descriptor)
        if self._dead:
            raise PowerCut

    def replace(self, source: Path, target: Path) -> None:
        self._call()
        before = target.read_bytes() if target.is_file() else None
        super().replace(source, target)

        def moved(path: Path) -> Path:
            inside = path == source or source in path.parents
            return target / path.relative_to(source) if inside else path

        def undo() -> None:
            if target.exists():
                os.replace(target, source)
            if before is not None:
                target.write_bytes(before)

        self._unsynced_files = {moved(path) for path in self._unsynced_files}
        # Names inside a moved directory stay at risk under their new place.
        kept = []
        for parent, action in self._undo:
            at_risk = parent == source or source in parent.parents
            kept.append((moved(parent), self._remover(moved(parent)) if at_risk else action))
        self._undo = [*kept, (target.parent, undo)]

    @staticmethod
    def _remover(directory: Path) -> Callable[[], None]:
        def remove() -> None:
            for path in directory.iterdir():
                path.unlink()

        return remove

    def sync_directory(self, path: Path) -> None:
        self._call()
        self._undo = [(parent, undo) for parent, undo in self._undo if parent != path]

    def remove_file(self, path: Path) -> None:
        self._call()
        super().remove_file(path)

    def remove_tree(self, path: Path) -> None:
        try:
            self._call()
        except BaseException:
            for victim in sorted(path.iterdir())[:1]:
                victim.unlink()
            raise
        super().remove_tree(path)


def write(root: Path, step: int, value: float, fs: FileSystem | None = None) -> None:
    tensors = {"actor": {"w": torch.full((40,), value)}, "optim": {"m": torch.full((9,), value)}}
    options: dict[str, Any] = {} if fs is None else {"fs": fs}
    save(root, step, tensors=tensors, state={"value": value}, keep_last=1, **options)


def values(root: Path) -> set[float]:
    found = load(root)
    return {
        found.state["value"],
        *found.tensors["actor"]["w"].tolist(),
        *found.tensors["optim"]["m"].tolist(),
    }


# Scenario: steps saved before, then the save that is interrupted.
SCENARIOS = {
    "second save": ([(1, 1.0)], (2, 2.0)),
    "same step again": ([(1, 1.0)], (1, 2.0)),
    "first save": ([], (1, 2.0)),
}
FAULTS = {"power cut": None, "disk full": errno.ENOSPC, "input/output error": errno.EIO}


@pytest.fixture
def memory_path(tmp_path: Path) -> Iterator[Path]:
    """A directory in memory where there is one: the sweeps simulate what a disk may lose."""
    shared = Path("/dev/shm")
    if not os.access(shared, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=shared) as name:
        yield Path(name)


@pytest.mark.parametrize("loses", [False, True], ids=["kept", "lost"])
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_power_cut_at_every_call(memory_path: Path, scenario: str, loses: bool) -> None:
    before, (step, value) = SCENARIOS[scenario]
    outcomes = set()
    for fail_at in range(1, 200):
        root = memory_path / f"run{fail_at}"
        for old in before:
            write(root, *old)
        fs = FaultyFileSystem(fail_at)
        try:
            write(root, step, value, fs)
        except PowerCut:
            if loses:
                fs.lose_unsynced()
        else:
            # What `save` has returned from is durable.
            if loses:
                fs.lose_unsynced()
            assert values(root) == {value}
            break
        if before or steps(root):
            found = values(root)
            assert found in ({1.0}, {2.0}), f"call {fail_at}: {found}"
            outcomes |= found
        write(root, 3, 3.0)  # and life goes on
        assert values(root) == {3.0}
        assert unfinished(root) == []
    assert fs.calls == fail_at - 1 > 20, "the sweep covered every call"
    assert outcomes == ({1.0, 2.0} if before else {2.0})


NAMES = ("record", "samples", "result")


@pytest.mark.parametrize("fault", [*FAULTS, "power cut, lost"])
def test_files_that_belong_together_at_every_call(memory_path: Path, fault: str) -> None:
    outcomes = set()
    for fail_at in range(1, 50):
        root = memory_path / f"run{fail_at}"
        root.mkdir()
        replace_together(root, dict.fromkeys(NAMES, b"old"))
        fs = FaultyFileSystem(fail_at, FAULTS.get(fault))
        failed = False
        try:
            replace_together(root, dict.fromkeys(NAMES, b"new"), fs)
        except (PowerCut, OSError):
            failed = True
        if fault.endswith("lost"):
            fs.lose_unsynced()
        found = {p.name: p.read_bytes() for p in root.iterdir() if not p.name.startswith(".")}
        if "result" in found:
            assert found.keys() == set(NAMES)
            assert len(set(found.values())) == 1
        outcomes.add(found.get("result"))
        if FAULTS.get(fault) is not None:
            assert not list(root.glob(".*"))
        if not failed:
            break
    assert found["result"] == b"new"
    assert outcomes == {b"old", b"new", None}


@pytest.mark.parametrize("loses", [False, True], ids=["kept", "lost"])
def test_power_cut_while_an_older_state_is_made_the_newest(memory_path: Path, loses: bool) -> None:
    outcomes = set()
    for fail_at in range(1, 50):
        root = memory_path / f"run{fail_at}"
        for step in (1, 2, 3):
            tensors = {"actor": {"w": torch.full((4,), float(step))}}
            save(root, step, tensors=tensors, state={}, keep_last=None)
        fs = FaultyFileSystem(fail_at)
        cut = False
        try:
            make_newest(load(root, 2).path, fs=fs)
        except PowerCut:
            cut = True
        if loses:
            fs.lose_unsynced()
        outcomes.add(load(root).step)
        assert all(load(root, step).step == step for step in (1, 2, 3))
        if not cut:
            break
    assert load(root).step == 2
    assert (root / "LATEST").read_text() == "step-00000002\n"
    assert outcomes == {2, 3}


@pytest.mark.parametrize("fault", ["disk full", "input/output error"])
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_error_at_every_call(memory_path: Path, scenario: str, fault: str) -> None:
    before, (step, value) = SCENARIOS[scenario]
    for fail_at in range(1, 200):
        root = memory_path / f"run{fail_at}"
        for old in before:
            write(root, *old)
        fs = FaultyFileSystem(fail_at, FAULTS[fault])
        error: RLHFError | None = None
        try:
            write(root, step, value, fs)
        except EnvironmentFault as caught:
            error = caught
        if error is None:
            # Only clean-up after the commit may fail without failing the save.
            assert values(root) == {value}
        else:
            assert error.code == "RF7101"
            assert "MiB free" in str(error)
            assert unfinished(root) == [], f"call {fail_at}: a temporary directory is left"
            if before:
                assert values(root) in ({1.0}, {2.0})
                assert (root / "step-00000001").is_dir(), "the old directory has its name back"
        if fs.calls < fail_at:
            break
        write(root, 3, 3.0)
        assert values(root) == {3.0}
    assert fail_at > 20


def test_small_files_are_replaced_whole(memory_path: Path) -> None:
    path = memory_path / "run.json"
    for loses in (False, True):
        for fail_at in range(1, 50):
            path.write_bytes(b"old" * 100)
            fs = FaultyFileSystem(fail_at)
            try:
                write_atomically(path, b"new" * 100, fs)
            except PowerCut:
                if loses:
                    fs.lose_unsynced()
                assert path.read_bytes() in (b"old" * 100, b"new" * 100)
            else:
                break
        assert fail_at > 4


def test_kill_9_at_random_instants(tmp_path: Path) -> None:
    rng = random.Random(0)
    write(tmp_path, 0, 0.0)
    last = 0

    def save_forever() -> None:
        step = last
        while True:
            step += 1
            write(tmp_path, step, float(step))

    for _ in range(20):
        pid = in_child(save_forever)
        while max(steps(tmp_path), default=last) == last:
            time.sleep(0.002)
        time.sleep(rng.uniform(0.0, 0.08))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        found = load(tmp_path)
        assert values(tmp_path) == {float(found.step)}
        assert not [notice for notice in found.notices if "passed over" in notice]
        assert found.step > last
        last = found.step


def test_a_real_file_size_limit(tmp_path: Path) -> None:
    write(tmp_path, 1, 1.0)

    def save_too_much() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        big = {"actor": {"w": torch.zeros(1_000_000)}}
        with pytest.raises(EnvironmentFault, match="RF7101"):
            save(tmp_path, 2, tensors=big, state={}, keep_last=1)

    _, status = os.waitpid(in_child(save_too_much), 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert values(tmp_path) == {1.0}
    assert load(tmp_path).notices == ()
