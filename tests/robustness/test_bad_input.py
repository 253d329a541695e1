"""A user's mistake is one message with code, place and remedy, and it costs nothing.

Every case runs through the command line twice: the stage itself, and `check`, which must say the
same without writing anything.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from tests.robustness.mistakes import Case
from tests.robustness.mistakes_models import ALL_CASES
from tests.robustness.workshop import Workshop, digest, require_refused


def _each(check_only: bool = False) -> list[Any]:
    chosen = [c for c in ALL_CASES if c.check or not check_only]
    return [pytest.param(c, id=c.damage.__name__) for c in chosen]


def _left_behind(out: Path) -> list[str]:
    """Everything in an output directory but the lock file."""
    return [p.name for p in out.iterdir() if p.name != "run.lock"] if out.exists() else []


@pytest.mark.parametrize("c", _each())
def test_refused_before_any_work(c: Case, workshop: Workshop) -> None:
    changes = c.damage(workshop)
    outcome = workshop.run(c.stage, *changes)
    require_refused(outcome, c.code, c.exit_code, *c.words)
    # Mending the input must be enough: no trace of the attempt stands in the way of the next.
    assert _left_behind(workshop.out) == []
    assert not (workshop.path / "harm").exists()


@pytest.mark.parametrize("c", _each(check_only=True))
def test_check_says_the_same(c: Case, workshop: Workshop) -> None:
    changes = c.damage(workshop)
    before = digest(workshop.path)
    outcome = workshop.call("check", c.stage, *workshop.arguments(c.stage, *changes))
    require_refused(outcome, c.code, c.exit_code, *c.words)
    assert digest(workshop.path) == before
    assert not workshop.out.exists()


@pytest.mark.parametrize("stage", ["sft", "rm", "ppo", "eval"])
def test_check_of_sound_input_passes_and_writes_nothing(stage: str, workshop: Workshop) -> None:
    before = digest(workshop.path)
    outcome = workshop.call("check", stage, *workshop.arguments(stage))
    assert outcome.code == 0, outcome.err
    assert "check passed" in outcome.out
    assert digest(workshop.path) == before
    assert not workshop.out.exists()


@pytest.mark.parametrize("stage", ["sft", "rm", "eval", "ppo"])
def test_an_earlier_run_survives_a_mistake(stage: str, workshop: Workshop) -> None:
    assert workshop.run(stage).code == 0
    before = digest(workshop.out)
    key = "data.eval" if stage == "eval" else "data.train"
    mistake = f"{key}={workshop.path}/nowhere.jsonl"
    refused = workshop.run(stage, mistake)
    assert refused.code == 2
    assert refused.message
    assert digest(workshop.out) == before
    # Not even the wish to discard it counts before the new run can start.
    require_refused(workshop.run(stage, mistake, "run.overwrite=true"), "RF2001", 2, "nowhere")
    assert digest(workshop.out) == before
    assert workshop.run(stage, "run.overwrite=true").code == 0


@pytest.mark.parametrize("what", ["model", "data"])
def test_a_hub_name_that_is_not_cached_fails_at_once(what: str, workshop: Workshop) -> None:
    name = "no-such-owner/no-such-name"
    begin = time.monotonic()
    outcome = workshop.run("sft", f"model={name}" if what == "model" else f"data.train={name}")
    assert time.monotonic() - begin < 5
    require_refused(outcome, "RF3010" if what == "model" else "RF2014", outcome.code, name)
    assert outcome.code in (2, 3)


def test_a_mended_input_needs_nothing_but_the_same_command(workshop: Workshop) -> None:
    good = (workshop.path / "demonstrations.jsonl").read_bytes()
    workshop.write("demonstrations.jsonl", b'{"prompt": 1}\n')
    assert workshop.run("sft").code == 2
    workshop.write("demonstrations.jsonl", good)
    assert workshop.run("sft").code == 0
    assert json.loads((workshop.out / "complete.json").read_text())["step"] == 2


def test_an_empty_override_unsets_what_a_file_sets(workshop: Workshop) -> None:
    text = f"reference: {workshop.path}/nowhere\nsampling:\n  stop: [w5]\n"
    file = workshop.write("config.yaml", text)
    arguments = workshop.arguments("ppo", "reference=", "sampling.stop=")
    outcome = workshop.call("ppo", *arguments, "--config", str(file), "--print-config")
    assert "reference: ''" in outcome.out
    assert "stop: []" in outcome.out
