"""How long calls take on a device, and how much memory they need beyond their inputs.

A clock takes turns of calls. On a CPU a turn is one interval, after a pause in which the worker
threads of the turn before stop spinning. On a GPU every call stands between two events, after a
flush of the second-level cache; the host runs ahead, so that its launches are hidden as far as they
can be, and `back_to_back` measures what they cost.
"""

from __future__ import annotations

import ctypes
import gc
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch

from rlhf_fast_kernels.spoilt_captures import abandon

PROC = Path("/proc/self")
RESET_PEAK = "5"  # man 5 proc: writing 5 to clear_refs resets VmHWM
PAUSE = 0.02
FLUSH_BYTES = 256 << 20  # at least; four times the second-level cache where that is more
# On a GPU, per contender: this many samples, unless they would take longer than this.
GPU_SAMPLES, GPU_SECONDS = 100, 2.0
BACK_TO_BACK_CALLS, BACK_TO_BACK_SECONDS = 1000, 1.0
GRAPH_REPLAYS = 100

Run = Callable[[int], Any]


class Sample(NamedTuple):
    """One call, or the mean of a turn of calls; cpu_seconds is of all threads, None on a GPU."""

    seconds: float
    cpu_seconds: float | None = None


class Clock(Protocol):
    """What `harness.measure` asks of a device; `run(k)` computes the op on input set k."""

    device: torch.device

    def calls_per_turn(self, run: Run, calls: int, repeats: int) -> int:
        """How many calls a turn has, given the wish of the bench script."""

    def turn(self, run: Run, ring: Sequence[int]) -> list[Sample]:
        """Run once on every input set in `ring`."""

    def back_to_back(self, run: Run, sets: int, repeats: int) -> float | None:
        """Wall seconds a call of many calls in a row; None where `turn` already measures that."""

    def graph(self, run: Run) -> float | None:
        """Seconds a replay of the call captured in a CUDA graph; None without one."""

    def extra_bytes(self, run: Run) -> int | None:
        """Growth of the peak over what was there before; None where the system cannot tell."""


def clock_of(device: torch.device) -> Clock:
    return CudaClock(device) if device.type == "cuda" else CpuClock()


# ---- CPU ----------------------------------------------------------------------------------------


def seconds(function: Callable[[], Any]) -> tuple[float, float]:
    """Wall and processor seconds of a call; what it returns is freed outside the measurement."""
    cpu, start = time.process_time(), time.perf_counter()
    result = function()
    wall, used = time.perf_counter() - start, time.process_time() - cpu
    del result
    return wall, used


class CpuClock:
    """Wall and processor time, and the peak resident set, which sees every allocator."""

    device = torch.device("cpu")

    def calls_per_turn(self, run: Run, calls: int, repeats: int) -> int:
        return calls

    def turn(self, run: Run, ring: Sequence[int]) -> list[Sample]:
        _let_others_settle()
        wall, used = seconds(partial(_run_all, run, ring))
        return [Sample(wall / len(ring), used / len(ring))]

    def back_to_back(self, run: Run, sets: int, repeats: int) -> float | None:
        return None

    def graph(self, run: Run) -> float | None:
        return None

    def extra_bytes(self, run: Run) -> int | None:
        """Growth of the peak resident set over the set before, results included.

        The allocator first gives its free pages back: a buffer that lands in pages which an earlier
        call left behind would not be seen.
        """
        gc.collect()
        try:
            _give_free_pages_back()
            (PROC / "clear_refs").write_text(RESET_PEAK, encoding="utf-8")
            before = _status("VmRSS")
            result = run(0)
            peak = _status("VmHWM")
        except (OSError, KeyError):
            return None
        del result
        return max(peak - before, 0)


def _let_others_settle() -> None:
    """Outlast the OpenMP threads of the last turn, which spin, without letting this core sleep.

    A core that slept wakes to cold caches and a low clock: that costs 0.2 ms, several times what
    the short ops take, and no training loop leaves such a gap between ops.
    """
    end = time.perf_counter() + PAUSE
    while time.perf_counter() < end:
        pass


