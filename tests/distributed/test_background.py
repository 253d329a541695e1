"""Saves in the background: crash-safe as the others, one at a time, of the state as it was."""

from __future__ import annotations

import errno
import os
import signal
import threading
import weakref
from pathlib import Path

import pytest
import torch

from rlhf_fast.distributed import BackgroundSaver, load, steps
from rlhf_fast.distributed.checkpoint_directory import unfinished
from rlhf_fast.distributed.durable import LOCAL, FileSystem
from rlhf_fast.errors import EnvironmentFault, Preempted
from rlhf_fast.stages.run import Run
from tests.distributed.test_checkpoint_faults import FaultyFileSystem, PowerCut
from tests.distributed.test_checkpoint_faults import memory_path as memory_path


class Gate(FileSystem):
    """Holds every fsync until it is opened."""

    def __init__(self) -> None:
        self.open = threading.Event()

    def sync(self, descriptor: int) -> None:
        assert self.open.wait(20)
        super().sync(descriptor)


def begin(saver: BackgroundSaver, step: int) -> torch.Tensor:
    weights = torch.full((30,), float(step))
    saver.save(step, tensors={"actor": {"w": weights}}, state={"value": step})
    return weights


def value_at(root: Path) -> float:
    found = load(root)
    values = {found.state["value"], float(found.step), *found.tensors["actor"]["w"].tolist()}
    assert len(values) == 1
    return values.pop()


def test_training_goes_on_while_the_files_are_written(tmp_path: Path) -> None:
    gate = Gate()
    saver = BackgroundSaver(tmp_path, keep_last=1, fs=gate)
    weights = begin(saver, 1)
    assert saver.poll() is None
    weights.fill_(9.0)
    assert steps(tmp_path) == []
    gate.open.set()
    assert saver.wait() == tmp_path / "step-00000001"
    assert value_at(tmp_path) == 1
    assert saver.poll() is saver.wait() is None
    begin(saver, 2)
    begin(saver, 3)  # waits for the one before: nothing is lost or mixed
    assert value_at(tmp_path) in (2, 3)
    saver.wait()
    assert value_at(tmp_path) == 3


def test_the_state_is_let_go_of_while_its_files_are_written(tmp_path: Path) -> None:
    """Moments that move to the host meanwhile would stay on their device too."""
    gate = Gate()
    saver = BackgroundSaver(tmp_path, keep_last=1, fs=gate)
    weights = begin(saver, 1)
    freed = weakref.ref(weights)
    del weights
    assert freed() is None
    gate.open.set()
    saver.wait()
    assert value_at(tmp_path) == 1


def test_host_memory_is_kept_between_saves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saver = BackgroundSaver(tmp_path, keep_last=1)
    made = []
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: made.append(a) or empty(*a, **k))
    for step in (1, 2, 3):
        begin(saver, step)
    saver.wait()
    assert made == [(torch.Size([30]),)]
    assert value_at(tmp_path) == 3


def test_power_cut_at_every_call_of_a_save_in_the_background(memory_path: Path) -> None:
    for fail_at in range(1, 100):
        root = memory_path / str(fail_at)
        old = BackgroundSaver(root, keep_last=1)
        begin(old, 1)
        old.wait()
        fs = FaultyFileSystem(fail_at)
        try:
            saver = BackgroundSaver(root, keep_last=1, fs=fs)
            begin(saver, 2)
            saver.wait()
        except PowerCut:
            fs.lose_unsynced()
            assert value_at(root) in (1, 2)
        else:
            fs.lose_unsynced()
            assert value_at(root) == 2
            break
        begin(old, 3)
        old.wait()
        assert value_at(root) == 3
        assert unfinished(root) == []
    assert fs.calls == fail_at - 1 > 15


def make(path: Path) -> Run:
    return Run(path, stage="sft", config={"seed": 1}, quiet=True, async_save=True)


def save(run: Run, step: int) -> None:
    tensors = {"actor": {"w": torch.full((4,), float(step))}}
    assert run.save(step, tensors=tensors, state={"value": step}) is None


def test_an_error_surfaces_at_the_next_step_and_the_old_state_is_intact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train() -> None:
        with make(tmp_path) as run:
            save(run, 1)
            run.finish_save()
            with monkeypatch.context() as patch:
                patch.setattr(LOCAL, "sync", FaultyFileSystem(1, errno.ENOSPC).sync)
                save(run, 2)
                run._saves._background._thread.join()  # type: ignore[union-attr]
            run.poll_save()

    with pytest.raises(EnvironmentFault, match="RF7101"):
        train()
    assert value_at(tmp_path / "checkpoints") == 1
    assert unfinished(tmp_path / "checkpoints") == []


def test_a_signal_waits_for_the_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate()

    def train() -> None:
        with make(tmp_path) as run:
            monkeypatch.setattr(LOCAL, "sync", gate.sync)
            save(run, 5)
            os.kill(os.getpid(), signal.SIGTERM)
            threading.Timer(0.05, gate.open.set).start()
            run.raise_if_stopped(None)

    with pytest.raises(Preempted, match="step-00000005"):
        train()
    assert value_at(tmp_path / "checkpoints") == 5


@pytest.mark.parametrize("end", ["complete", "leave", "raise"])
def test_the_end_of_a_run_waits_for_the_save(tmp_path: Path, end: str) -> None:
    def train() -> None:
        with make(tmp_path) as run:
            save(run, 5)
            if end == "complete":
                run.mark_complete(5)
                assert value_at(run.checkpoint_root) == 5
            elif end == "raise":
                raise KeyError("a bug in a later step")

    if end == "raise":
        with pytest.raises(KeyError):
            train()
    else:
        train()
    assert value_at(tmp_path / "checkpoints") == 5
