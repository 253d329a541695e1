"""Every bench script of this folder, the most important first, each in a process of its own.

    python -m bench.kernels.suite [--device cpu|cuda] [--quick] [--out bench/results]
                                  [--only logprobs gae ...] [--limit 300] [--total SECONDS]

Writes `<op>.json` a script (`<op>_cuda.json` on a GPU) to the folder and ends with one table. A
script that fails or outlasts its limit loses its place in the table, and what it had measured until
then is kept. Returns 1 if an error gate failed, 2 if a script failed or was stopped, otherwise 0.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import limited

HERE = Path(__file__).parent
IMPORTANCE = (
    *("logprobs", "linear_logprobs", "linear_ppo_loss", "gae", "rewards_and_gae", "ppo_loss"),
    *("sample", "packed_attention", "paged_attention", "rope_and_store", "kl", "linear_kl"),
    "whiten",
)
COLUMNS = (
    ("ms", "median_ms", ".4g"),
    ("wall ms", "wall_ms", ".4g"),
    ("of limit", "of_bandwidth", ".0%"),
    ("of matmul", "of_matmul", ".0%"),
    ("extra MiB", "extra_mib", ".1f"),
    ("gain", "gain", ".1f"),
    ("on eager", "gain_over_eager", ".1f"),
    ("max error", "error", ".1e"),
)


@dataclass
class Result:
    """A script's outcome; `rows` are those of its report, as far as it came."""

    op: str
    status: str
    seconds: float = 0.0
    rows: list[dict[str, Any]] = field(default_factory=list)

    @property
    def gate_failed(self) -> bool:
        return any(row["ours"] and row["median_ms"] is None for row in self.rows)


def scripts() -> list[str]:
    """The ops that have a `bench_<op>.py`, the most important first, unknown ones last."""
    found = sorted(path.stem.removeprefix("bench_") for path in HERE.glob("bench_*.py"))
    return sorted(found, key=lambda op: IMPORTANCE.index(op) if op in IMPORTANCE else 99)


def run_script(op: str, arguments: Sequence[str], limit: float, target: Path) -> Result:
    """One script under its limit; its report lands in `target` if it measured anything."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, "-m", f"{__package__}.bench_{op}", "--json", str(report)]
        outcome = limited.run([*command, *arguments], limit, environment=limited.python_path())
        rows = _rows(report)
        if rows:
            shutil.copyfile(report, target)
    result = Result(op, "ok", outcome.seconds, rows)
    if outcome.exit_code is None:
        result.status = f"stopped after {limit:.0f} s"
    elif result.gate_failed:
        result.status = "error gate"
    elif outcome.exit_code != 0:
        result.status = f"failed, exit code {outcome.exit_code}"
    return result


def _rows(report: Path) -> list[dict[str, Any]]:
    try:
        return list(json.loads(report.read_text(encoding="utf-8"))["rows"])
    except (OSError, ValueError, KeyError):  # none, or cut off in the middle
        return []


def print_summary(results: Sequence[Result]) -> None:
    """Status of every script, then one line for each of our rows."""
    print("\n==== summary ====")
    for result in results:
        print(
            f"{result.op:<24}{result.status:<24}{result.seconds:>7.0f} s {len(result.rows):>4} rows"
        )
    ours = [(r.op, row) for r in results for row in r.rows if row["ours"]]
    labels = [f"{op}: {row['case']}, {row['contender']}" for op, row in ours]
    width = max((len(label) for label in labels), default=0) + 2
    print(f"\n{'':<{width}}" + "".join(f"{heading:>11}" for heading, _, _ in COLUMNS))
    for label, (_, row) in zip(labels, ours, strict=True):
        cells = [_cell(row.get(key), form) for _, key, form in COLUMNS]
        if row["median_ms"] is None:
            cells[0] = "error gate"
        print(f"{label:<{width}}" + "".join(f"{cell:>11}" for cell in cells))
    print(flush=True)


def _cell(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="all bench scripts of the ops")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--quick", action="store_true", help="few turns, few cases")
    parser.add_argument("--out", type=Path, default=HERE.parent / "results")
    parser.add_argument("--only", nargs="+", choices=scripts(), default=scripts())
    parser.add_argument("--limit", type=float, default=600.0, help="seconds a script")
    parser.add_argument("--total", type=float, default=float("inf"), help="seconds in all")
    options = parser.parse_args(arguments)
    passed = ["--quick"] if options.quick else []
    if options.threads is not None:
        passed += ["--threads", str(options.threads)]
    if options.device != "cpu":
        passed += ["--device", options.device]
    suffix = "" if options.device == "cpu" else f"_{options.device.partition(':')[0]}"
    options.out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + options.total
    results = []
    for op in scripts():
        if op not in options.only:
            continue
        left = end - time.monotonic()
        if left <= 0:
            results.append(Result(op, "not run: no time left"))
            continue
        print(f"==== {op} ====", flush=True)
        target = options.out / f"{op}{suffix}.json"
        results.append(run_script(op, passed, min(options.limit, left), target))
    print_summary(results)
    if any(result.gate_failed for result in results):
        return 1
    return 2 if any(result.status != "ok" for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
