"""Fair timings of CPU ops in one process: interleaved, on rotated inputs, beside error and memory.

Rules that every table made here follows:

- contenders take turns (A B C A B C ...), so that drift of the clock or a noisy neighbour hits all;
- a pause before each turn lets the worker threads of the one before stop spinning (OpenMP's wait
  for milliseconds), which would take a core from the next and count as its processor time;
- each turn gets the next of several input sets that together exceed the last-level cache;
- medians with the 20th and 80th percentile, never the best of many;
- the error against fp64 stands in the row of the time; who fails its gate has no time;
- bytes per second are set against the read bandwidth of the same threads, measured in turns as
  well, with the fastest of several reductions;
- beside the wall time stands the processor time of all threads, which a busy machine distorts less;
- extra memory is the growth of the peak resident set, which sees every allocator.
"""

from __future__ import annotations

import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from rlhf_fast_kernels import native

PROC = Path("/proc/self")
PAUSE = 0.02
RESET_PEAK = "5"  # man 5 proc: writing 5 to clear_refs resets VmHWM


@dataclass(frozen=True)
class Contender:
    """A way of computing the op: `run(k)` computes it on input set k and returns all it made."""

    name: str
    run: Callable[[int], Any]
    error: float
    error_limit: float
    ours: bool = False

    @property
    def compiled(self) -> bool:
        return self.name.startswith("compile ")

    @property
    def passes(self) -> bool:
        return self.error <= self.error_limit


@dataclass
class Row:
    """One line of a table; times in ms, None where the error gate failed."""

    case: str
    contender: str
    ours: bool
    error: float
    error_limit: float
    median_ms: float | None = None
    p20_ms: float | None = None
    p80_ms: float | None = None
    cpu_ms: float | None = None
    repeats: int = 0
    gb_per_s: float | None = None
    of_bandwidth: float | None = None
    extra_mib: float | None = None
    gain: float | None = None  # of ours: the fastest other contender's median over this one
    gain_over_eager: float | None = None  # the same among contenders that are not compiled


@dataclass
class Report:
    """All rows of a run and where they were measured."""

    environment: dict[str, Any]
    rows: list[Row] = field(default_factory=list)


# ---- where --------------------------------------------------------------------------------------


def environment(threads: int) -> dict[str, Any]:
    """Commit, versions, processor and load; call after `torch.set_num_threads`."""
    return {
        "commit": _git("rev-parse", "--short=12", "HEAD"),
        "modified": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cpu": _processor(),
        "cores": os.cpu_count(),
        "core_module": native.describe()["cpu"],
        "threads": threads,
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", *arguments],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in text.splitlines() if "model name" in line]
    return names[0] if names else platform.processor()


class ReadProbe:
    """Reads 384 MiB once, with torch's threads and the fastest of its reductions."""

    def __init__(self) -> None:
        x = torch.ones(96 << 20)
        reductions: tuple[Callable[[], Any], ...] = (x.sum, x.amax, lambda: torch.dot(x, x))
        for reduction in reductions:
            reduction()
        self.bytes = x.numel() * x.element_size()
        self.reduction = min(reductions, key=lambda r: min(seconds(r)[0] for _ in range(5)))

    def seconds(self) -> float:
        return seconds(self.reduction)[0]

    def gb_per_s(self, repeats: int = 9) -> float:
        return self.bytes / statistics.median(self.seconds() for _ in range(repeats)) / 1e9


def seconds(function: Callable[[], Any]) -> tuple[float, float]:
    """Wall and processor seconds of a call; what it returns is freed outside the measurement."""
    cpu, start = time.process_time(), time.perf_counter()
    result = function()
    wall, used = time.perf_counter() - start, time.process_time() - cpu
    del result
    return wall, used


# ---- memory -------------------------------------------------------------------------------------


def _status(key: str) -> int:
    for line in (PROC / "status").read_text(encoding="utf-8").splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) << 10
    raise KeyError(key)


def extra_memory(run: Callable[[int], Any]) -> float | None:
    """MiB by which the peak resident set of a call, its results included, exceeds the set before.

    None where the system cannot tell. Pages that are already resident in the allocator's free lists
    are not seen; allocations above the allocator's threshold (32 MiB in glibc) always are.
    """
    gc.collect()
    try:
        (PROC / "clear_refs").write_text(RESET_PEAK, encoding="utf-8")
        before = _status("VmRSS")
        result = run(0)
        peak = _status("VmHWM")
    except (OSError, KeyError):
        return None
    del result
    return max(peak - before, 0) / 2**20


# ---- time ---------------------------------------------------------------------------------------


