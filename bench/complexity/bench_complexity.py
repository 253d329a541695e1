"""How time and memory grow: slopes on logarithmic scales against the order that is expected.

    python -m bench.complexity.bench_complexity [--preset tiny|quick|cpu] [--only ops host steps]
                                                [--threads 2] [--json FILE]

    ops     every op by each of its sizes
    host    packing and scheduling by sequences, requests and rows
    steps   the phases of a PPO step by batch, response length, vocabulary, layers and width

Sizes of a subject take turns, round after round; the order is the slope of log(median time) over
log(size), fitted by least squares to the upper half of the sizes (three at least). Times are
processor time of all threads, which a busy machine distorts less; of the phases of a step they are
wall time. Memory is the peak resident set of a call beyond what was there before, its order the
slope between the two largest sizes, and is left out below 1 MiB, where pages of the system decide.
`MORE` marks an order that exceeds the expected one by more than 0.25: the cause is to be found, or
the measurement to be repeated on an idle machine; where sizes outgrow a cache the slope rises
without any fault of the algorithm. Fixed costs make small sizes look cheaper than their order,
which is why an order below the expected one says nothing.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..kernels.device import CpuClock
from ..kernels.environment import environment
from ..kernels.tables import print_environment
from . import subjects_host, subjects_ops, subjects_steps
from .subject import Run, Subject

KINDS: Mapping[str, Callable[[], list[Subject]]] = {
    "ops": subjects_ops.subjects,
    "host": subjects_host.subjects,
    "steps": subjects_steps.subjects,
}
ROUNDS = {"tiny": 1, "quick": 3, "cpu": 7}
SAMPLE_SECONDS = {"tiny": 0.0, "quick": 5e-3, "cpu": 2e-2}
TOLERANCE = 0.25
FITTED = 3  # sizes, at least
LEAST_BYTES = 1 << 20
LEAST_MS = 1e-6


@dataclass(frozen=True)
class Row:
    """One subject along one axis.

    Attributes:
        milliseconds: of a call, the samples of every size; 1e-6 stands for less than a clock tick.
        bytes: at the peak of a call; None where it is not measured.
        time_order, memory_order: slopes; of memory None where there is too little.
        more: the order of time or memory exceeds the expected one.
    """

    subject: str
    axis: str
    sizes: list[int]
    milliseconds: list[list[float]]
    bytes: list[int | None]
    time_order: float
    memory_order: float | None
    expected_time: float
    expected_memory: float
    more: bool


def slope(sizes: Sequence[float], values: Sequence[float]) -> float:
    """Least squares of log(value) over log(size)."""
    x = [math.log(size) for size in sizes]
    y = [math.log(value) for value in values]
    middle = statistics.mean(x)
    level = statistics.mean(y)
    covariance = sum((a - middle) * (b - level) for a, b in zip(x, y, strict=True))
    return covariance / sum((a - middle) ** 2 for a in x)


def time_order(sizes: Sequence[int], medians: Sequence[float]) -> float:
    """The slope of the upper half."""
    kept = max(min(FITTED, len(sizes)), -(-len(sizes) // 2))
    return slope(sizes[-kept:], medians[-kept:])


def memory_order(sizes: Sequence[int], found: Sequence[int | None]) -> float | None:
    """The slope between the two largest sizes."""
    small, large = found[-2:]
    if small is None or large is None or min(small, large) < LEAST_BYTES:
        return None
    return slope(sizes[-2:], [small, large])


def _calls(run: Run, least: float) -> int:
    """In a sample of about `least` seconds; the call before it warms up."""
    run()
    if not least:
        return 1
    start = time.perf_counter()
    run()
    return max(1, int(least / max(time.perf_counter() - start, 1e-7)))


def _sample(run: Run, calls: int) -> dict[str, float]:
    """Seconds of a call, by the names that it gives them; its processor time without names."""
    start = time.process_time()
    named: list[Mapping[str, float]] = []
    for _ in range(calls):
        result = run()
        if isinstance(result, dict):
            named.append(result)
    seconds = (time.process_time() - start) / calls
    if named:
        return {name: statistics.mean(call[name] for call in named) for name in named[0]}
    return {"": seconds}


def measure(subject: Subject, preset: str) -> list[Row]:
    """The rows of a subject: one, or one for each phase that it times itself."""
    sizes = list(subject.sizes[preset])
    runs = [subject.make(size) for size in sizes]
    calls = [_calls(run, SAMPLE_SECONDS[preset]) for run in runs]
    # The order of memory is that of the two largest.
    memory: list[int | None] = [None for _ in sizes[:-2]]
    memory += [CpuClock().extra_bytes(lambda _k, run=run: run()) for run in runs[-2:]]
    found: list[dict[str, list[float]]] = [{} for _ in sizes]
    for _ in range(ROUNDS[preset]):
        for place, run in enumerate(runs):
            for name, seconds in _sample(run, calls[place]).items():
                found[place].setdefault(name, []).append(max(1e3 * seconds, LEAST_MS))
    rows = []
    for name, expected in subject.expected_time.items():
        samples = [size[name] for size in found]
        order = time_order(sizes, [statistics.median(times) for times in samples])
        by_memory = memory_order(sizes, memory) if name in ("", "step") else None
        more = order > expected + TOLERANCE
        more |= by_memory is not None and by_memory > subject.expected_memory + TOLERANCE
        label = f"{subject.name}: {name}" if name else subject.name
        rows.append(
            Row(
                *(label, subject.axis, sizes, samples, memory, order, by_memory),
                *(expected, subject.expected_memory, more),
            )
        )
    return rows


def print_row(row: Row) -> None:
    times = " ".join(f"{statistics.median(samples):.4g}" for samples in row.milliseconds)
    memory = "" if row.memory_order is None else f", memory {row.memory_order:.2f}"
    mark = f"MORE than {row.expected_time:g}" if row.more else f"expected {row.expected_time:g}"
    print(
        f"{row.subject + ' by ' + row.axis:<48}{row.time_order:6.2f}{memory}  ({mark}); "
        f"{row.sizes[0]} to {row.sizes[-1]}: {times} ms",
        flush=True,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="growth of time and memory")
    parser.add_argument("--preset", choices=tuple(ROUNDS), default="cpu")
    parser.add_argument("--only", nargs="+", choices=tuple(KINDS), default=tuple(KINDS))
    parser.add_argument("--threads", type=int, default=2, help="of torch on the CPU")
    parser.add_argument("--json", help="write the report to this file")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    facts = environment(options.threads)
    print_environment(facts)
    rows: list[Row] = []
    for kind in options.only:
        for subject in KINDS[kind]():
            made = measure(subject, options.preset)
            for row in made:
                print_row(row)
            rows += made
            if options.json:
                report: dict[str, Any] = {"environment": facts, "preset": options.preset}
                report["rows"] = [asdict(row) for row in rows]
                Path(options.json).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    more = [f"{row.subject} by {row.axis}" for row in rows if row.more]
    print(f"\nmore than expected: {', '.join(more) or 'none'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
