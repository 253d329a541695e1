"""Fair timings of ops in one process: interleaved, on rotated inputs, beside error and memory.

Rules that every table made here follows; docs/benchmarking.md says how to read one:

- contenders take turns (A B C A B C ...), so that drift of the clock or a noisy neighbour hits all;
- each turn starts cold: on a CPU it gets the next of several input sets that together exceed the
  last-level cache, on a GPU the second-level cache is flushed before every call;
- medians with the 20th and 80th percentile, never the best of many;
- the error against fp64 stands in the row of the time; who fails its gate has no time;
- bytes and FLOPs per second are set against bandwidth and matrix products of the same threads or
  GPU, measured in turns as well;
- on a CPU the processor time of all threads stands beside the wall time, since a busy machine
  distorts it less; on a GPU the wall time of calls in a row, since it holds what launching costs;
- extra memory is what a call needs beyond its inputs and beyond what it must return.

A bench script:

    options = harness.parser("what it measures").parse_args(arguments)
    session = harness.start(options)
    session.add(harness.measure("case", contenders, sets=..., bytes_moved=..., **session.limits()))
    return session.finish()
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from rlhf_fast_kernels import dispatch

from .device import Clock, Sample, clock_of, seconds
from .environment import environment
from .probes import (
    BandwidthProbe,
    CopyProbe,
    MatmulProbe,
    ReadProbe,
    bandwidth_probe,
    calibrate,
)
from .tables import print_absent, print_calibration, print_environment, print_rows

__all__ = [
    "Contender",
    "CopyProbe",
    "MatmulProbe",
    "ReadProbe",
    "Report",
    "Row",
    "Session",
    "bandwidth_probe",
    "bytes_of",
    "compiled",
    "environment",
    "exit_code",
    "extra_memory",
    "implementation",
    "measure",
    "parser",
    "print_environment",
    "print_rows",
    "seconds",
    "start",
    "write_json",
]

QUICK_REPEATS = 3
CALIBRATION_REPEATS = 5
# "off": no contender is compiled, which takes longer than all else at the smallest preset.
COMPILE_VARIABLE = "BENCH_COMPILE"
DRIFT = 1.25  # of a calibration, before against after, that is worth a warning


class _Output(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, graph: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        return logits.detach()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[None, None]:
        return None, None


def model_output(logits: torch.Tensor) -> torch.Tensor:
    """An alias of `logits` as a model gives them: a gradient may be written over it."""
    output: torch.Tensor = _Output.apply(torch.zeros((), requires_grad=True), logits)
    return output


@dataclass(frozen=True)
class Contender:
    """A way of computing the op: `run(k)` computes it on input set k and returns all it made.

    Attributes:
        returned_bytes: of what the op must hand out (gradients, results), which is not extra.
        graph_safe: on a GPU, also time the call captured in a CUDA graph. Nothing in it may wait
            for the device.
    """

    name: str
    run: Callable[[int], Any]
    error: float
    error_limit: float
    ours: bool = False
    returned_bytes: int = 0
    graph_safe: bool = False

    @property
    def compiled(self) -> bool:
        return self.name.startswith("compile ")

    @property
    def passes(self) -> bool:
        return self.error <= self.error_limit  # a NaN does not


@dataclass
class Row:
    """One line of a table; times in ms, None where the error gate failed or nothing measures it."""

    case: str
    contender: str
    ours: bool
    error: float
    error_limit: float
    median_ms: float | None = None  # wall time on a CPU, time between events on a GPU
    p20_ms: float | None = None
    p80_ms: float | None = None
    cpu_ms: float | None = None
    repeats: int = 0  # samples
    gb_per_s: float | None = None  # of ours: bytes that the op must move over the median
    of_bandwidth: float | None = None
    extra_mib: float | None = None
    gain: float | None = None  # of ours: the fastest other contender's median over this one
    gain_over_eager: float | None = None  # the same among contenders that are not compiled
    tflops: float | None = None  # FLOPs that the op needs, whatever the contender spends
    of_matmul: float | None = None  # time of the same FLOPs in the matmul probe over the median
    wall_ms: float | None = None  # GPU: a call of many in a row, launches included
    graph_ms: float | None = None  # GPU: a replay of the captured call


@dataclass
class Report:
    """All rows of a run, where they were measured, and which peers were not there and why."""

    environment: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    absent: dict[str, str] = field(default_factory=dict)


# ---- a script -----------------------------------------------------------------------------------


def parser(description: str, *, repeats: int = 9) -> argparse.ArgumentParser:
    """The options that all bench scripts share; `bench.kernels.suite` passes them."""
    result = argparse.ArgumentParser(description=description)
    result.add_argument("--device", default="cpu", help="cpu (default), cuda or cuda:N")
    result.add_argument("--threads", type=int, default=2, help="of torch on the CPU")
    result.add_argument("--repeats", type=int, default=repeats, help="turns of each contender")
    result.add_argument("--quick", action="store_true", help=f"{QUICK_REPEATS} turns, fewer cases")
    result.add_argument("--json", help="write the report to this file")
    return result


@dataclass
class Session:
    """A run of a bench script: its device, its probes, its report."""

    device: torch.device
    repeats: int
    quick: bool
    probe: BandwidthProbe
    report: Report
    json: str | None = None
    products: dict[Any, MatmulProbe] = field(default_factory=dict)

    def matmul(self, dtype: torch.dtype, shape: tuple[int, int, int] | None = None) -> MatmulProbe:
        """The probe of this dtype and shape (m, n, k) on the session's device."""
        key = (dtype, shape)
        if key not in self.products:
            self.products = {key: MatmulProbe(dtype, self.device, shape)}  # one at a time: big
        return self.products[key]

    def limits(self) -> dict[str, Any]:
        """The keyword arguments of `measure` that are the same in every case."""
        return {"probe": self.probe, "repeats": self.repeats}

    def add(self, rows: Sequence[Row]) -> None:
        """Print a case and keep it; on disk as well, should a later one end the process."""
        print_rows(rows)
        self.report.rows += rows
        write_json(self.report, self.json)

    def finish(self) -> int:
        """Calibrate again, write the report and give the exit code."""
        after = calibrate(self.probe, min(self.repeats, CALIBRATION_REPEATS))
        self.report.environment["calibration_after"] = after
        print_calibration("after ", after)
        _warn_of_drift(self.report.environment["calibration_before"], after)
        print_absent(self.report.absent)
        write_json(self.report, self.json)
        return exit_code(self.report.rows)


