"""Steps of TRL's GRPO and RLOO: without us, on our log-probs, and on our generator as well.

    PYTHONPATH=.:kernels .venv-peers/bin/python -m bench.integrations.bench_trl_runs
        [--kind GRPO RLOO] [--threads 2] [--repeats 5] [--quick] [--json FILE]

TRL 1.16, on the CPU. Each side is a process of its own with the same model, prompts and config, and
they step in turns; the first turn of each is not counted. Printed are the medians of a whole
optimizer step with its generation: seconds, processor seconds of all threads, MiB at the peak
beyond what the process held before its first step, tokens generated, and how many times faster than
without us.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import statistics
import tempfile
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..kernels import harness
from ..kernels.environment import environment
from ..ppo.side import Side
from .trl_side import SIDES, Case

QUICK = {"hidden": 32, "layers": 1, "vocab": 64, "prompts": 2, "generations": 2}
QUICK |= {"prompt_tokens": 4, "completion_tokens": 8}


def main() -> int:
    """Measure, print, write the report."""
    options = arguments()
    peer = f"trl {importlib.metadata.version('trl')}"
    rows = []
    for kind in options.kind:
        case = Case("theirs", kind, options.threads, **(QUICK if options.quick else {}))
        steps = measure(case, 2 if options.quick else options.repeats)
        print(f"\n{kind}: {case.to_json()}")
        print(f"{'':10} {'s':>8} {'cpu s':>8} {'MiB':>8} {'tokens':>8} {'gain':>6}")
        baseline = 0.0
        for side, found in steps.items():
            row = {"peer": peer, "kind": kind, "side": side, **summary(found)}
            baseline = baseline or row["seconds"]
            row["gain"] = baseline / row["seconds"]
            rows.append(row)
            print(
                f"{side:10} {row['seconds']:8.3f} {row['cpu_seconds']:8.3f} {row['mib']:8.1f} "
                f"{row['tokens']:8.0f} {row['gain']:5.2f}x",
                flush=True,
            )
    if options.json:
        found = {"environment": environment(options.threads), "rows": rows}
        Path(options.json).write_text(json.dumps(found, indent=1), encoding="utf-8")
    return 0


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = harness.parser((__doc__ or "").split("\n")[0], repeats=5)
    parser.add_argument("--kind", nargs="+", choices=("GRPO", "RLOO"), default=["GRPO", "RLOO"])
    return parser.parse_args()


def measure(case: Case, repeats: int) -> dict[str, list[dict[str, Any]]]:
    """Steps of every side, taken in turns."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        running = {
            name: stack.enter_context(
                Side(
                    name,
                    ["-m", f"{__package__}.trl_side", replace(case, side=name).to_json()],
                    Path(folder) / f"{name}.log",
                    threads=case.threads,
                )
            )
            for name in SIDES
        }
        steps: dict[str, list[dict[str, Any]]] = {name: [] for name in SIDES}
        for turn in range(1 + repeats):
            for name, side in running.items():
                found = side.step()
                if turn:
                    steps[name].append(found)
        return steps


def summary(steps: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians of the steps of one side, and the seconds of each."""
    seconds = [s["seconds"]["step"] for s in steps]
    return {
        "seconds": statistics.median(seconds),
        "samples": seconds,
        "cpu_seconds": statistics.median(s["cpu_seconds"] for s in steps),
        "mib": statistics.median(s["extra_bytes"]["step"] for s in steps) / 2**20,
        "tokens": statistics.median(s["tokens"] for s in steps),
    }


if __name__ == "__main__":
    raise SystemExit(main())
