"""The run directory: refused before any work or kept to the end, whatever signal arrives."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_fast.distributed import load, steps
from rlhf_fast.errors import CheckpointError, EnvironmentFault, Interrupted, Preempted, RLHFError
from rlhf_fast.stages import progress as progress_module
from rlhf_fast.stages import run_lock
from rlhf_fast.stages.progress import PhaseTimer, ProgressDisplay
from rlhf_fast.stages.run import Run
from rlhf_fast.stages.run_config import compare, fingerprint
from rlhf_fast.stages.run_lock import LOCK_NAME, RunLock
from tests.forking import in_child

REPOSITORY = Path(__file__).parents[2]
CONFIG = {"model": {"name": "tiny", "layers": 2}, "seed": 1, "optim": {"lr": 1e-5}, "steps": 10}


def make(path: Path, **options: Any) -> Run:
    merged: dict[str, Any] = {
        "stage": "sft",
        "config": CONFIG,
        "hard_keys": ["model", "seed"],
        "quiet": True,
        **options,
    }
    return Run(path, **merged)


def save(run: Run, step: int) -> Path:
    return run.save(
        step, tensors={"actor": {"w": torch.full((4,), float(step))}}, state={"s": step}
    )


def start(path: Path, *, at: int | None = 3, complete: bool = False, **options: Any) -> None:
    with make(path, **options) as run:
        if at is not None:
            save(run, at)
        if complete:
            run.mark_complete(at or 0, {"loss": 0.5})


def exit_code(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def wait_until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.005)


# --- the directory -----------------------------------------------------------------------------


def test_a_fresh_run(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "мой run"
    with make(path, config={**CONFIG, "hub_token": "hf_secret"}) as run:
        assert run.checkpoint is None
        assert not run.already_complete
        assert run.notices == ()
        save(run, 1)
    record = json.loads((path / "run.json").read_text())
    assert record["stage"] == "sft"
    assert record["config"]["model"] == CONFIG["model"]
    assert "hf_secret" not in (path / "run.json").read_text()
    assert not list(path.glob(".probe*"))


@pytest.mark.parametrize("below", ["", "a/b"])
def test_a_file_in_the_way(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").write_text("mine")
    run = make(tmp_path / "file" / below)
    with pytest.raises(CheckpointError, match=r"RF8205.*is a file"), run:
        pytest.fail("the block must not run")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_place_that_cannot_be_written() -> None:
    place = Path("/proc/self/runs")  # not even root may create a directory there
    with pytest.raises(EnvironmentFault, match="RF7101") as caught, make(place):
        pytest.fail("the block must not run")
    assert caught.value.exit_code == 3


def test_a_read_only_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open

    def read_only(path: Any, flags: int, *args: Any, **options: Any) -> int:
        if flags & os.O_CREAT:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        return real(path, flags, *args, **options)

    monkeypatch.setattr(os, "open", read_only)
    with pytest.raises(EnvironmentFault, match="Read-only file system"), make(tmp_path):
        pytest.fail("the block must not run")


def test_too_little_disk_is_refused_with_both_numbers(tmp_path: Path) -> None:
    with (
        pytest.raises(EnvironmentFault, match=r"RF7102.*[\d,]+ MiB.*[\d,]+ MiB are free") as caught,
        make(tmp_path, bytes_needed=2**60),
    ):
        pytest.fail("the block must not run")
    assert f"{2**40:,}" in caught.value.what
    assert not (tmp_path / "run.json").exists()


def disk(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    """A disk with so much room beside what lies there now."""
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=free))


def test_room_that_a_run_holds_already_is_not_asked_for_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed, free = 10_000, 4_000
    start(tmp_path)
    (tmp_path / "checkpoints" / "step-00000003" / "of_some_size").write_bytes(bytes(7_000))
    disk(monkeypatch, free)
    with make(tmp_path, bytes_needed=needed) as run:
        assert run.checkpoint is not None
    with make(tmp_path, bytes_needed=needed, overwrite=True) as run:
        assert run.checkpoint is None
    with pytest.raises(EnvironmentFault, match="RF7102"), make(tmp_path, bytes_needed=needed):
        pass


def test_a_finished_run_needs_no_room_and_one_made_longer_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start(tmp_path, at=10, complete=True)
    disk(monkeypatch, 0)
    with make(tmp_path, bytes_needed=10_000) as run:
        assert run.already_complete
    longer = {"config": {**CONFIG, "steps": 20}, "resume": True, "bytes_needed": 10_000}
    with pytest.raises(EnvironmentFault, match="RF7102"), make(tmp_path, **longer):
        pass
    assert (tmp_path / "complete.json").exists()


@pytest.mark.parametrize("named", ["model", "model/part.jsonl", "model/reward.py:score", "a link"])
def test_what_a_run_reads_is_not_overwritten(tmp_path: Path, named: str) -> None:
    out = tmp_path / "run"
    start(out, outputs=["model"])
    (out / "model").mkdir()
    for name in ("part.jsonl", "reward.py"):
        (out / "model" / name).write_text("all there is")
    (tmp_path / "a link").symlink_to(out / "model")
    source = str(tmp_path / named if named == "a link" else out / named)
    config = {**CONFIG, "data": {"train": [source]}}
    with pytest.raises(CheckpointError, match=r"(?s)RF8209.*data\.train="):
        start(out, outputs=["model"], config=config, overwrite=True)
    assert (out / "model" / "part.jsonl").read_text() == "all there is"
    assert steps(out / "checkpoints") == [3]
    beside = {**CONFIG, "data": {"train": [str(tmp_path), "model", "no/such:file", ""]}}
    start(out, outputs=["model"], config=beside, overwrite=True)
    assert not (out / "model").exists()


def test_a_run_that_would_not_fit_is_not_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start(tmp_path)
    disk(monkeypatch, 0)
    with pytest.raises(EnvironmentFault, match="RF7102"):
        start(tmp_path, overwrite=True, bytes_needed=2**40)
    assert steps(tmp_path / "checkpoints") == [3]


def test_foreign_files_stay_and_foreign_results_are_not_touched(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    start(tmp_path)
    start(tmp_path, overwrite=True)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    other = tmp_path / "other"
    (other / "model").mkdir(parents=True)
    for options in ({}, {"overwrite": True}):
        with pytest.raises(CheckpointError, match=r"RF8203.*model"):
            start(other, outputs=["model"], **options)
        assert (other / "model").is_dir()


# --- resume ------------------------------------------------------------------------------------


def test_auto_continues_the_same_run(tmp_path: Path) -> None:
    start(tmp_path, at=3)
    with make(tmp_path) as run:
        assert run.checkpoint is not None
        assert run.checkpoint.step == 3
        assert run.checkpoint.state == {"s": 3}
        assert run.notices == ()


def test_a_run_without_a_checkpoint_starts_again(tmp_path: Path) -> None:
    start(tmp_path, at=None)
    with make(tmp_path, resume=True) as run:
        assert run.checkpoint is None
        assert "starting at step 0" in run.notices[0]


@pytest.mark.parametrize("kind", ["a link that leads nowhere", "a file"])
def test_checkpoints_that_cannot_be_reached_are_no_fresh_start(tmp_path: Path, kind: str) -> None:
    start(tmp_path, complete=True)
    root, disk = tmp_path / "checkpoints", tmp_path / "disk"
    root.rename(disk)
    if kind == "a file":
        root.write_text("in the way")
    else:
        root.symlink_to(tmp_path / "not mounted")
    longer = {**CONFIG, "steps": 20}
    with pytest.raises(CheckpointError, match=r"RF8205.*checkpoints"):
        start(tmp_path, config=longer, resume=True)
    assert (tmp_path / "complete.json").exists(), "nothing was changed"
    root.unlink()
    root.symlink_to(disk)
    with make(tmp_path, config=longer, resume=True) as run:
        assert run.checkpoint is not None
        assert run.checkpoint.step == 3


def test_resume_false_and_resume_true_insist(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="RF8204"):
        start(tmp_path, resume=True)
    start(tmp_path, resume=False)
    with pytest.raises(CheckpointError, match="RF8203") as caught:
        start(tmp_path, resume=False)
    assert caught.value.exit_code == 2
    assert steps(tmp_path / "checkpoints") == [3]


def test_soft_changes_need_a_word_and_are_listed(tmp_path: Path) -> None:
    start(tmp_path)
    changed = {**CONFIG, "optim": {"lr": 2e-5}, "extra": 1}
    with pytest.raises(CheckpointError, match="RF8202") as caught:
        start(tmp_path, config=changed)
    assert "optim.lr: 1e-05 -> 2e-05 (soft)" in str(caught.value)
    assert "extra: (absent) -> 1 (soft)" in str(caught.value)
    with make(tmp_path, config=changed, resume=True) as run:
        assert run.checkpoint is not None
        assert any("optim.lr: 1e-05 -> 2e-05" in notice for notice in run.notices)
    with make(tmp_path, config=changed) as run:  # now the configuration of the run
        assert run.notices == ()


@pytest.mark.parametrize("resume", ["auto", True])
def test_hard_changes_are_refused(tmp_path: Path, resume: Any) -> None:
    start(tmp_path)
    changed = {**CONFIG, "model": {"name": "tiny", "layers": 3}}
    with pytest.raises(CheckpointError, match=r"RF8202.*cannot be continued") as caught:
        start(tmp_path, config=changed, resume=resume)
    assert "model.layers: 2 -> 3 (hard)" in str(caught.value)
    with pytest.raises(CheckpointError, match='stage: "sft" -> "ppo"'):
        start(tmp_path, stage="ppo", resume=resume)
    assert load(tmp_path / "checkpoints").step == 3


def test_a_changed_secret_is_not_a_change(tmp_path: Path) -> None:
    start(tmp_path, config={**CONFIG, "api_key": "one"})
    with make(tmp_path, config={**CONFIG, "api_key": "two"}) as run:
        assert run.notices == ()


def test_overwrite_starts_anew(tmp_path: Path) -> None:
    start(tmp_path, at=9, complete=True)
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    (tmp_path / "model").mkdir()
    with make(tmp_path, overwrite=True, outputs=["model"], config={"seed": 7}) as run:
        assert run.checkpoint is None
        assert not run.already_complete
        assert {entry.name for entry in tmp_path.iterdir()} == {"run.json", LOCK_NAME}


@pytest.mark.parametrize(
    "options",
    [
        {"overwrite": True, "resume": True},
        {"overwrite": True, "resume_step": 1},
        {"resume": False, "resume_step": 1},
    ],
)
def test_contradictions(tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match="RF8208"):
        start(tmp_path, **options)


def test_already_complete(tmp_path: Path) -> None:
    start(tmp_path, at=10, complete=True)
    with make(tmp_path) as run:
        assert run.already_complete
        assert "already complete after 10 steps" in run.notices[0]
        assert run.checkpoint is not None
    longer = {**CONFIG, "steps": 20}
    with make(tmp_path, config=longer, resume=True) as run:
        assert not run.already_complete
        assert run.checkpoint is not None
        assert run.checkpoint.step == 10
    with make(tmp_path, config=longer) as run:
        assert not run.already_complete, "the mark went when the run was extended"


@pytest.mark.parametrize("how", ["damaged", "out of reach"])
def test_a_finished_run_needs_its_checkpoints_no_more(tmp_path: Path, how: str) -> None:
    start(tmp_path, at=10, complete=True)
    root = tmp_path / "checkpoints"
    if how == "damaged":
        (root / "step-00000010" / "state.json").write_text("{}")
    else:
        root.rename(tmp_path / "elsewhere")
        root.symlink_to(tmp_path / "not mounted")
    with make(tmp_path) as run:
        assert run.already_complete
        assert run.checkpoint is None
        assert any("cannot be used any more" in notice for notice in run.notices)
    with pytest.raises(CheckpointError, match=r"RF8001|RF8205"):
        start(tmp_path, config={**CONFIG, "steps": 20}, resume=True)
    assert (tmp_path / "complete.json").exists()


def test_an_explicit_step(tmp_path: Path) -> None:
    with make(tmp_path) as run:
        for step in (1, 2, 3):
            save(run, step)
    with make(tmp_path, resume_step=2) as run:
        assert run.checkpoint is not None
        assert run.checkpoint.step == 2
        save(run, 3)
    with pytest.raises(CheckpointError, match="RF8003"):
        start(tmp_path, resume_step=1)
    (tmp_path / "checkpoints" / "step-00000003" / "state.json").write_text("{}")
    with pytest.raises(CheckpointError, match="RF8001"):
        start(tmp_path, resume_step=3)
    with make(tmp_path) as run:
        assert run.checkpoint is not None
        assert run.checkpoint.step == 2
        assert any("passed over" in notice for notice in run.notices)


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff", b'{"format_version": 2}'])
def test_an_unreadable_record(tmp_path: Path, content: bytes) -> None:
    start(tmp_path)
    (tmp_path / "run.json").write_bytes(content)
    with pytest.raises(CheckpointError, match="RF8206"):
        start(tmp_path)
    start(tmp_path, overwrite=True)


def test_config_comparison() -> None:
    assert fingerprint({"a": 1, "b": [1, {"c": 2}]}) == fingerprint({"b": [1, {"c": 2}], "a": 1})
    assert fingerprint({"a": 1}) != fingerprint({"a": 2})
    assert fingerprint({"a": 1}) != fingerprint({"a": "1"})
    before = {"x": {"y": 1, "z": {}}, "xy": 1, "p": Path("/a")}
    after = {"x": {"y": 1.0, "z": {"w": None}}, "xy": 2, "p": Path("/a")}
    found = {d.key: d.hard for d in compare(before, after, ["x"])}
    assert found == {"x.y": True, "x.z": True, "x.z.w": True, "xy": False}


# --- the lock ----------------------------------------------------------------------------------


def test_a_second_run_is_refused_in_the_same_process(tmp_path: Path) -> None:
    with make(tmp_path) as run:
        with pytest.raises(CheckpointError, match=f"RF8201.*pid {os.getpid()}") as caught:
            start(tmp_path)
        assert caught.value.exit_code == 2
        save(run, 4)
    start(tmp_path)


def test_of_many_processes_one_gets_the_lock(tmp_path: Path) -> None:
    go = tmp_path / "go"

    def compete() -> None:
        wait_until(go.exists)
        with make(tmp_path / "run") as run:
            save(run, 1)
            time.sleep(0.5)

    children = [in_child(compete) for _ in range(4)]
    go.touch()
    assert sorted(exit_code(pid) for pid in children) == [0, 2, 2, 2]
    start(tmp_path / "run")


def test_the_lock_of_a_killed_process_is_taken_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def hold() -> None:
        with make(tmp_path) as run:
            save(run, 5)
            time.sleep(60)

    pid = in_child(hold)
    wait_until(lambda: steps(tmp_path / "checkpoints") == [5])
    with pytest.raises(CheckpointError, match=f"RF8201.*pid {pid}"):
        start(tmp_path)
    os.kill(pid, signal.SIGKILL)
    assert exit_code(pid) == -signal.SIGKILL
    with make(tmp_path) as run:
        assert run.checkpoint is not None
        assert run.checkpoint.step == 5
    assert f"pid {pid}" in caplog.text
    assert (tmp_path / LOCK_NAME).read_bytes() == b""


def test_a_worker_that_outlives_its_killed_parent_does_not_hold_the_lock(tmp_path: Path) -> None:
    marker = tmp_path / "worker"

    def hold() -> None:
        RunLock(tmp_path).acquire()
        worker = os.fork()
        if worker == 0:
            time.sleep(60)
            os._exit(0)
        marker.write_text(str(worker))
        time.sleep(60)

    pid = in_child(hold)
    wait_until(lambda: marker.exists() and marker.read_text() != "")
    os.kill(pid, signal.SIGKILL)
    exit_code(pid)
    worker = int(marker.read_text())
    try:
        os.kill(worker, 0)  # the worker lives
        lock = RunLock(tmp_path)
        lock.acquire()
        lock.release()
    finally:
        os.kill(worker, signal.SIGKILL)


@pytest.fixture
def without_flock(monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", unsupported)


@pytest.mark.usefixtures("without_flock")
@pytest.mark.parametrize(
    ("change", "taken"),
    [
        ({}, True),
        ({"host": "elsewhere"}, True),
        ({"pid": 2**22 + 1}, False),
        ({"process_start": "another boot:1"}, False),
        ({"process_start": None}, True),
    ],
)
def test_without_flock_the_record_decides(
    tmp_path: Path, change: dict[str, Any], taken: bool
) -> None:
    first = RunLock(tmp_path)
    first.acquire()
    record = json.loads(first.path.read_text())
    assert record["process_start"] == run_lock.process_start(os.getpid())
    first.path.write_text(json.dumps({**record, **change}))
    second = RunLock(tmp_path)
    if taken:
        with pytest.raises(CheckpointError, match="RF8201"):
            second.acquire()
    else:
        second.acquire()
        second.release()
    first.release()
    second.acquire()
    second.release()


@pytest.mark.parametrize("content", [b"garbage", b"[1]", b'{"pid": "x"}'])
def test_a_garbage_lock_file_does_not_lock(tmp_path: Path, content: bytes) -> None:
    (tmp_path / LOCK_NAME).write_bytes(content)
    start(tmp_path)


def test_a_failed_start_gives_the_lock_back(tmp_path: Path) -> None:
    start(tmp_path)
    with pytest.raises(CheckpointError, match="RF8202"):
        start(tmp_path, config={"seed": 2})
    start(tmp_path)


# --- signals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "kind", "code"), [(signal.SIGTERM, Preempted, 75), (signal.SIGINT, Interrupted, 130)]
)
def test_a_signal_is_a_flag_until_the_safe_point(
    tmp_path: Path, number: signal.Signals, kind: type[RLHFError], code: int
) -> None:
    before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)}

    def train() -> None:
        with make(tmp_path) as run:
            run.raise_if_stopped(None)
            assert not run.should_stop()
            signal.raise_signal(number)
            signal.raise_signal(number)  # an echo of the first, as wrappers send it
            assert run.should_stop()
            run.raise_if_stopped(save(run, 7))

    with pytest.raises(kind) as caught:
        train()
    assert caught.value.exit_code == code
    assert "step-00000007" in str(caught.value)
    assert {n: signal.getsignal(n) for n in before} == before
    assert load(tmp_path / "checkpoints").step == 7


def test_a_signal_nobody_polled_still_stops_what_follows(tmp_path: Path) -> None:
    def finish() -> None:
        with make(tmp_path) as run:
            signal.raise_signal(signal.SIGTERM)
            run.mark_complete(1)

    with pytest.raises(Preempted):
        finish()
    with make(tmp_path) as run:
        assert run.already_complete


def test_a_real_error_is_not_hidden_by_a_signal(tmp_path: Path) -> None:
    def fail() -> None:
        with make(tmp_path):
            signal.raise_signal(signal.SIGTERM)
            raise KeyError("bug")

    with pytest.raises(KeyError):
        fail()


def test_off_the_main_thread(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    seen: list[Any] = []

    def work() -> None:
        with make(tmp_path) as run:
            seen.append((run.should_stop(), signal.getsignal(signal.SIGTERM)))
            save(run, 1)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(False, before)]


def train_slowly(path: Path, poll: bool) -> None:
    with make(path) as run:
        step = run.checkpoint.step if run.checkpoint else 0
        while True:
            time.sleep(0.01)
            step += 1
            if not poll:
                save(run, step)
            elif run.should_stop():
                run.raise_if_stopped(save(run, step))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_second_signal_leaves_at_once_with_a_good_checkpoint(
    tmp_path: Path, number: signal.Signals, code: int
) -> None:
    pid = in_child(lambda: train_slowly(tmp_path, poll=False))
    wait_until(lambda: len(steps(tmp_path / "checkpoints")) > 0)
    os.kill(pid, number)
    time.sleep(0.4)
    assert os.waitpid(pid, os.WNOHANG) == (0, 0), "the first signal only sets the flag"
    os.kill(pid, number)
    assert exit_code(pid) == code
    with make(tmp_path) as run:
        assert run.checkpoint is not None
        assert run.checkpoint.step > 1
        assert not [notice for notice in run.notices if "passed over" in notice]


def test_sigterm_to_a_real_process_ends_with_75_and_a_checkpoint(tmp_path: Path) -> None:
    script = """
        import sys, time, torch
        from rlhf_fast.errors import RLHFError
        from rlhf_fast.stages.run import Run
        try:
            with Run(sys.argv[1], stage="sft", config={}) as run:
                for step in range(10**6):
                    print("step", step, flush=True)
                    time.sleep(0.01)
                    if run.should_stop():
                        run.raise_if_stopped(
                            run.save(step, tensors={"a": {"w": torch.ones(3)}}, state=step))
        except RLHFError as error:
            print(error, file=sys.stderr)
            sys.exit(error.exit_code)
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script), str(tmp_path / "run")],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "step 0\n"
    process.terminate()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75
    assert "RF8301" in errors
    assert "Traceback" not in errors
    assert load(tmp_path / "run" / "checkpoints").tensors["a"]["w"].tolist() == [1.0] * 3


