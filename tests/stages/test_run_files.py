"""Small files of a run directory that somebody has touched: nothing waits, none is read whole."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_fast import metrics, small_files
from rlhf_fast.distributed import load, save
from rlhf_fast.errors import CheckpointError, EnvironmentFault
from rlhf_fast.metrics import MetricLogger
from rlhf_fast.stages import run_files
from rlhf_fast.stages.finished import finished_result, finished_summary
from rlhf_fast.stages.reward_model import RewardModelResult
from rlhf_fast.stages.run import Run
from rlhf_fast.stages.run_files import MAX_JSON_BYTES, keep_samples, read_json
from rlhf_fast.stages.sft import SFTResult

LIMIT_SECONDS = 20


def pipe(path: Path) -> None:
    os.mkfifo(path)


def endless(path: Path) -> None:
    path.symlink_to("/dev/zero")


def huge(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(1 << 40)  # a hole: takes no room on the disk


def folder(path: Path) -> None:
    path.mkdir()


ODD = [pipe, endless, huge, folder]
Odd = Callable[[Path], None]


@pytest.fixture(autouse=True)
def nothing_waits() -> Iterator[None]:
    """A read that waits for ever fails, instead of the suite with it."""

    def ring(*_: Any) -> None:
        raise AssertionError("still waiting")

    former = signal.signal(signal.SIGALRM, ring)
    signal.alarm(LIMIT_SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, former)


def replace(path: Path, odd: Odd) -> None:
    path.unlink(missing_ok=True)
    odd(path)


@pytest.mark.parametrize("odd", ODD)
def test_a_pointer_that_is_no_small_file_is_ignored(tmp_path: Path, odd: Odd) -> None:
    save(tmp_path, 1, tensors={"actor": {"w": torch.ones(3)}}, state={}, keep_last=None)
    replace(tmp_path / "LATEST", odd)
    found = load(tmp_path)
    assert found.step == 1
    assert any("LATEST does not name a checkpoint" in notice for notice in found.notices)


def started(path: Path, *, complete: bool = False) -> Run:
    run = Run(path, stage="sft", config={"a": 1}, quiet=True)
    with run:
        run.save(3, tensors={"actor": {"w": torch.ones(3)}}, state={})
        if complete:
            run.mark_complete(3, {"loss": 0.5})
    return run


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("name", ["run.json", "complete.json"])
def test_a_record_that_is_no_small_file_is_refused(tmp_path: Path, name: str, odd: Odd) -> None:
    started(tmp_path, complete=True)
    replace(tmp_path / name, odd)
    with pytest.raises(CheckpointError, match=f"RF8206: {name} cannot be read") as caught:
        started(tmp_path)
    assert caught.value.where == str(tmp_path / name)


@pytest.mark.parametrize("odd", ODD)
def test_what_a_finished_run_says_is_read_as_carefully(tmp_path: Path, odd: Odd) -> None:
    run = started(tmp_path, complete=True)
    assert finished_summary(run) == {"loss": 0.5}
    replace(tmp_path / "complete.json", odd)
    with pytest.raises(CheckpointError, match="RF8206"):
        finished_summary(run)


@pytest.mark.parametrize("content", ['{"summary": 3}', "{}", "[]", "{"])
def test_a_finished_run_without_a_summary(tmp_path: Path, content: str) -> None:
    run = started(tmp_path, complete=True)
    (tmp_path / "complete.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"RF8206: complete\.json"):
        finished_summary(run)


def test_a_finished_run_of_another_release_is_named(tmp_path: Path) -> None:
    run = started(tmp_path, complete=True)
    with pytest.raises(CheckpointError, match=r"(?s)RF8206: complete\.json.*'loss'"):
        finished_result(run, SFTResult)


SUMMARY = {
    "output_dir": "/moved/from",
    "model_dir": "/moved/from/model",
    "steps": 3,
    "train_loss": 0.5,
    "reports": {"train": {}},
}


def finished(path: Path, **changes: Any) -> Run:
    run = started(path, complete=True)
    record = {"stage": "sft", "step": 3, "summary": SUMMARY | changes}
    (path / "complete.json").write_text(json.dumps(record))
    return run


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("steps", "3"),
        ("steps", 3.0),
        ("steps", True),
        ("train_loss", None),
        ("train_loss", [0.5]),
        ("train_loss", 10**400),
        ("eval_loss", "0.5"),
        ("output_dir", 7),
        ("reports", []),
    ],
)
def test_a_finished_run_with_values_of_another_kind(tmp_path: Path, name: str, value: Any) -> None:
    run = finished(tmp_path, **{name: value})
    with pytest.raises(CheckpointError, match=rf"(?s)RF8206: complete\.json.*summary\.{name} is"):
        finished_result(run, SFTResult)


def test_a_finished_run_with_half_of_its_figures(tmp_path: Path) -> None:
    held_out = {"accuracy": 0.7, "accuracy_low": None, "accuracy_high": None, "margin": 0.1}
    rest = {"eval_loss": 0.6, "eval_prompts": 3, "eval_pairs": 4, "near_chance": False}
    calibration = {"gain": 1.0, "bias": 0.0, "demonstrations": 9}
    run = finished(tmp_path, **held_out, **rest, **calibration)
    with pytest.raises(CheckpointError, match=r"RF8206: complete\.json.*NoneType"):
        finished_result(run, RewardModelResult)


def test_a_finished_run_that_was_moved_names_where_it_lies(tmp_path: Path) -> None:
    found = finished_result(finished(tmp_path, eval_loss=1, train_loss=float("nan")), SFTResult)
    assert (found.output_dir, found.model_dir) == (str(tmp_path), str(tmp_path / "model"))
    assert (found.steps, found.eval_loss) == (3, 1)


def test_the_bound_of_a_record_and_its_depth(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    text = json.dumps({"a": "x"})
    path.write_text(text + " " * (MAX_JSON_BYTES - len(text)))
    assert read_json(path) == {"a": "x"}
    path.write_text(text + " " * (MAX_JSON_BYTES - len(text) + 1))
    with pytest.raises(CheckpointError, match=f"larger than {MAX_JSON_BYTES} bytes"):
        read_json(path)
    for depth, message in ((100, "64 levels"), (100_000, "recursion")):
        path.write_text('{"a":' + "[" * depth + "]" * depth + "}")
        with pytest.raises(CheckpointError, match=message):
            read_json(path)
    assert read_json(tmp_path / "nothing") is None


def test_no_more_than_the_limit_is_taken_from_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    huge(tmp_path / "run.json")
    taken = []
    plain = os.fdopen

    class Counting:
        def __init__(self, file: Any) -> None:
            self.file = file

        def __enter__(self) -> Counting:
            return self

        def __exit__(self, *_: object) -> None:
            self.file.close()

        def read(self, count: int) -> bytes:
            taken.append(count)
            data: bytes = self.file.read(count)
            return data

    monkeypatch.setattr(small_files.os, "fdopen", lambda *a: Counting(plain(*a)))
    with pytest.raises(CheckpointError, match="RF8206"):
        read_json(tmp_path / "run.json")
    assert taken == [MAX_JSON_BYTES + 1]


def row(step: int, text: str = "w4") -> bytes:
    return json.dumps({"step": step, "response": text}).encode() + b"\n"


def test_samples_of_steps_to_come_and_of_nothing_are_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_files, "MAX_LINE_BYTES", 200)
    path = tmp_path / "samples.jsonl"
    keep_samples(path, 5)
    assert not path.exists()
    not_text = b'{"step": 2, "response": "\xff\xfe"}\n'
    odd = [b"[" * 150 + b"\n", b"[1]\n", b"7\n", b'{"step": "2"}\n', b"{}\n", b"\n"]
    long = [row(1, "x" * 190), row(1, "x" * 1000), row(1, "x" * 163), row(1, "x" * 164)]
    path.write_bytes(b"".join([row(1), not_text, *odd, *long, row(3), row(4), b'{"step": 3, "r']))
    keep_samples(path, 3)
    expected = [row(1), not_text.replace(b"\xff\xfe", "\ufffd\ufffd".encode())]
    kept = path.read_bytes()
    assert kept == b"".join([*expected, *(line for line in long if len(line) <= 200), row(3)])
    keep_samples(path, 3)
    assert path.read_bytes() == kept


@pytest.mark.parametrize("odd", [pipe, endless, folder])
def test_samples_that_are_no_file_are_refused(tmp_path: Path, odd: Odd) -> None:
    odd(tmp_path / "samples.jsonl")
    with pytest.raises(CheckpointError, match=r"RF8206: samples\.jsonl cannot be read"):
        keep_samples(tmp_path / "samples.jsonl", 3)


def test_samples_in_one_endless_line_are_dropped_piece_by_piece(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_files, "MAX_LINE_BYTES", 1 << 10)
    path = tmp_path / "samples.jsonl"
    with path.open("wb") as file:
        file.truncate(1 << 22)
    keep_samples(path, 3)
    assert path.read_bytes() == b""


@pytest.mark.parametrize("odd", [pipe, endless, folder])
def test_metrics_that_are_no_file_are_refused(tmp_path: Path, odd: Odd) -> None:
    odd(tmp_path / "metrics.jsonl")
    with pytest.raises(EnvironmentFault, match="RF7105"):
        MetricLogger(tmp_path)


@pytest.mark.parametrize("odd", [pipe, endless, huge])
def test_the_name_of_a_tracked_run_that_is_no_small_file(tmp_path: Path, odd: Odd) -> None:
    odd(tmp_path / "wandb_run_id")
    with pytest.raises(OSError, match=r"regular file|larger"):
        metrics._stable_id(tmp_path, resume_step=3)
    # A new start takes a new name, whatever lies there.
    fresh = metrics._stable_id(tmp_path, resume_step=None)
    assert metrics._stable_id(tmp_path, resume_step=3) == fresh
