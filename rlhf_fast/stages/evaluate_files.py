"""The files and metrics that an evaluation leaves."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rlhf_fast.config import EvalConfig

if TYPE_CHECKING:
    from rlhf_fast.stages.evaluate import EvalResult, Samples

EVAL_NAME = "eval.json"
SAMPLES_NAME = "samples.jsonl"
REWARD_MODEL, REWARD_FUNCTION, GOLD = "reward_model", "reward_function", "gold"


def judge_name(row: Mapping[str, float]) -> str:
    """The column of a best-of-n row that judges what was selected."""
    return next(name for name in (GOLD, REWARD_MODEL, REWARD_FUNCTION) if name in row)


def _plain(value: float) -> float | None:
    """JSON has no NaN; null says that there is no figure."""
    return value if math.isfinite(value) else None


def as_metrics(result: EvalResult) -> dict[str, float]:
    """The figures by their names in metrics.jsonl."""
    metrics = {f"eval/{name}": e.mean for name, e in result.estimates.items()}
    metrics |= {f"eval/{name}_stderr": e.stderr for name, e in result.estimates.items()}
    for row in result.best_of_n:
        metrics[f"eval/best_of_{row['n']:.0f}"] = row[judge_name(row)]
    return metrics


def files_of(result: EvalResult, samples: Samples, config: EvalConfig) -> dict[str, bytes]:
    """What an evaluation leaves, by name; its result comes last."""
    tree = {
        "model": str(config.model),  # whoever builds a config in Python may have put a Path there
        "reference": str(config.reference),
        "prompts": result.prompts,
        "samples_per_prompt": result.samples_per_prompt,
        "estimates": {
            name: {"mean": _plain(e.mean), "stderr": _plain(e.stderr), "prompts": e.prompts}
            for name, e in result.estimates.items()
        },
        "best_of_n": [{k: _plain(v) for k, v in row.items()} for row in result.best_of_n],
        "best_of_n_prompts": result.best_of_n_prompts,
        "reports": result.reports,
    }
    lines = []
    for i, (prompt, response) in enumerate(zip(samples.prompts, samples.responses, strict=True)):
        row: dict[str, Any] = {"prompt": prompt, "response": response}
        row |= {name: _plain(float(v[i])) for name, v in samples.values.items()}
        lines.append(json.dumps(row | {"ended": bool(row["ended"])}, ensure_ascii=False) + "\n")
    text = json.dumps(tree, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    contents = {SAMPLES_NAME: "".join(lines), EVAL_NAME: text}
    return {name: text.encode("utf-8", "backslashreplace") for name, text in contents.items()}