# --- progress and phases -----------------------------------------------------------------------


def test_phases_add_up_and_start_again(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(100))
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(clock)))
    timer = PhaseTimer()
    with timer.phase("generate"):
        pass
    with timer.phase("generate"), timer.phase("inner"):
        pass
    with contextlib.suppress(KeyError), timer.phase("train"):
        raise KeyError
    assert timer.take() == {"time/generate": 4.0, "time/inner": 1.0, "time/train": 1.0}
    assert timer.take() == {}


def test_a_run_times_its_saves(tmp_path: Path) -> None:
    with make(tmp_path) as run:
        save(run, 1)
        assert run.take_phase_times()["time/checkpoint"] > 0


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    now = [0.0]
    with monkeypatch.context() as patch:
        patch.setattr(progress_module.time, "monotonic", lambda: now[0])
        yield now


@pytest.mark.parametrize(("quiet", "count"), [(False, 2 + 9), (True, 2 + 1)])
def test_plain_lines_are_sparse(clock: list[float], quiet: bool, count: int) -> None:
    stream = io.StringIO()
    display = ProgressDisplay(quiet=quiet, stream=stream)
    with display.bar("sft", 99, start=0) as bar:
        for _ in range(99):
            clock[0] += 1.0
            bar.advance(1, loss=0.123456, text="\x1b[31mred\x1b[0m\n\x07")
    lines = stream.getvalue().splitlines()
    assert len(lines) == count
    assert lines[0] == "sft: 0/99 (0%)"
    assert lines[-1] == "sft: 99/99 (100%) loss=0.1235 text=red"


