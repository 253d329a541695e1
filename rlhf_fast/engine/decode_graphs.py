"""CUDA graphs of the decoding step: one launch from the host for all kernels of a step.

A graph holds forward, sampling and bookkeeping of one batch bucket. Rows beyond the running ones
pad the bucket: they read page 0, store nothing and write to a row of the completions that nobody
reads. The steps of a burst are replays one after the other, without a look from the host.

What shapes a launch is in the key of a graph: the bucket, whether a filter of sampling is in use,
and the bucket of the longest context, which sets the splits of attention. What a graph reads lies
at fixed addresses for a run; graphs live as long as the run, so weights that move or pages that are
allocated anew between rollouts never meet an old graph, and within a run addresses are compared
before every burst.

The first step of a key runs as it is, which compiles its kernels; the second is recorded. Buckets
shrink as a run drains, so the largest is recorded first and the others take its pool's memory.
Where recording fails, the steps run as they are, at the same padded width: the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from rlhf_fast.engine.decode_rows import DecodeRows
from rlhf_fast.engine.paged_batch import PagedForward
from rlhf_fast.engine.paged_cache import PagedCache
from rlhf_fast.engine.side_streams import side_stream
from rlhf_fast_kernels.spoilt_captures import abandon

BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
# Splits beyond a row's context end at once: a coarse bucket costs little, a graph costs a capture.
FEWEST_PAGES = 4


class Recorder(Protocol):
    """Records launches once, to repeat them."""

    pool_bytes: int

    def record(self, body: Callable[[], None], inputs: Sequence[Tensor]) -> Callable[[], None]:
        """Record what `body` launches, without running it; returns the replay.

        Args:
            body: must not wait for the device.
            inputs: what the replays read and write; stays where it is.
        """
        ...


class GraphReport(NamedTuple):
    """What the graphs of a run were.

    Args:
        recorded: graphs.
        replays: steps that were replayed.
        eager: steps that ran as they are.
        pool_bytes: memory of the graphs.
        reason: why nothing was recorded any more; None: recording worked.
    """

    recorded: int = 0
    replays: int = 0
    eager: int = 0
    pool_bytes: int = 0
    reason: str | None = None


def bucket_of(rows: int) -> int:
    """Rows of the smallest graph that holds so many; above the largest, multiples of 256."""
    return next((b for b in BUCKETS if b >= rows), -(-rows // 256) * 256)


def context_bucket(longest: int, page_size: int, pages: int) -> int:
    """Tokens that launches are sized for: whole pages, a power of two, at most the run's."""
    needed = max(FEWEST_PAGES, -(-longest // page_size))
    return min(1 << (needed - 1).bit_length(), pages) * page_size


class DecodeGraphs:
    """The decoding steps of one run.

    Args:
        rows: of the run, with a capacity of `bucket_of` of its rows.
        forward: the model.
        cache: its pages.
        recorder: of this run.
    """

    def __init__(
        self, rows: DecodeRows, forward: PagedForward, cache: PagedCache, recorder: Recorder
    ) -> None:
        self._rows = rows
        self._forward = forward
        self._cache = cache
        self._recorder = recorder
        self._graphs: dict[tuple[int, int, bool], Callable[[], None]] = {}
        self._seen: set[tuple[int, int, bool]] = set()
        self._addresses: tuple[int, ...] = ()
        self._key = (0, 0, False)
        self._recorded = self._replays = self._eager = 0
        self.reason: str | None = None

    @property
    def report(self) -> GraphReport:
        """What happened so far."""
        return GraphReport(
            self._recorded, self._replays, self._eager, self._recorder.pool_bytes, self.reason
        )

    def prepare(self, longest: int) -> None:
        """Before a burst, in which no context grows beyond `longest` tokens."""
        rows, cache = self._rows, self._cache
        addresses = (*(t.data_ptr() for t in self._inputs()), *self._forward.addresses)
        if addresses != self._addresses:
            self._graphs.clear()
            self._seen.clear()
            self._addresses = addresses
        width = bucket_of(rows.count)
        rows.pad(width)
        pages = rows.page_table.shape[1]
        self._key = (width, context_bucket(longest, cache.page_size, pages), rows.warps)

    def step(self) -> None:
        """One token more for every row."""
        replay = self._graphs.get(self._key)
        if replay is None and self.reason is None and self._key in self._seen:
            replay = self._record()
        if replay is not None:
            replay()
            self._replays += 1
            return
        self._seen.add(self._key)
        self._run()
        self._eager += 1

    def _run(self) -> None:
        width, context, _ = self._key
        self._rows.step(self._forward, self._cache, width, context)

    def _record(self) -> Callable[[], None] | None:
        rows = self._rows
        rows.forget()  # what the forward sets up for a batch then lies in the graph's own memory
        try:
            replay = self._recorder.record(self._run, self._inputs())
        except Exception as error:  # whatever a kernel or a module does that a graph cannot hold
            first = (str(error).strip() or "no message").splitlines()[0]
            self.reason = f"{type(error).__name__}: {first}"
            return None
        finally:
            rows.forget()
        self._graphs[self._key] = replay
        self._recorded += 1
        return replay

    def _inputs(self) -> list[Tensor]:
        return [*self._rows.tensors, self._cache.storage]


class CudaRecorder:
    """Graphs of one pool on a CUDA device.

    `torch.cuda.graph` collects garbage and empties the allocator's cache around each capture, which
    costs more than the capture; a run that captures a dozen graphs needs neither.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = side_stream(device, "capture")
        self._first: torch.cuda.CUDAGraph | None = None
        self.pool_bytes = 0

    def record(self, body: Callable[[], None], inputs: Sequence[Tensor]) -> Callable[[], None]:
        """See `Recorder`."""
        graph = torch.cuda.CUDAGraph()
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        before = torch.cuda.memory_reserved(self._device)
        with torch.cuda.stream(self._stream):
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                body()
            except BaseException:
                with suppress(RuntimeError):  # it says again that the capture is spoilt
                    self._end(graph)
                raise
            self._end(graph)
        current.wait_stream(self._stream)
        # PyTorch refuses a pool whose graphs are all gone.
        self._first = self._first or graph
        self.pool_bytes += max(0, torch.cuda.memory_reserved(self._device) - before)
        return graph.replay

    def _end(self, graph: torch.cuda.CUDAGraph) -> None:
        try:
            graph.capture_end()
        except RuntimeError:
            abandon(graph, self._pool)
            raise