def start(options: argparse.Namespace) -> Session:
    """Set threads and device, calibrate and print where this runs; exits if there is no device."""
    device = torch.device(options.device)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise SystemExit("nothing to measure: --device cuda, but torch sees no CUDA device")
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)
    torch.set_num_threads(options.threads)
    probe = bandwidth_probe(device)
    report = Report(environment(options.threads, device))
    print_environment(report.environment)
    repeats = min(options.repeats, QUICK_REPEATS) if options.quick else options.repeats
    before = calibrate(probe, min(repeats, CALIBRATION_REPEATS))
    report.environment["calibration_before"] = before
    print_calibration("before", before)
    return Session(device, repeats, options.quick, probe, report, options.json)


def _warn_of_drift(before: Mapping[str, float], after: Mapping[str, float]) -> None:
    for name in before.keys() & after.keys():
        was, now = before[name], after[name]
        if name.endswith("_per_s") and not 1 / DRIFT < now / was < DRIFT:
            print(f"the machine changed under the run: {name} was {was:.4g}, is {now:.4g}")


def implementation(op: str, *tensors: torch.Tensor) -> str:
    """The implementation of an op that these tensors get by default: `cpu`, `cuda`, `triton`."""
    return dispatch.choose(op, None, *tensors).impl


# ---- measuring ----------------------------------------------------------------------------------


def measure(
    case: str,
    contenders: Sequence[Contender],
    *,
    sets: int,
    bytes_moved: int,
    probe: BandwidthProbe,
    repeats: int = 9,
    calls: int = 1,
    flops: int | None = None,
    matmul: MatmulProbe | None = None,
) -> list[Row]:
    """Rows of one case, gains filled in for ours.

    Args:
        case: label.
        contenders: those that fail their error gate are listed without a time.
        sets: number of input sets to rotate over.
        bytes_moved: what one call must read and write at least, for the GB/s of `ours`.
        probe: takes its turn beside the contenders; its device is the one that is timed.
        repeats: turns of each contender.
        calls: calls in a turn on a CPU, each on the next input set; more than 1 for ops so short
            that the caches, emptied by the others' turns, would be most of what is measured. On a
            GPU the clock chooses.
        flops: what one call must compute at least, for the TFLOP/s of every row.
        matmul: takes its turn as well, for the fraction of its rate.
    """
    clock = clock_of(probe.device)
    rows = {c.name: Row(case, c.name, c.ours, c.error, c.error_limit) for c in contenders}
    timed = [c for c in contenders if c.passes]
    lengths = {}
    for contender in timed:
        _check_device(contender, contender.run(0), probe.device)
        rows[contender.name].extra_mib = _extra_mib(clock, contender)
        lengths[contender.name] = clock.calls_per_turn(contender.run, calls, repeats)
    samples: dict[str, list[Sample]] = {c.name: [] for c in timed}
    moves: list[Sample] = []
    products: list[Sample] = []
    for turn in range(repeats):
        moves += clock.turn(probe.run, (0,))
        if matmul is not None:
            products += clock.turn(matmul.run, (0,))
        for contender in timed:
            count = lengths[contender.name]
            ring = [(turn * count + call) % sets for call in range(count)]
            samples[contender.name] += clock.turn(contender.run, ring)
    bandwidth = probe.bytes / _median(moves) / 1e9
    rate = matmul.flops / _median(products) / 1e12 if matmul is not None else None
    for contender in timed:
        row = rows[contender.name]
        _fill(row, samples[contender.name])
        _fill_rates(row, bytes_moved, bandwidth, flops, rate)
        row.wall_ms = _ms(clock.back_to_back(contender.run, sets, repeats))
        row.graph_ms = _ms(clock.graph(contender.run) if contender.graph_safe else None)
    _fill_gains(rows, timed)
    return list(rows.values())


