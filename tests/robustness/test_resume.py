"""A PPO run that was stopped, damaged or changed: resumed exactly, or refused with the reason."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rlhf_fast.distributed import load, steps
from rlhf_fast.stages.run_lock import RunLock
from tests.robustness.workshop import Outcome, Workshop, digest, require_refused
from tests.stages.tiny_runs import checkpoint_contents, metric_lines

# Sends itself a signal in the second rollout, once.
SIGNALLING = """
import os, pathlib
calls = 0
def score(completions, **columns):
    global calls
    calls += 1
    order = pathlib.Path(__file__).with_name("signal")
    if calls == 2 and order.exists():
        number = int(order.read_text())
        order.unlink()
        os.kill(os.getpid(), number)
    return [float(len(text)) for text in completions]
"""


def ppo(w: Workshop, *changes: str) -> Outcome:
    function = f"reward.function={w.path}/reward.py:score"
    return w.run("ppo", function, "kl.adaptive=true", "total_steps=4", *changes)


@pytest.fixture
def stopped(workshop: Workshop) -> Workshop:
    """A run of four steps that SIGTERM stopped after the second."""
    workshop.write("reward.py", SIGNALLING)
    workshop.write("signal", "15")
    assert ppo(workshop).code == 75
    return workshop


def whole(w: Workshop) -> Path:
    """The same run without any stop, elsewhere."""
    out = w.path / "whole"
    assert ppo(w, f"run.output_dir={out}").code == 0
    return out


def assert_equal_runs(out: Path, want: Path) -> None:
    assert metric_lines(out) == metric_lines(want)
    tensors, state = checkpoint_contents(out)
    expected, expected_state = checkpoint_contents(want)
    assert state == expected_state
    for name in ("model", "critic"):
        tensors[name] = load_file(out / name / "model.safetensors")
        expected[name] = load_file(want / name / "model.safetensors")
    for file, group in expected.items():
        for name, tensor in group.items():
            assert torch.equal(tensor, tensors[file][name]), f"{file}/{name}"
    assert (out / "samples.jsonl").read_bytes() == (want / "samples.jsonl").read_bytes()


@pytest.mark.parametrize(("number", "code", "exit_code"), [(15, "RF8301", 75), (2, "RF8302", 130)])
def test_a_signal_stops_with_a_good_checkpoint(
    number: int, code: str, exit_code: int, workshop: Workshop
) -> None:
    workshop.write("reward.py", SIGNALLING)
    workshop.write("signal", str(number))
    outcome = ppo(workshop)
    require_refused(outcome, code, exit_code, "step-00000002", "same command again")
    assert load(workshop.out / "checkpoints").step == 2
    assert not (workshop.out / "model").exists()
    assert ppo(workshop).code == 0
    assert_equal_runs(workshop.out, whole(workshop))


def test_a_finished_run_says_so_and_stays_as_it_is(workshop: Workshop) -> None:
    first = ppo(workshop)
    before = digest(workshop.out)
    again = ppo(workshop)
    assert again.code == 0
    assert "already complete after 4 steps" in again.err
    assert again.out.splitlines()[-2:] == first.out.splitlines()[-2:]
    assert digest(workshop.out) == before


@pytest.mark.parametrize(
    ("change", "shown"),
    [
        ("run.seed=7", "run.seed: 1 -> 7 (hard)"),
        ("kl.coef=0.3", "kl.coef: 0.05 -> 0.3 (hard)"),
        ("rollout.samples_per_prompt=2", "rollout.samples_per_prompt: 1 -> 2 (hard)"),
    ],
)
def test_a_changed_hard_key_is_refused_with_the_difference(
    change: str, shown: str, stopped: Workshop
) -> None:
    before = digest(stopped.out)
    require_refused(ppo(stopped, change), "RF8202", 2, shown, "run.overwrite=true")
    assert digest(stopped.out) == before


def test_a_changed_soft_key_is_applied_and_said(stopped: Workshop) -> None:
    outcome = ppo(stopped, "total_steps=3")
    assert outcome.code == 0
    assert "total_steps: 4 -> 3 (soft)" in outcome.err
    assert json.loads((stopped.out / "complete.json").read_text())["step"] == 3


def test_changed_data_is_refused_unless_allowed(stopped: Workshop) -> None:
    file = stopped.path / "prompts.jsonl"
    file.write_text(file.read_text() + '{"prompt": "w9"}\n', encoding="utf-8")
    before = digest(stopped.out)
    words = ("12 examples then, 13 now", "run.allow_data_change=true")
    require_refused(ppo(stopped), "RF2062", 2, *words)
    assert digest(stopped.out) == before
    assert ppo(stopped, "run.allow_data_change=true").code == 0


def test_a_live_run_keeps_its_directory(stopped: Workshop) -> None:
    lock = RunLock(stopped.out)
    lock.acquire()
    try:
        outcome = ppo(stopped)
    finally:
        lock.release()
    require_refused(outcome, "RF8201", 2, f"pid {os.getpid()}", "another output_dir")
    assert steps(stopped.out / "checkpoints") == [1, 2]


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda step: flip(step / "actor.safetensors"), id="flipped-bit"),
        pytest.param(lambda step: flip(step / "state.json"), id="flipped-state"),
        pytest.param(lambda step: (step / "manifest.json").unlink(), id="no-manifest"),
        pytest.param(lambda step: (step / "critic.safetensors").unlink(), id="missing-file"),
    ],
)
def test_a_damaged_checkpoint_is_passed_over_with_a_notice(damage: Any, stopped: Workshop) -> None:
    newest = stopped.out / "checkpoints" / "step-00000002"
    damage(newest)
    require_refused(ppo(stopped, "run.resume_step=2"), "RF8001", 2, str(newest))
    outcome = ppo(stopped)
    assert outcome.code == 0
    assert "passed over a checkpoint" in outcome.err
    assert "using step-00000001 instead" in outcome.err
    assert_equal_runs(stopped.out, whole(stopped))


def test_garbage_in_latest_changes_nothing(stopped: Workshop) -> None:
    (stopped.out / "checkpoints" / "LATEST").write_bytes(b"\xff../../x")
    outcome = ppo(stopped)
    assert outcome.code == 0
    assert "was ignored" in outcome.err
    assert_equal_runs(stopped.out, whole(stopped))


def test_all_checkpoints_damaged_is_no_fresh_start(stopped: Workshop) -> None:
    for step in (stopped.out / "checkpoints").glob("step-*"):
        flip(step / "actor.safetensors")
    before = digest(stopped.out)
    require_refused(ppo(stopped), "RF8001", 2, "none of the 2 checkpoints", "run.overwrite=true")
    assert digest(stopped.out) == before


def test_going_back_to_a_step_gives_the_same_run(stopped: Workshop) -> None:
    assert ppo(stopped, "run.resume_step=1").code == 0
    assert_equal_runs(stopped.out, whole(stopped))


def test_a_step_that_is_not_there_lists_those_that_are(stopped: Workshop) -> None:
    require_refused(ppo(stopped, "run.resume_step=9"), "RF8003", 2, "step 9", "1, 2")


def test_resume_always_and_never_insist(stopped: Workshop) -> None:
    elsewhere = f"run.output_dir={stopped.path}/elsewhere"
    require_refused(ppo(stopped, "run.resume=always", elsewhere), "RF8204", 2, "elsewhere")
    require_refused(ppo(stopped, "run.resume=never"), "RF8203", 2, "run.overwrite=true")


def test_results_of_nobody_knows_whom_are_not_touched(workshop: Workshop) -> None:
    (workshop.out / "model").mkdir(parents=True)
    (workshop.out / "model" / "precious").write_text("weights")
    require_refused(ppo(workshop), "RF8203", 2, "model")
    require_refused(ppo(workshop, "run.overwrite=true"), "RF8203", 2, "model")
    assert (workshop.out / "model" / "precious").read_text() == "weights"


def test_a_torn_line_of_samples_is_dropped(stopped: Workshop) -> None:
    with (stopped.out / "samples.jsonl").open("ab") as file:
        file.write(b'{"step": 3, "prompt": "w4", "resp')
    assert ppo(stopped).code == 0
    assert_equal_runs(stopped.out, whole(stopped))
