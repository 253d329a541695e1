"""Streams, events and graphs of `torch.cuda`."""

from __future__ import annotations

import threading
import time
from typing import Any

import simulated_cuda
import torch


def _device(device: Any = None) -> torch.device:
    device = torch.device("cuda") if device is None else device
    device = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    index = simulated_cuda.current_device() if device.index is None else device.index
    return torch.device("cuda", index)


def _wait(what: str) -> None:
    """The host waits: not in a capture. `set_sync_debug_mode` does not look at these."""
    mode = simulated_cuda.sync_mode()
    simulated_cuda.set_sync_mode(0)
    try:
        simulated_cuda.waits_for_the_device(what)
    finally:
        simulated_cuda.set_sync_mode(mode)


class Stream(torch.Stream):
    """`torch.cuda.Stream`."""

    def __new__(cls, device: Any = None, priority: int = 0, **known: Any) -> Any:
        if known:
            return super().__new__(cls, **known)
        return super().__new__(cls, device=_device(device), priority=priority)

    def wait_stream(self, other: Any) -> None:
        self.wait_event(other.record_event())

    def record_event(self, event: Any = None) -> Any:
        event = Event() if event is None else event
        event.record(self)
        return event

    def wait_event(self, event: Any) -> None:
        assert event.recorded is not None

    def synchronize(self) -> None:
        _wait("synchronize a stream")

    def query(self) -> bool:
        return True

    @property
    def cuda_stream(self) -> int:
        return self.stream_id

    def __eq__(self, other: object) -> bool:
        return isinstance(other, torch.Stream) and self.stream_id == other.stream_id

    def __hash__(self) -> int:
        return hash(self.stream_id)


class Event(torch.Event):
    """`torch.cuda.Event`: streams that PyTorch makes in C++ are told to wait for it, too."""

    def __new__(cls, enable_timing: bool = False, **_: Any) -> Any:
        return super().__new__(cls, device=_device())

    def __init__(self, enable_timing: bool = False, **_: Any) -> None:
        self.enable_timing = enable_timing
        self.recorded: float | None = None

    def record(self, stream: Any = None) -> None:
        self.recorded = time.perf_counter()

    def wait(self, stream: Any = None) -> None:
        """Streams run in order."""

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        _wait("synchronize an event")

    def elapsed_time(self, end: Event) -> float:
        if not (self.enable_timing and end.enable_timing):
            raise RuntimeError("Both events must be created with argument 'enable_timing=True'.")
        assert self.recorded is not None
        assert end.recorded is not None
        return (end.recorded - self.recorded) * 1e3


_local = threading.local()


def _current() -> dict[int, Any]:
    if not hasattr(_local, "streams"):
        _local.streams = {}
    return _local.streams


def default_stream(device: Any = None) -> Any:
    index = _device(device).index
    return Stream(stream_id=0, device_index=index, device_type=1)


def current_stream(device: Any = None) -> Any:
    return _current().get(_device(device).index) or default_stream(device)


def set_stream(stream: Any) -> None:
    _current()[stream.device_index] = stream


class StreamContext:
    """`torch.cuda.stream`."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def __enter__(self) -> None:
        if self.stream is not None:
            self._device = simulated_cuda.current_device()
            self._before = current_stream(self.stream.device_index)
            simulated_cuda.set_device(self.stream.device_index)
            set_stream(self.stream)

    def __exit__(self, *_: object) -> None:
        if self.stream is not None:
            set_stream(self._before)
            simulated_cuda.set_device(self._device)


class CUDAGraph:
    """`torch.cuda.CUDAGraph`."""

    def __init__(self, keep_graph: bool = False) -> None:
        self._graph = simulated_cuda.Graph()

    def capture_begin(self, pool: Any = None, capture_error_mode: str = "global") -> None:
        self._graph.begin()

    def capture_end(self) -> None:
        self._graph.end()

    def replay(self) -> None:
        self._graph.replay()

    def reset(self) -> None:
        self._graph.reset()

    def pool(self) -> tuple[int, int]:
        return (0, 1)


class graph:
    """`torch.cuda.graph`."""

    def __init__(
        self,
        cuda_graph: CUDAGraph,
        pool: Any = None,
        stream: Any = None,
        capture_error_mode: str = "global",
    ) -> None:
        self._graph = cuda_graph
        self._context = StreamContext(Stream() if stream is None else stream)

    def __enter__(self) -> None:
        _wait("synchronize")
        self._context.__enter__()
        self._graph.capture_begin()

    def __exit__(self, *error: object) -> None:
        self._graph.capture_end()
        self._context.__exit__(*error)


def table() -> dict[str, Any]:
    """Names in `torch.cuda`."""
    return {
        "Stream": Stream,
        "Event": Event,
        "StreamContext": StreamContext,
        "stream": StreamContext,
        "default_stream": default_stream,
        "current_stream": current_stream,
        "set_stream": set_stream,
        "synchronize": lambda device=None: _wait("synchronize a device"),
        "CUDAGraph": CUDAGraph,
        "graph": graph,
        "graph_pool_handle": lambda: (0, 1),
        "is_current_stream_capturing": simulated_cuda.capturing,
    }
