"""Curves out of the rows of `metrics.jsonl`."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rlhf_fast.report.plots import Axis, Series, line_chart

Rows = Sequence[Mapping[str, Any]]

STEP = "step"
_GREATEST = sys.float_info.max / 4


def column(rows: Rows, key: str) -> list[tuple[float, float]]:
    """(step, value) of every row that has `key` as a number; NaN where it is not finite.

    A row without a step counts as the one after its predecessor.
    """
    points, previous = [], 0.0
    for row in rows:
        step = _number(row.get(STEP))
        previous = step if math.isfinite(step) else previous + 1.0
        if key in row:
            points.append((previous, _number(row[key])))
    return points


def keys(rows: Rows) -> list[str]:
    """Keys with at least one number, in the order they first appear, without `step`."""
    seen: dict[str, None] = {}
    for row in rows:
        seen.update((k, None) for k, v in row.items() if math.isfinite(_number(v)))
    seen.pop(STEP, None)
    return list(seen)


def metric_chart(key: str, runs: Sequence[tuple[str, Rows]], title: str = "") -> str:
    """One metric over steps, one line per run; empty if no run has it.

    Args:
        key: metric.
        runs: (legend entry, rows); the position decides the colour.
        title: caption, the key itself if empty.
    """
    series = [
        Series(name, column(rows, key), colour=index % 6 + 1)
        for index, (name, rows) in enumerate(runs)
    ]
    series = [line for line in series if any(math.isfinite(y) for _, y in line.points)]
    if not series:
        return ""
    label = key.rpartition("/")[2]
    return line_chart(title or key, series, Axis("step"), Axis(label), small=True)


def time_totals(rows: Rows) -> dict[str, float]:
    """Seconds by phase, the sums of the `time/*` metrics, longest first."""
    totals: dict[str, float] = {}
    for row in rows:
        for key, value in row.items():
            seconds = _number(value)
            if key.startswith("time/") and math.isfinite(seconds):
                name = key.removeprefix("time/")
                totals[name] = totals.get(name, 0.0) + seconds
    return dict(sorted(totals.items(), key=lambda item: -item[1]))


def _number(value: Any) -> float:
    """NaN for what is no number, or too large for a difference of two to be one."""
    drawn = isinstance(value, int | float) and abs(value) <= _GREATEST
    return float(value) if drawn else math.nan
