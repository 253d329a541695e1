"""The demo's report from results: figures, samples, warnings, missing parts."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest

from rlhf_fast.config import PPOConfig, to_dict
from rlhf_fast.report import build_demo_report
from rlhf_fast.tasks.demo_results import DemoResults, Point, RewardModelFacts, SampleTriple
from tests.report.pages import Page, read

EVIL = '\x1b[31m<script>alert(1)</script>\x1b[0m & "quoted"'


def rows(steps: int) -> list[dict[str, float]]:
    return [
        {"step": i, "objective/scores": i / steps, "objective/kl": 0.1 * i, "rollout/length": 24.0}
        for i in range(1, steps + 1)
    ]


RESULTS = DemoResults(
    seed=7,
    quick=False,
    kl_coef=0.1,
    sft=Point(0.0, 0.0, 1.52, 0.03),
    best_of_n=tuple(
        Point(math.log(n) - (n - 1) / n, 0.4 * math.log(n), 1.52 + 0.28 * math.log(n), 0.02, n)
        for n in (1, 4, 16, 64)
    ),
    ppo=(Point(1.0, 0.9, 2.1, 0.03, 10), Point(2.7, 1.5, 2.63, 0.03, 40)),
    over_optimised=(Point(8.0, 1.9, 2.3, 0.03, 10), Point(80.0, 4.1, -0.4, 0.05, 50)),
    reward_model=RewardModelFacts(2500, 0.78, 0.74, 0.82, 0.77),
    samples=(SampleTriple("review of the soup :", EVIL, " good .", "great great", 1.0, 2.9, -1.0),),
    curves={
        "sft": [{"step": 10, "loss/train": 1.0}, {"step": 20, "loss/train": 0.8, "loss/eval": 1}],
        "reward_model": [
            {"step": 1, "loss/train": 0.7, "train/accuracy": 0.5},
            {"step": 2, "loss/train": 0.6, "train/accuracy": 0.7, "eval/accuracy_low": 0.6},
        ],
        "ppo": rows(40),
        "over_optimised": rows(50),
    },
    stage_seconds={"SFT": 20.0, "reward model": 15.0, "PPO": 45.0},
    phase_seconds={"generate": 10.0, "train": 30.0},
    environment={"torch": "2.13.0"},
    configs={"ppo": to_dict(PPOConfig(total_steps=41))},
    files={"policy": "demo/ppo/policy"},
)


def build(results: DemoResults, tmp_path: Path) -> Page:
    return read(build_demo_report(results, tmp_path / "report.html"))


def test_report_holds_every_part(tmp_path: Path) -> None:
    page = build(RESULTS, tmp_path)
    for part in (
        "PPO raised the gold score by 1.11", "2.63", "2.7 nats", "best-of-64", "-0.40", "seed 7",
        "below where it started", "PPO beta 0, proxy", "SFT: loss/train",
        "reward model: train/accuracy", "generate", "torch", "demo/ppo/policy",
        "total_steps", "80.0 s",
    ):  # fmt: skip
        assert part in page.text, part
    # 2 frontiers, 3 PPO curves, 3 training curves (a single value is none), 2 timings.
    assert page.count("svg") == 10


def test_the_page_survives_the_round_trip_of_its_data(tmp_path: Path) -> None:
    loaded = DemoResults.load(RESULTS.save(tmp_path))
    first = build_demo_report(RESULTS, tmp_path / "a.html").read_text("utf-8")
    assert build_demo_report(loaded, tmp_path / "b.html").read_text("utf-8") == first


def test_model_text_is_shown_but_never_live(tmp_path: Path) -> None:
    page = build(RESULTS, tmp_path)
    assert '<script>alert(1)</script> & "quoted" [1.00]' in page.cells
    assert "\x1b" not in page.text


def test_only_changed_settings_stand_in_the_open(tmp_path: Path) -> None:
    page = build(RESULTS, tmp_path)
    start = page.cells.index("default")
    default = str(PPOConfig().total_steps)
    assert page.cells[start + 2 : start + 5] == ["total_steps", default, "41"]
    assert page.cells[start + 5] == "setting"


def test_a_demo_that_failed_says_so(tmp_path: Path) -> None:
    failed = dataclasses.replace(RESULTS, ppo=(Point(2.7, 1.5, 1.9, 0.03, 40),))
    page = build(failed, tmp_path)
    assert "the demo failed" in page.text
    kinds = [attrs.get("class") for tag, attrs in page.tags if tag == "p"]
    assert "verdict bad" in kinds


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_missing_and_broken_parts_do_not_break_the_page(tmp_path: Path, broken: float) -> None:
    bare = DemoResults(
        seed=0,
        quick=True,
        kl_coef=0.1,
        sft=Point(0.0, broken, 1.0),
        best_of_n=(),
        ppo=(Point(1.0, broken, broken, broken, 1),),
        over_optimised=(),
        reward_model=RewardModelFacts(0, broken, broken, broken, broken),
        curves={"ppo": [{"step": 1, "objective/kl": None, "objective/scores": "nan"}]},
    )
    page = build(bare, tmp_path)
    assert "quick variant" in page.text
    assert "the demo failed" in page.text