def measure(
    case: str,
    contenders: Sequence[Contender],
    *,
    sets: int,
    bytes_moved: int,
    probe: ReadProbe,
    repeats: int = 9,
    calls: int = 1,
) -> list[Row]:
    """Rows of one case, gains filled in for ours.

    Args:
        case: label.
        contenders: those that fail their error gate are listed without a time.
        sets: number of input sets to rotate over.
        bytes_moved: what one call must read and write at least, for the GB/s of `ours`.
        probe: takes its turn beside the contenders.
        repeats: turns of each contender.
        calls: calls in a turn, each on the next input set; more than 1 for ops so short that the
            caches, emptied by the others' turns, would be most of what is measured.
    """
    rows = {c.name: Row(case, c.name, c.ours, c.error, c.error_limit) for c in contenders}
    timed = [c for c in contenders if c.passes]
    samples: dict[str, list[tuple[float, float]]] = {c.name: [] for c in timed}
    for contender in timed:
        contender.run(0)
        rows[contender.name].extra_mib = extra_memory(contender.run)
    reads = []
    for turn in range(repeats):
        _let_others_settle()
        reads.append(probe.seconds())
        for contender in timed:
            _let_others_settle()
            ring = [(turn * calls + call) % sets for call in range(calls)]
            wall, used = seconds(partial(_run_all, contender.run, ring))
            samples[contender.name].append((wall / calls, used / calls))
    bandwidth = probe.bytes / statistics.median(reads) / 1e9
    for contender in timed:
        row = rows[contender.name]
        _fill(row, samples[contender.name])
        if contender.ours and row.median_ms is not None:
            row.gb_per_s = bytes_moved / row.median_ms / 1e6
            row.of_bandwidth = row.gb_per_s / bandwidth
    peers = {c.name: c.compiled for c in timed if not c.ours}
    for row in rows.values():
        if row.ours and row.median_ms is not None:
            row.gain = _gain(row, [rows[name] for name in peers])
            row.gain_over_eager = _gain(
                row, [rows[n] for n, compiled in peers.items() if not compiled]
            )
    return list(rows.values())


def _let_others_settle() -> None:
    """Outlast the OpenMP threads of the last turn, which spin, without letting this core sleep.

    A core that slept wakes to cold caches and a low clock: that costs 0.2 ms, several times what
    the short ops take, and no training loop leaves such a gap between ops.
    """
    end = time.perf_counter() + PAUSE
    while time.perf_counter() < end:
        pass


def _run_all(run: Callable[[int], Any], ring: Sequence[int]) -> Any:
    result = None
    for k in ring:
        result = run(k)
    return result


def _gain(row: Row, peers: Sequence[Row]) -> float | None:
    times = [peer.median_ms for peer in peers if peer.median_ms is not None]
    return min(times) / row.median_ms if times and row.median_ms is not None else None


def _fill(row: Row, samples: list[tuple[float, float]]) -> None:
    wall = sorted(1e3 * sample[0] for sample in samples)
    row.median_ms = statistics.median(wall)
    row.p20_ms = wall[int(0.2 * (len(wall) - 1))]
    row.p80_ms = wall[round(0.8 * (len(wall) - 1))]
    row.cpu_ms = 1e3 * statistics.median(sample[1] for sample in samples)
    row.repeats = len(wall)


def compiled(function: Callable[..., Any], example: Sequence[Any]) -> Callable[..., Any] | None:
    """torch.compile of a peer, run once; None (and a line on stderr) where it cannot compile."""
    try:
        result = torch.compile(function, dynamic=False)
        result(*example)
    except Exception as problem:  # any failure of the compiler removes one contender
        print(f"torch.compile left out: {problem}", file=sys.stderr)
        return None
    return result


# ---- out ----------------------------------------------------------------------------------------


def print_environment(facts: dict[str, Any]) -> None:
    """The lines that must stand above every table."""
    dirty = " (modified)" if facts["modified"] else ""
    print(f"commit {facts['commit'] or 'unknown'}{dirty}, torch {facts['torch']}, {facts['time']}")
    print(f"{facts['cpu']}, {facts['core_module']}, load average {facts['load_average']}")
    print(f"{facts['threads']} threads\n")


def print_rows(rows: Sequence[Row]) -> None:
    """One case as a table."""
    print(rows[0].case)
    head = (
        "",
        "median ms",
        "p20",
        "p80",
        "cpu ms",
        "GB/s",
        "of read",
        "extra MiB",
        "max error",
        "gain",
        "on eager",
    )
    print(f"  {head[0]:<30}" + "".join(f"{h:>11}" for h in head[1:]))
    for row in rows:
        cells = (
            _cell(row.median_ms, ".2f") if row.median_ms is not None else "error gate",
            _cell(row.p20_ms, ".2f"),
            _cell(row.p80_ms, ".2f"),
            _cell(row.cpu_ms, ".2f"),
            _cell(row.gb_per_s, ".1f"),
            _cell(row.of_bandwidth, ".0%"),
            _cell(row.extra_mib, ".1f"),
            f"{row.error:.1e}",
            "" if row.gain is None else f"{row.gain:.1f}x",
            "" if row.gain_over_eager is None else f"{row.gain_over_eager:.1f}x",
        )
        print(f"  {row.contender:<30}" + "".join(f"{cell:>11}" for cell in cells))
    print(flush=True)


def _cell(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def write_json(report: Report, path: str | None) -> None:
    """The whole report as one JSON object, if a path was given."""
    if path is not None:
        text = json.dumps(asdict(report), indent=1)
        Path(path).write_text(text + "\n", encoding="utf-8")


def exit_code(rows: Sequence[Row]) -> int:
    """1 if one of our rows failed its error gate, otherwise 0."""
    failed = [row for row in rows if row.ours and row.median_ms is None]
    for row in failed:
        print(f"error {row.error:.2e} above {row.error_limit:.2e}: {row.case}, {row.contender}")
    return 1 if failed else 0
