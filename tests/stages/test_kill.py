"""kill -9 at a random instant: the same command again ends in the same bytes."""

from __future__ import annotations

import multiprocessing
import random
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch

from tests.stages.killed_runs import pipeline
from tests.stages.tiny_runs import (
    checkpoint_contents,
    demonstrations,
    exported,
    metric_lines,
    model_directory,
    ranked,
    write_rows,
)

RUNS = 20
STAGES = ("sft", "rm")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kill")
    model_directory(folder / "base")
    write_rows(folder / "train.jsonl", demonstrations(40))
    write_rows(folder / "ranked.jsonl", ranked(30, 3))
    return folder


def start(base: Path, out: Path) -> BaseProcess:
    # A fork server imports torch and transformers once; forking this process would copy its
    # thread pools in whatever state they are.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.stages.killed_runs"])
    process = context.Process(target=pipeline, args=(str(base), str(out)))
    process.start()
    return process


def finish(process: BaseProcess) -> None:
    process.join(120)
    assert process.exitcode == 0


def assert_same_bytes(out: Path, want: Path) -> None:
    for stage in STAGES:
        assert metric_lines(out / stage) == metric_lines(want / stage)
        tensors, state = checkpoint_contents(out / stage)
        expected, expected_state = checkpoint_contents(want / stage)
        assert state == expected_state
        files = {**tensors, "export": exported(out / stage)}
        for file, group in {**expected, "export": exported(want / stage)}.items():
            assert group.keys() == files[file].keys()
            for name, tensor in group.items():
                assert torch.equal(tensor, files[file][name]), f"{stage}: {file}/{name}"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_killed_runs_resume_to_the_bit(base: Path, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    finish(start(base, tmp_path / "warm-up"))
    begin = time.perf_counter()
    finish(start(base, whole))
    duration = time.perf_counter() - begin
    draw, killed = random.Random(0), 0
    for run in range(RUNS):
        out = tmp_path / str(run)
        victim = start(base, out)
        time.sleep(draw.uniform(0.02, 1.0) * duration)
        victim.kill()
        victim.join()
        killed += victim.exitcode == -9
        finish(start(base, out))
        assert_same_bytes(out, whole)
    assert killed >= RUNS // 2
