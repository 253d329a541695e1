"""Results of the demo as data: round trip, verdict, sentences."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest

from rlhf_fast.errors import DataError
from rlhf_fast.tasks.demo_results import (
    DEMO_RESULTS_NAME,
    DemoResults,
    Point,
    RewardModelFacts,
    SampleTriple,
    findings,
    interpolated_gold,
)

RESULTS = DemoResults(
    seed=0,
    quick=False,
    kl_coef=0.1,
    sft=Point(0.0, 0.0, 1.5),
    best_of_n=(Point(0.0, 0.0, 1.5, step=1), Point(4.0, 1.6, 2.7, step=64)),
    ppo=(Point(1.0, 1.0, 2.0, step=10), Point(2.25, 1.5, 2.6, 0.03, step=40)),
    over_optimised=(Point(20.0, 2.5, 2.1, step=20), Point(80.0, 4.0, -0.2, step=40)),
    reward_model=RewardModelFacts(4000, 0.78, 0.74, 0.82, 0.77),
    samples=(SampleTriple("p", "a", "b", "c", 1.0, 2.0, -1.0),),
    curves={"ppo": [{"step": 1, "objective/kl": 0.1}]},
    configs={"ppo": {"kl": {"coef": 0.1}}},
)


def test_results_come_back_from_disk(tmp_path: Path) -> None:
    path = RESULTS.save(tmp_path)
    assert path.name == DEMO_RESULTS_NAME
    assert DemoResults.load(path) == RESULTS
    assert [entry.name for entry in tmp_path.iterdir()] == [DEMO_RESULTS_NAME]


def test_numbers_that_are_not_finite_are_null_in_the_file(tmp_path: Path) -> None:
    broken = dataclasses.replace(
        RESULTS, sft=Point(0.0, math.nan, 1.0), curves={"ppo": [{"loss": math.inf}]}
    )
    path = broken.save(tmp_path)
    json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} in the file"))
    loaded = DemoResults.load(path)
    assert math.isnan(loaded.sft.proxy)
    assert loaded.curves["ppo"] == [{"loss": None}]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"seed": "x"}', '{"unknown": 1}'])
def test_other_files_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(DataError, match="RF2921"):
        DemoResults.load(path)
    with pytest.raises(DataError, match="RF2921"):
        DemoResults.load(tmp_path / "missing.json")


@pytest.mark.parametrize(
    ("gold", "verdict"), [(2.31, True), (2.29, False), (math.nan, False), (math.inf, False)]
)
def test_verdict_needs_the_required_rise_at_the_last_point(gold: float, verdict: bool) -> None:
    results = dataclasses.replace(RESULTS, ppo=(Point(1.0, 1.0, 9.0), Point(2.0, 1.0, gold)))
    assert results.succeeded is verdict


def test_interpolation_is_linear_in_the_root_of_kl() -> None:
    assert interpolated_gold(RESULTS.best_of_n, 1.0) == pytest.approx(2.1)
    assert interpolated_gold(RESULTS.best_of_n, 4.0) == pytest.approx(2.7)
    assert math.isnan(interpolated_gold(RESULTS.best_of_n, 4.1))
    assert math.isnan(interpolated_gold((), 1.0))


def test_findings_name_rise_cost_comparison_and_collapse() -> None:
    text = " ".join(findings(RESULTS))
    for part in ("1.50", "2.60", "+1.10", "2.2 nats", "Best-of-64", "2.40", "78%", "below where"):
        assert part in text, part
    tame = dataclasses.replace(RESULTS, over_optimised=(Point(3.0, 2.0, 2.5),), best_of_n=())
    text = " ".join(findings(tame))
    assert "below where" not in text
    assert "Best-of" not in text