def extra_memory(
    run: Callable[[int], Any], device: torch.device | str = "cpu", returned_bytes: int = 0
) -> float | None:
    """MiB that a call needs at its peak beyond its inputs and what it must return.

    On a CPU the growth of the peak resident set, on a GPU that of torch's allocator: `run` is
    called once more, with its inputs and gradients' targets already there. None where the system
    cannot tell.
    """
    return _extra_mib(
        clock_of(torch.device(device)),
        Contender("", run, 0.0, 0.0, returned_bytes=returned_bytes),
    )


def bytes_of(*tensors: torch.Tensor) -> int:
    """Bytes of dense tensors like these, for `Contender.returned_bytes`."""
    return sum(x.numel() * x.element_size() for x in tensors)


def compiled(
    function: Callable[..., Any],
    example: Sequence[Any],
    *,
    dynamic: bool = False,
    mode: str | None = None,
) -> Callable[..., Any] | None:
    """torch.compile of a peer, run once; None (and a line on stderr) where it cannot compile."""
    if os.environ.get(COMPILE_VARIABLE) == "off":
        print(f"torch.compile left out: {COMPILE_VARIABLE}=off", file=sys.stderr)
        return None
    try:
        result = torch.compile(function, dynamic=dynamic, mode=mode)
        result(*example)
    except Exception as problem:  # any failure of the compiler removes one contender
        print(f"torch.compile left out: {problem}", file=sys.stderr)
        return None
    return result


def _extra_mib(clock: Clock, contender: Contender) -> float | None:
    found = clock.extra_bytes(contender.run)
    return None if found is None else max(found - contender.returned_bytes, 0) / 2**20


def _check_device(contender: Contender, result: Any, device: torch.device) -> None:
    """A CPU's clock on a GPU's calls would time their launches and call it speed."""
    values = result if isinstance(result, tuple | list) else (result,)
    for value in values:
        if isinstance(value, torch.Tensor) and value.device.type != device.type:
            raise ValueError(
                f"measure: {contender.name} computes on {value.device}, the probe is on {device}: "
                "pass the probe of the session"
            )


def _median(samples: Sequence[Sample]) -> float:
    return statistics.median(sample.seconds for sample in samples)


def _ms(value: float | None) -> float | None:
    return None if value is None else 1e3 * value


def _fill(row: Row, samples: Sequence[Sample]) -> None:
    times = sorted(1e3 * sample.seconds for sample in samples)
    row.median_ms = statistics.median(times)
    row.p20_ms = times[int(0.2 * (len(times) - 1))]
    row.p80_ms = times[round(0.8 * (len(times) - 1))]
    row.repeats = len(times)
    used = [sample.cpu_seconds for sample in samples if sample.cpu_seconds is not None]
    row.cpu_ms = 1e3 * statistics.median(used) if used else None


def _fill_rates(
    row: Row, bytes_moved: int, bandwidth: float, flops: int | None, rate: float | None
) -> None:
    assert row.median_ms is not None
    if row.ours:
        row.gb_per_s = bytes_moved / row.median_ms / 1e6
        row.of_bandwidth = row.gb_per_s / bandwidth
    if flops is not None:
        row.tflops = flops / row.median_ms / 1e9
        row.of_matmul = row.tflops / rate if rate is not None else None


def _fill_gains(rows: dict[str, Row], timed: Sequence[Contender]) -> None:
    peers = {c.name: c.compiled for c in timed if not c.ours}
    for row in rows.values():
        if row.ours and row.median_ms is not None:
            row.gain = _gain(row, [rows[name] for name in peers])
            row.gain_over_eager = _gain(
                row, [rows[name] for name, compiled in peers.items() if not compiled]
            )


def _gain(row: Row, peers: Sequence[Row]) -> float | None:
    times = [peer.median_ms for peer in peers if peer.median_ms is not None]
    return min(times) / row.median_ms if times and row.median_ms is not None else None


# ---- out ----------------------------------------------------------------------------------------


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