def test_a_terminal_gets_bars_and_markup_is_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    display = ProgressDisplay(stream=stream)
    with display.bar("[bold]outer[/nonsense]", 5) as bar:
        for item in display.track([1, 2], "inner", 2):
            bar.advance(item, note="[/red]")
        assert bar.completed == 3
    text = stream.getvalue()
    assert "[bold]outer[/nonsense]" in text
    assert "note=[/red]" in text
    assert "\x1b[" in text
    with display.bar("again") as bar:
        bar.advance()


def test_quiet_means_no_bars_on_a_terminal() -> None:
    stream = Terminal()
    display = ProgressDisplay(quiet=True, stream=stream)
    assert list(display.track(iter("ab"), "letters")) == ["a", "b"]
    assert stream.getvalue() == "letters: 0\nletters: 2\n"


def test_a_closed_pipe_does_not_end_training() -> None:
    stream = io.StringIO()
    stream.close()
    with ProgressDisplay(stream=stream).bar("x", 1) as bar:
        bar.advance()
    assert bar.completed == 1


def test_a_note_stands_beside_the_newest_bar_until_the_next(clock: list[float]) -> None:
    stream = io.StringIO()
    display = ProgressDisplay(stream=stream)
    display.note(lost=1)  # no bar is open
    with display.bar("ppo", 2) as bar:
        bar.advance(1, score=0.5)
        for running in range(5):
            clock[0] += 4.0
            display.note(**{"tok/s": 900, "running": running, "kv": "12%"})
        display.note()
        bar.advance(1, score=0.75)
    assert stream.getvalue().splitlines() == [
        "ppo: 0/2 (0%)",
        "ppo: 1/2 (50%) score=0.5 tok/s=900 running=2 kv=12%",
        "ppo: 2/2 (100%) score=0.75",
    ]
