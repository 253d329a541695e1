"""NaN and Inf never reach a weight: skipped and counted, and an abort that keeps the run."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from rlhf_fast.distributed import load
from rlhf_fast.metrics import read_metrics
from rlhf_fast.optim import GuardedOptimizer, StepResult
from tests.robustness.workshop import Workshop, require_refused
from tests.stages.tiny_runs import exported

Poison = Callable[[list[int]], None]


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> Poison:
    """`poison([2])` puts NaN into one gradient of the 2nd optimizer step; weights must not move."""

    def install(which: list[int]) -> None:
        original: Any = GuardedOptimizer.step
        seen = {"steps": 0}

        def step(optimizer: GuardedOptimizer) -> StepResult:
            seen["steps"] += 1
            if seen["steps"] not in which:
                return original(optimizer)
            parameters: list[nn.Parameter] = list(optimizer.parameters)
            assert parameters[-1].grad is not None
            parameters[-1].grad.view(-1)[0] = math.nan
            before = [p.detach().clone() for p in parameters]
            moments = {k: v.clone() for k, v in _moments(optimizer).items()}
            try:
                result: StepResult = original(optimizer)
                assert not result.applied
            finally:
                assert all(torch.equal(a, b) for a, b in zip(parameters, before, strict=True))
                after = _moments(optimizer)
                assert after.keys() == moments.keys()
                assert all(torch.equal(after[k], moments[k]) for k in moments)
            return result

        monkeypatch.setattr(GuardedOptimizer, "step", step)

    return install


def _moments(optimizer: GuardedOptimizer) -> dict[str, torch.Tensor]:
    state = optimizer.optimizer.state
    return {
        f"{index}.{key}": value
        for index, parameter in enumerate(optimizer.parameters)
        for key, value in state.get(parameter, {}).items()
    }


@pytest.mark.parametrize("stage", ["sft", "rm"])
def test_one_bad_step_is_skipped_and_counted(
    stage: str, workshop: Workshop, poison: Poison
) -> None:
    poison([2])
    outcome = workshop.run(stage, "max_steps=3")
    assert outcome.code == 0, outcome.err
    rows = read_metrics(workshop.out / "metrics.jsonl")
    assert [row["skipped_steps"] for row in rows] == [0, 1, 0]
    assert math.isnan(rows[1]["grad_norm"])
    assert all(bool(t.isfinite().all()) for t in exported(workshop.out).values())


@pytest.mark.parametrize(("which", "policy", "value"), [(3, 1, 0), (4, 0, 1)])
def test_one_bad_step_of_ppo_is_skipped_and_counted(
    which: int, policy: int, value: int, workshop: Workshop, poison: Poison
) -> None:
    poison([which])  # actor and critic take turns
    outcome = workshop.run("ppo", "total_steps=3")
    assert outcome.code == 0, outcome.err
    rows = read_metrics(workshop.out / "metrics.jsonl")
    assert [row["policy/skipped_steps"] for row in rows] == [0, policy, 0]
    assert [row["value/skipped_steps"] for row in rows] == [0, value, 0]
    assert all(bool(t.isfinite().all()) for t in exported(workshop.out).values())


def test_bad_steps_in_a_row_abort_and_keep_the_last_good_checkpoint(
    workshop: Workshop, poison: Poison, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison([3, 4, 5])
    outcome = workshop.run("sft", "max_steps=6")
    require_refused(outcome, "RF6001", 4, "3 steps in a row", "learning rate")
    assert not (workshop.out / "model").exists()
    kept = load(workshop.out / "checkpoints")
    assert kept.step == 4
    weights = kept.tensors["actor"]
    assert all(bool(weights[name].isfinite().all()) for name in weights)
    monkeypatch.undo()
    assert workshop.run("sft", "max_steps=6").code == 0


def test_the_count_of_bad_steps_survives_a_resume(
    workshop: Workshop, poison: Poison, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison([2, 3])
    outcome = workshop.run("sft", "max_steps=3")
    assert outcome.code == 0, outcome.err
    monkeypatch.undo()
    poison([1])
    require_refused(workshop.run("sft", "max_steps=5"), "RF6001", 4, "3 steps in a row")


def test_rewards_that_overflow_end_in_one_message(workshop: Workshop) -> None:
    text = "def score(completions, **_):\n    return [1e30, -1e30, 1e29, 2e30]\n"
    function = f"reward.function={workshop.write('reward.py', text)}:score"
    unguarded = ("reward.model=", "reward.normalize=false", "reward.clip=0", "total_steps=6")
    outcome = workshop.run("ppo", function, *unguarded)
    require_refused(outcome, "RF6001", 4, "critic", "rewards")
    actor = load(workshop.out / "checkpoints").tensors["actor"]
    assert all(bool(actor[name].isfinite().all()) for name in actor)


def test_weights_that_diverge_are_not_exported(workshop: Workshop) -> None:
    outcome = workshop.run("ppo", "actor_optim.lr=1e20", "actor_optim.max_grad_norm=0")
    require_refused(outcome, "RF4010", 4, "prompt", "float32")
    assert not (workshop.out / "model").exists()
