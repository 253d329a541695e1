"""kill -9 at a random instant: the same command again ends in the same bytes."""

from __future__ import annotations

import json
import multiprocessing
import random
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.stages.killed_runs import STAGES, pipeline
from tests.stages.tiny_runs import (
    checkpoint_contents,
    demonstrations,
    metric_lines,
    model_directory,
    ranked,
    write_rows,
)

TIMED = 12  # at an instant of the clock
CALLED = 8  # inside an fsync, a rename or a removal: in a checkpoint, an export, a run record


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kill")
    model_directory(folder / "base")
    rows = demonstrations(40)
    write_rows(folder / "train.jsonl", rows)
    write_rows(folder / "ranked.jsonl", ranked(30, 3))
    write_rows(folder / "prompts.jsonl", [{"prompt": row["prompt"]} for row in rows])
    return folder


def start(base: Path, out: Path, dies_at: int = 0, counted: str = "") -> BaseProcess:
    # A fork server imports torch and transformers once; forking this process would copy its
    # thread pools in whatever state they are.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.stages.killed_runs"])
    process = context.Process(target=pipeline, args=(str(base), str(out), dies_at, counted))
    process.start()
    return process


def finish(process: BaseProcess) -> None:
    process.join(120)
    assert process.exitcode == 0


def exports(run: Path) -> dict[str, dict[str, torch.Tensor]]:
    return {str(file.relative_to(run)): load_file(file) for file in run.glob("*/model.safetensors")}


def assert_same_bytes(out: Path, want: Path) -> None:
    """Weights, optimizer tensors, plain state, metrics and samples of every stage."""
    for stage in STAGES:
        assert metric_lines(out / stage) == metric_lines(want / stage)
        tensors, state = checkpoint_contents(out / stage)
        expected, expected_state = checkpoint_contents(want / stage)
        assert state == expected_state
        found, wanted = tensors | exports(out / stage), expected | exports(want / stage)
        assert found.keys() == wanted.keys()
        for file, group in wanted.items():
            assert group.keys() == found[file].keys()
            for name, tensor in group.items():
                assert torch.equal(tensor, found[file][name]), f"{stage}: {file}/{name}"
    samples = (out / "ppo" / "samples.jsonl").read_bytes()
    assert samples == (want / "ppo" / "samples.jsonl").read_bytes()


def stage_reached(out: Path) -> str:
    """The stage a dead pipeline was in: the first that has not finished."""
    left = [stage for stage in STAGES if not (out / stage / "complete.json").exists()]
    return left[0] if left else "finished"


def test_the_pipeline_has_the_state_it_should(base: Path, tmp_path: Path) -> None:
    finish(start(base, tmp_path))
    tensors, state = checkpoint_contents(tmp_path / "ppo")
    assert tensors.keys() >= {"actor", "critic", "actor_optimizer", "critic_optimizer", "rng"}
    assert state["samplers"].keys() == {"prompts", "pretraining"}
    assert state["extra"]["score_moments"]["count"] == 5 * 12
    coefficients = [row["kl_coef"] for row in metric_lines(tmp_path / "ppo")]
    assert len(set(coefficients)) == 5
    assert exports(tmp_path / "ppo").keys() == {
        "model/model.safetensors",
        "critic/model.safetensors",
    }
    samples = (tmp_path / "ppo" / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["step"] for line in samples] == sorted([1, 2, 3, 4, 5] * 4)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_killed_runs_resume_to_the_bit(base: Path, tmp_path: Path) -> None:
    whole, counted = tmp_path / "whole", tmp_path / "calls"
    finish(start(base, tmp_path / "warm-up"))
    begin = time.perf_counter()
    finish(start(base, whole, counted=str(counted)))
    duration = time.perf_counter() - begin
    calls = int(counted.read_text(encoding="ascii"))
    draw, deaths = random.Random(0), []
    for run in range(TIMED + CALLED):
        out = tmp_path / str(run)
        # One death in each part of the run, so that every stage has its share.
        if run < TIMED:
            victim = start(base, out)
            time.sleep((run + draw.random()) / TIMED * duration)
            victim.kill()
        else:
            part = (run - TIMED + draw.random()) / CALLED
            victim = start(base, out, dies_at=1 + int(part * calls))
        victim.join()
        if victim.exitcode == -9:
            deaths.append(stage_reached(out))
        finish(start(base, out))
        assert_same_bytes(out, whole)
    assert len(deaths) >= CALLED + TIMED // 2
    assert set(STAGES) <= set(deaths)
