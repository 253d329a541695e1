"""The report of a run directory from its files."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from rlhf_fast.config import PPOConfig, to_dict
from rlhf_fast.errors import CheckpointError
from rlhf_fast.report import build_report
from rlhf_fast.report.curves import column, keys, time_totals
from rlhf_fast.report.settings import changes
from tests.report.pages import Page, read


def write(path: Path, rows: list[dict[str, Any]], tail: str = "") -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + tail, "utf-8")


def metrics(steps: int = 20) -> list[dict[str, Any]]:
    return [
        {
            "step": step,
            "objective/kl": 0.1 * step,
            "objective/scores": "nan" if step == 3 else step / 10,
            "extra/<b>": 1.0,
            "time/generate": 0.5,
            "time/train": 1.5,
        }
        for step in range(1, steps + 1)
    ]


def build(run: Path) -> Page:
    return read(build_report(run, run / "report.html"))


def test_full_directory(tmp_path: Path) -> None:
    write(tmp_path / "metrics.jsonl", metrics())
    config = to_dict(PPOConfig(total_steps=33))
    (tmp_path / "run.json").write_text(json.dumps({"stage": "ppo", "config": config}))
    samples = [
        {"step": i, "prompt": "p", "response": f"\x1b[1m<i>{i}</i>", "score": 0.123456, "note": "n"}
        for i in range(30)
    ]
    samples[29]["score"] = None
    write(tmp_path / "samples.jsonl", samples)
    page = build(tmp_path)
    assert "20 rows of metrics, 40.0 s in timed phases" in page.text
    assert "extra/<b>" in page.cells
    assert "generate" in page.text
    # 2 headline charts, 1 other, 1 timing.
    assert page.count("svg") == 4
    # Newest sample first, the oldest of 30 not shown.
    responses = [cell for cell in page.cells if cell.startswith("<i>")]
    assert responses[0] == "<i>29</i>"
    assert len(responses) == 24
    assert page.cells[:5] == ["step", "prompt", "response", "score", "note"]
    assert page.cells[8] == ""
    assert "0.1235" in page.cells
    assert changes("ppo", config) == [("total_steps", str(PPOConfig().total_steps), "33")]
    assert "total_steps" in page.cells


def test_metrics_alone_are_enough_also_after_a_crash(tmp_path: Path) -> None:
    write(tmp_path / "metrics.jsonl", metrics(2), tail='{"step": 3, "obj')
    page = build(tmp_path)
    assert "2 rows of metrics" in page.text
    assert page.text.count("Settings") == page.text.count("Samples") == 0


def evaluation(run: Path) -> dict[str, Any]:
    """The files of an evaluation of 5 prompts with 2 samples each."""
    figures = {"score": (1.25, 0.125), "kl": (3.5, 0.5), "reward_function": (0.75, None)}
    row: dict[str, Any] = {"step": 0, "time/generate": 1.0}
    for name, (mean, error) in figures.items():
        row |= {f"eval/{name}": mean, f"eval/{name}_stderr": "nan" if error is None else error}
    write(run / "metrics.jsonl", [row])
    samples = [{"prompt": f"p{i // 2}", "response": f"r{i}", "score": 1.0} for i in range(10)]
    write(run / "samples.jsonl", samples)
    curve = {"n": 4.0, "kl": 0.636, "proxy": 2.0, "gold": 0.875, "gold_stderr": 0.0625}
    return {
        "samples_per_prompt": 2,
        "estimates": {
            name: {"mean": mean, "stderr": error, "prompts": 5}
            for name, (mean, error) in figures.items()
        },
        "best_of_n": [curve],
    }


def test_an_evaluation_shows_its_result(tmp_path: Path) -> None:
    (tmp_path / "eval.json").write_text(json.dumps(evaluation(tmp_path)))
    page = build(tmp_path)
    for caption in ("1.25eval/score, +- 0.125", "3.5eval/kl, +- 0.5", "0.75eval/reward_function"):
        assert caption in page.text
    assert page.cells[:8] == [
        *("figure", "mean", "standard error", "prompts"),
        *("score", "1.25", "0.125", "5"),
    ]
    at = page.cells.index("gold_stderr")
    assert page.cells[at - 4 : at + 6] == [
        *("n", "kl", "proxy", "gold", "gold_stderr"),
        *("4", "0.636", "2", "0.875", "0.0625"),
    ]
    assert "judges" in page.text
    # No curves of one point: the only picture is the timing.
    assert page.count("svg") == 1
    assert [cell for cell in page.cells if re.fullmatch(r"r\d", cell)] == [
        *("r0", "r2", "r4", "r6", "r8"),
    ]


def test_an_evaluation_without_best_of_n_or_with_one_judge(tmp_path: Path) -> None:
    tree = evaluation(tmp_path)
    tree["best_of_n"] = [{"n": 2.0, "kl": 0.2, "reward_model": 1.0, "reward_model_stderr": None}]
    (tmp_path / "eval.json").write_text(json.dumps(tree))
    page = build(tmp_path)
    assert "Best of n" in page.text
    assert "gold" not in page.text
    (tmp_path / "eval.json").write_text(json.dumps(tree | {"best_of_n": []}))
    assert "Best of n" not in build(tmp_path).text


def test_a_run_that_has_logged_nothing_yet_gives_a_page(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("")
    assert "0 rows of metrics" in build(tmp_path).text


def test_config_yaml_is_read_where_there_is_no_run_json(tmp_path: Path) -> None:
    write(tmp_path / "metrics.jsonl", metrics(2))
    (tmp_path / "config.yaml").write_text("kl:\n  coef: 0.5\n")
    cells = build(tmp_path).cells
    assert cells[cells.index("kl.coef") + 2] == "0.5"


def test_other_directories_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="RF8901"):
        build_report(tmp_path, tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("metrics.jsonl", "{}\nnot json\n{}\n"),
        ("metrics.jsonl", '{"a": ' + "[" * 100_000 + "\n"),
        ("run.json", "{"),
        ("run.json", "[]"),
        ("config.yaml", "a: [1"),
        ("samples.jsonl", "{}\n[1]\n"),
        ("eval.json", "[]"),
        ("eval.json", '{"estimates": {"kl": {"mean": "a lot"}}, "samples_per_prompt": 1}'),
        (
            "eval.json",
            '{"estimates": {"kl": {"mean": 1' + "0" * 400 + '}}, "samples_per_prompt": 1}',
        ),
        ("eval.json", '{"estimates": {}, "samples_per_prompt": 0}'),
    ],
)
def test_broken_files_are_named(tmp_path: Path, name: str, text: str) -> None:
    write(tmp_path / "metrics.jsonl", metrics(2))
    (tmp_path / name).write_text(text)
    with pytest.raises(CheckpointError, match="RF8902") as caught:
        build_report(tmp_path, tmp_path / "report.html")
    assert caught.value.where == str(tmp_path / name)


@pytest.mark.parametrize("value", ["1e308", "-1e308", "1" + "0" * 400])
def test_numbers_too_large_to_draw_are_left_out(tmp_path: Path, value: str) -> None:
    rows = ["1", value, "-1e308", "2"]
    lines = [f'{{"step": {i}, "loss/train": {text}}}\n' for i, text in enumerate(rows, 1)]
    (tmp_path / "metrics.jsonl").write_text("".join(lines), "utf-8")
    build(tmp_path)


def test_rows_without_steps_are_counted_on() -> None:
    rows = [{"loss": 1.0}, {"step": 5, "loss": 2.0}, {"loss": 3.0}, {"other": 1.0}, {"loss": 4.0}]
    assert column(rows, "loss") == [(1.0, 1.0), (5.0, 2.0), (6.0, 3.0), (8.0, 4.0)]


def test_keys_and_times() -> None:
    rows = [{"step": 1, "a": "text", "b": 2, "time/x": 1.0}, {"c": None, "time/y": 3, "time/x": 1}]
    assert keys(rows) == ["b", "time/x", "time/y"]
    assert time_totals(rows) == {"y": 3.0, "x": 2.0}
    assert list(time_totals(rows)) == ["y", "x"]