def _run_all(run: Run, ring: Sequence[int]) -> Any:
    result = None
    for k in ring:
        result = run(k)
    return result


def _give_free_pages_back() -> None:
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it
    if trim is not None:
        trim(ctypes.c_size_t(0))


def _status(key: str) -> int:
    for line in (PROC / "status").read_text(encoding="utf-8").splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) << 10
    raise KeyError(key)


# ---- GPU ----------------------------------------------------------------------------------------


def _captured(stream: Any, call: Callable[[], Any]) -> Callable[[], None]:
    """The replay of a call. If it fails, `stream` is the current one again, and nothing captures.

    PyTorch leaves both otherwise, and the allocator may still look at the graph.
    """
    graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
    try:
        with torch.cuda.stream(stream), torch.cuda.graph(graph, pool=pool):
            call()
    except Exception:
        abandon(graph, pool)
        raise
    return graph.replay


class CudaClock:
    """Event times, one a call, with a cold second-level cache; peak of torch's allocator."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        self._flushed = torch.empty(
            max(FLUSH_BYTES, 4 * cache) // 4, dtype=torch.int32, device=device
        )

    def calls_per_turn(self, run: Run, calls: int, repeats: int) -> int:
        """Enough for GPU_SAMPLES in all; the wish, which is about CPU caches, does not matter."""
        wanted = -(-GPU_SAMPLES // repeats)
        call = max(sample.seconds for sample in self.turn(run, (0, 0, 0)))
        return max(1, min(wanted, int(GPU_SECONDS / repeats / max(call, 1e-6))))

    def turn(self, run: Run, ring: Sequence[int]) -> list[Sample]:
        pairs = []
        torch.cuda.synchronize(self.device)
        for k in ring:
            start = torch.cuda.Event(enable_timing=True)
            end = torch.cuda.Event(enable_timing=True)
            self._flushed.zero_()
            start.record()
            result = run(k)
            end.record()
            del result
            pairs.append((start, end))
        torch.cuda.synchronize(self.device)
        return [Sample(1e-3 * start.elapsed_time(end)) for start, end in pairs]

    def back_to_back(self, run: Run, sets: int, repeats: int) -> float | None:
        """The caches are warm here and the host is in the way: what a training loop pays."""
        per_call = self._wall(run, sets, 3)
        count = int(min(BACK_TO_BACK_CALLS, BACK_TO_BACK_SECONDS / per_call) / repeats)
        return statistics.median(self._wall(run, sets, max(3, count)) for _ in range(repeats))

    def _wall(self, run: Run, sets: int, count: int) -> float:
        torch.cuda.synchronize(self.device)
        start = time.perf_counter()
        for k in range(count):
            run(k % sets)
        torch.cuda.synchronize(self.device)
        return (time.perf_counter() - start) / count

    def graph(self, run: Run) -> float | None:
        """Replays on input set 0, warm caches; None (and a line on stderr) if it cannot capture."""
        try:
            side, current = torch.cuda.Stream(self.device), torch.cuda.current_stream(self.device)
            side.wait_stream(current)
            with torch.cuda.stream(side):
                run(0)
            current.wait_stream(side)
            replay = _captured(current, partial(run, 0))
        except Exception as problem:  # whatever forbids capture leaves one number out
            print(f"no CUDA graph: {problem}", file=sys.stderr)
            return None
        return self._wall(lambda _: replay(), 1, GRAPH_REPLAYS)

    def extra_bytes(self, run: Run) -> int | None:
        """Growth of the peak of torch's allocator over what inputs and weights already hold.

        A buffer that a library takes from the driver itself is not seen.
        """
        gc.collect()
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        result = run(0)
        torch.cuda.synchronize(self.device)
        peak = torch.cuda.max_memory_allocated(self.device)
        del result
        return max(peak - before, 0)
