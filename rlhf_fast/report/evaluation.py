"""The result of an evaluation: its figures with their standard errors, and best-of-n."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf_fast.report import html
from rlhf_fast.report.plots import number_text

EVAL_NAME = "eval.json"


def read_evaluation(run_dir: Path) -> dict[str, Any] | None:
    """`eval.json` of a run directory; None if there is none, which is any other stage's.

    Raises:
        OSError, ValueError: the file cannot be read, or is not one of an evaluation.
    """
    path = run_dir / EVAL_NAME
    if not path.is_file():
        return None
    tree = json.loads(path.read_text("utf-8"))
    if not isinstance(tree, dict) or not isinstance(tree.get("estimates"), dict):
        raise ValueError("not the result of an evaluation")
    group = tree.get("samples_per_prompt")
    if not isinstance(group, int) or group < 1:
        raise ValueError("samples_per_prompt is not a count")
    tree.setdefault("best_of_n", [])
    rows = [*tree["estimates"].values(), *tree["best_of_n"]]
    if not all(isinstance(row, dict) and all(map(_is_figure, row.values())) for row in rows):
        raise ValueError("estimates and best_of_n hold other things than numbers")
    return tree


def _is_figure(value: Any) -> bool:
    return (
        value is None or isinstance(value, float) or (isinstance(value, int) and abs(value) < 2**63)
    )


def result_part(evaluation: Mapping[str, Any]) -> str:
    """The figures and the best-of-n curve as tables."""
    rows = [
        (name, _text(e.get("mean")), _text(e.get("stderr")), _text(e.get("prompts")))
        for name, e in evaluation["estimates"].items()
    ]
    header = ("figure", "mean", "standard error", "prompts")
    figures = html.table(header, rows, ("code", *["number"] * 3))
    return figures + _best_of_n(evaluation["best_of_n"])


def _best_of_n(curve: Sequence[Mapping[str, Any]]) -> str:
    if not curve:
        return ""
    names = list(curve[0])
    text = "Best of n samples of a prompt, in expectation."
    if "gold" in names:
        text += " The reward model (proxy) selects, the reward function (gold) judges."
    cells = [[_text(row.get(name)) for name in names] for row in curve]
    return html.paragraph(text, "quiet") + html.table(names, cells, ["number"] * len(names))


def one_sample_each(
    samples: Sequence[Mapping[str, Any]], evaluation: Mapping[str, Any]
) -> list[Mapping[str, Any]]:
    """The first sample of each prompt; a prompt's samples follow one another."""
    return list(samples[:: evaluation["samples_per_prompt"]])


def _text(value: float | None) -> str:
    """A figure of `eval.json`, where null means that there is none."""
    return number_text(math.nan if value is None else value)
