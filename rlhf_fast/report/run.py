"""The report of any run directory: curves, timing, samples and settings, from its files alone."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from rlhf_fast.errors import CheckpointError
from rlhf_fast.metrics import METRICS_NAME, Number, read_metrics
from rlhf_fast.report import html
from rlhf_fast.report.curves import Rows, column, keys, metric_chart, time_totals
from rlhf_fast.report.evaluation import EVAL_NAME, one_sample_each, read_evaluation, result_part
from rlhf_fast.report.plots import bar_chart, number_text, seconds_text
from rlhf_fast.report.settings import config_part

SAMPLES_NAME = "samples.jsonl"
RUN_NAME = "run.json"
CONFIG_NAME = "config.yaml"

#: Metrics shown first, where a run has them; the others follow, folded, by their prefix.
HEADLINES = (
    "eval/score", "eval/kl", "eval/reward_function",
    "objective/scores", "objective/kl", "objective/rlhf_reward", "objective/entropy",
    "rollout/length", "rollout/ended_fraction", "policy/clipfrac_avg", "policy/approxkl_avg",
    "val/explained_variance", "loss/policy_avg", "loss/value_avg", "rollout/logprob_gap",
    "loss/train", "loss/eval", "train/accuracy", "eval/accuracy", "lr",
)  # fmt: skip
_SAMPLE_COLUMNS = ("step", "prompt", "response", "completion", "score", "kl", "length", "ended")
_SHOWN_SAMPLES = 24


def build_report(run_dir: Path, out: Path) -> Path:
    """Write the report of a run directory, finished or not.

    Reads `metrics.jsonl`, and where they exist `run.json` or `config.yaml` (stage and settings),
    `samples.jsonl` (rows with any of step, prompt, response, score, kl, length, ended) and
    `eval.json`. The page of an evaluation shows its result as tables, for it has one row of
    metrics, and one sample of each prompt; that of any other stage shows curves and the last
    samples.

    Args:
        run_dir: the directory of one stage.
        out: path of the HTML file; its directory is created if missing.

    Returns:
        `out`.

    Raises:
        CheckpointError: RF8901, the directory holds no metrics; RF8902, a file is not readable.
        EnvironmentFault: RF7901, `out` cannot be written.
    """
    rows = _metrics(run_dir)
    stage, config = _settings(run_dir)
    evaluation = _evaluation(run_dir)
    totals = time_totals(rows)
    title = f"{stage or 'Run'}: {run_dir.resolve().name}"
    subtitle = f"{len(rows)} rows of metrics" + (
        f", {seconds_text(sum(totals.values()))} in timed phases" if totals else ""
    )
    samples = _jsonl(run_dir / SAMPLES_NAME) if (run_dir / SAMPLES_NAME).is_file() else []
    if evaluation is None:
        findings = html.section("Curves", _headline_charts(rows), _other_charts(rows))
        shown: Sequence[Mapping[str, Any]] = samples[::-1]
    else:
        findings = html.section("Result", result_part(evaluation))
        shown = one_sample_each(samples, evaluation)
    text = html.page(
        title,
        subtitle,
        _tiles(rows),
        findings,
        html.section("Where the time went", _timing(totals)),
        html.section("Samples", _samples(shown[:_SHOWN_SAMPLES])),
        html.section("Figures", _summary(rows)),
        html.section("Settings", config_part(stage, config)),
    )
    return html.write_page(out, text)


def _metrics(run_dir: Path) -> list[dict[str, Number]]:
    path = run_dir / METRICS_NAME
    if not path.is_file():
        raise CheckpointError(
            "RF8901",
            f"there is no {METRICS_NAME} to report on",
            where=str(run_dir),
            expected="the output directory of a stage",
            remedy="name a directory in which sft, rm, ppo or eval has run",
        )
    try:
        return read_metrics(path)
    except (OSError, ValueError, RecursionError) as error:
        raise _unreadable(path, error) from error


def _settings(run_dir: Path) -> tuple[str, Mapping[str, Any]]:
    """Stage name and nested settings; empty ones if the directory does not tell."""
    for name in (RUN_NAME, CONFIG_NAME):
        path = run_dir / name
        if not path.is_file():
            continue
        try:
            text = path.read_text("utf-8")
            tree = json.loads(text) if name == RUN_NAME else yaml.safe_load(text)
        except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
            raise _unreadable(path, error) from error
        if not isinstance(tree, dict):
            raise _unreadable(path, ValueError("not a mapping"))
        if name == CONFIG_NAME:
            return "", tree
        config = tree.get("config")
        return str(tree.get("stage", "")), config if isinstance(config, dict) else {}
    return "", {}


def _evaluation(run_dir: Path) -> dict[str, Any] | None:
    try:
        return read_evaluation(run_dir)
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise _unreadable(run_dir / EVAL_NAME, error) from error


def _jsonl(path: Path) -> list[dict[str, Any]]:
    """Rows of a JSONL file; a last line that a crash cut short is left out."""
    rows = []
    try:
        lines = path.read_text("utf-8", errors="replace").split("\n")
        for line in lines[:-1]:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError("a line is not a JSON object")
            rows.append(row)
    except (OSError, ValueError, RecursionError) as error:
        raise _unreadable(path, error) from error
    return rows


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        "RF8902",
        f"cannot read a file of the run: {error}",
        where=str(path),
        remedy="repair or remove the file; the run itself can go on without it",
    )


def _tiles(rows: Rows) -> str:
    entries = []
    for key in [key for key in HEADLINES if key in keys(rows)][:5]:
        values = _finite(rows, key)
        errors = _finite(rows, f"{key}_stderr")
        caption = f"{key}, first {number_text(values[0])}" if len(values) > 1 else key
        if errors:
            caption = f"{key}, +- {number_text(errors[-1])}"
        entries.append((number_text(values[-1]), caption, ""))
    return html.tiles(entries) if entries else ""


def _finite(rows: Rows, key: str) -> list[float]:
    return [value for _, value in column(rows, key) if math.isfinite(value)]


def _headline_charts(rows: Rows) -> str:
    present = keys(rows)
    figures = [metric_chart(key, [("", rows)]) for key in HEADLINES if key in present]
    return html.charts(figures, small=True)


def _other_charts(rows: Rows) -> str:
    groups: dict[str, list[str]] = {}
    for key in keys(rows):
        if key not in HEADLINES and not key.startswith("time/"):
            groups.setdefault(key.rpartition("/")[0] or "others", []).append(key)
    return "".join(
        html.details(
            f"{name} ({len(group)})",
            html.charts([metric_chart(key, [("", rows)]) for key in sorted(group)], small=True),
        )
        for name, group in groups.items()
    )


def _timing(totals: Mapping[str, float]) -> str:
    if not totals:
        return ""
    return html.charts([bar_chart("Seconds by phase, whole run", list(totals.items()))])


def _samples(samples: Sequence[Mapping[str, Any]]) -> str:
    present = {key for sample in samples for key in sample}
    names = [name for name in _SAMPLE_COLUMNS if name in present]
    names += sorted(present.difference(names))
    texts = {"prompt", "response", "completion"}
    kinds = ["text" if name in texts else "number" for name in names]
    cells = [[_cell(sample.get(name, "")) for name in names] for sample in samples]
    return html.table(names, cells, kinds)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return number_text(value) if isinstance(value, float) else str(value)


def _summary(rows: Rows) -> str:
    body = []
    for key in keys(rows):
        values = _finite(rows, key)
        figures = (values[0], min(values), max(values), values[-1])
        body.append((key, len(values), *map(number_text, figures)))
    table = html.table(
        ("metric", "rows", "first", "least", "greatest", "last"), body, ("code", *["number"] * 5)
    )
    return html.details(f"all {len(body)} metrics", table)
