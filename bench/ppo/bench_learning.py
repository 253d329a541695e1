"""Reward against wall-clock of PPO, RLOO and GRPO on the reviews task, beside TRL's trainers.

    python -m bench.ppo.bench_learning [--preset cpu|tiny] [--algorithms ppo,rloo,grpo]
        [--seeds 1,2,3] [--trl-python /path/to/python] [--json results.json]

Both sides start from the same supervised policy, draw equally many responses a step, take as many
optimizer steps with the same rates, and are paid by the same rule (`bench.ppo.learning_task`). Runs
alternate between the sides, each in a process of its own. Time starts with training: importing and
loading are not in it, nor are files, which neither side writes.

Responses end when the policy ends them, so the sides may draw different numbers of tokens. The
reward compared is that at equal tokens: the mean over the last quarter of the rollout batches that
both sides reached within the smaller of their token counts. Intervals are 95 % over seeds
(Student's t). `seconds to` is when a side's reward, averaged over a quarter of the run, first
reached what the worse of the two has at equal tokens with the same seed; the median over seeds.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..choices import several
from ..kernels.environment import environment
from ..kernels.tables import print_environment
from . import trl_step
from .learning_task import ALGORITHMS, PRESETS, LearningCase, supervised_policy
from .side import Side

SIDES = {"ours": f"{__package__}.learn_ours", "trl": f"{__package__}.learn_trl"}
# Student's t, two-sided 95 %, by degrees of freedom; beyond, the normal's.
STUDENT = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36, 8: 2.31, 9: 2.26}
Points = Sequence[Sequence[float]]  # (seconds, tokens so far, mean reward)


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half the 95 % interval of it; infinite for a single value."""
    if len(values) < 2:
        return statistics.mean(values), math.inf
    error = statistics.stdev(values) / math.sqrt(len(values))
    return statistics.mean(values), STUDENT.get(len(values) - 1, 1.96) * error


def reward_within(points: Points, tokens: float) -> float:
    """Mean reward of the last quarter of the batches that were drawn within so many tokens."""
    reached = [reward for _, drawn, reward in points if drawn <= tokens]
    return statistics.mean(reached[-_quarter(points) :]) if reached else math.nan


def seconds_to(points: Points, reward: float) -> float:
    """When the mean over a quarter of the run first reached a reward; infinite if it never did."""
    width = _quarter(points)
    for end in range(width, len(points) + 1):
        if statistics.mean(p[2] for p in points[end - width : end]) >= reward:
            return float(points[end - 1][0])
    return math.inf


def _quarter(points: Points) -> int:
    return max(1, len(points) // 4)


def measure(case: LearningCase, seeds: Sequence[int], trl_python: str) -> dict[str, Any]:
    """All runs of an algorithm, and what is compared."""
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    missing = trl_step.missing(trl_python)
    absent: dict[str, str] = {"trl": missing} if missing else {}
    with tempfile.TemporaryDirectory() as folder:
        for seed in seeds:
            for side, module in SIDES.items():
                if side in absent:
                    continue
                arguments = ["-m", module, replace(case, seed=seed).to_json()]
                log = Path(folder) / f"{side}.log"
                python = trl_python if side == "trl" else ""
                with Side(side, arguments, log, threads=case.threads, python=python) as running:
                    found = running.facts
                if "absent" in found:
                    absent[side] = found["absent"]
                else:
                    runs[side].append(found)
    rows = summaries({side: found for side, found in runs.items() if found})
    return {"algorithm": case.algorithm, "absent": absent, "rows": rows, "runs": runs}


def summaries(runs: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """A row a side: reward at equal tokens, seconds, and seconds to the worse one's reward."""
    seeds = range(len(next(iter(runs.values()))))
    equal = [min(found[s]["points"][-1][1] for found in runs.values()) for s in seeds]
    rewards = {
        side: [reward_within(found[s]["points"], equal[s]) for s in seeds]
        for side, found in runs.items()
    }
    worse = [min(values) for values in zip(*rewards.values(), strict=True)]
    rows = {}
    for side, found in runs.items():
        mean, half = interval(rewards[side])
        reached = [seconds_to(found[s]["points"], worse[s]) for s in seeds]
        rows[side] = {
            "reward": mean,
            "reward_interval": half,
            "first_reward": statistics.mean(one["points"][0][2] for one in found),
            "tokens": statistics.mean(one["points"][-1][1] for one in found),
            "seconds": statistics.median(one["seconds"] for one in found),
            "seconds_to_worse": statistics.median(reached),
        }
    return rows


def print_rows(found: dict[str, Any]) -> None:
    """The table of an algorithm."""
    print(f"\n{found['algorithm']}: reward of the first batch, at equal tokens, +- 95 %")
    print(f"{'':8}{'first':>8}{'reward':>9}{'+-':>8}{'tokens':>9}{'seconds':>9}{'seconds to':>12}")
    for side, row in found["rows"].items():
        print(
            f"{side:8}{row['first_reward']:8.3f}{row['reward']:9.3f}{row['reward_interval']:8.3f}"
            f"{row['tokens']:9.0f}{row['seconds']:9.1f}{row['seconds_to_worse']:12.1f}"
        )
    for side, reason in found["absent"].items():
        print(f"not measured: {side}: {reason}")
    sys.stdout.flush()


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--preset", choices=tuple(PRESETS), default="cpu")
    parser.add_argument(
        "--algorithms", type=several(ALGORITHMS, "algorithm"), default=list(ALGORITHMS)
    )
    parser.add_argument("--seeds", type=_numbers, default=[1, 2, 3])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--trl-python", default="", help="interpreter that has trl; default: this")
    parser.add_argument("--json", type=Path, help="write the report to this file")
    return parser.parse_args(arguments)


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print."""
    options = parse(sys.argv[1:] if arguments is None else arguments)
    facts = environment(options.threads)
    print_environment(facts)
    found = []
    with tempfile.TemporaryDirectory() as folder:
        case = replace(PRESETS[options.preset], threads=options.threads)
        case = replace(case, model=supervised_policy(case, Path(folder)))
        for algorithm in options.algorithms:
            chosen = replace(case, algorithm=algorithm)
            found.append(measure(chosen, options.seeds, options.trl_python))
            print_rows(found[-1])
            if options.json is not None:  # as they come: all of them take half an hour
                report = {"environment": facts, "preset": options.preset, "algorithms": found}
                options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
