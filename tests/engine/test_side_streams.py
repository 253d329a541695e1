"""Streams beside the current one, and what the recorder tells the allocator, without a GPU."""

from __future__ import annotations

import gc
import threading
import weakref
from contextlib import nullcontext
from typing import Any

import pytest
import torch

from rlhf_fast.engine.decode_graphs import CudaRecorder
from rlhf_fast.engine.overlap import Overlap
from rlhf_fast.engine.side_streams import _made, side_stream
from rlhf_fast_kernels import spoilt_captures

GPU = torch.device("cuda", 0)
POOL = (0, 7)


class Stream:
    """Of no device; counts how many were made."""

    made = 0

    def __init__(self, *_: object) -> None:
        Stream.made += 1

    def wait_stream(self, other: object) -> None:
        pass


class Graph:
    """A capture that ends well, or as one does in which somebody waited for the device."""

    spoilt = False

    def capture_begin(self, **_: object) -> None:
        pass

    def capture_end(self) -> None:
        if Graph.spoilt:
            raise RuntimeError("operation failed due to a previous error during capture")

    def replay(self) -> None:
        pass


@pytest.fixture(autouse=True)
def told(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What the allocator is told, on a device that is none."""
    found: list[tuple[Any, ...]] = []
    monkeypatch.setattr(Stream, "made", 0)
    monkeypatch.setattr(Graph, "spoilt", False)
    monkeypatch.setattr(_made, "streams", {})
    monkeypatch.setattr(spoilt_captures, "_GRAPHS", [])
    for name, value in {
        "Stream": Stream,
        "CUDAGraph": Graph,
        "current_device": lambda: 0,
        "current_stream": lambda _: Stream(),
        "graph_pool_handle": lambda: POOL,
        "memory_reserved": lambda _: 0,
        "stream": lambda _: nullcontext(),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
        monkeypatch.setattr(
            *(torch._C, name, lambda *args, name=name: found.append((name, *args))), raising=False
        )
    return found


def test_a_stream_serves_every_rollout_of_a_thread() -> None:
    first = side_stream(GPU, "score")
    assert side_stream(torch.device("cuda"), "score") is first
    assert side_stream(GPU, "capture") is not first
    assert side_stream(torch.device("cuda", 1), "score") is not first
    elsewhere: list[object] = []
    thread = threading.Thread(target=lambda: elsewhere.append(side_stream(GPU, "score")))
    thread.start()
    thread.join()
    assert elsewhere[0] is not first
    assert side_stream(torch.device("cpu"), "score") is None


def test_runs_and_rollouts_make_no_stream_of_their_own() -> None:
    class Prompts:
        class sequences:
            lengths = torch.ones(1)

        def __len__(self) -> int:
            return 1

    nothing: Any = None
    prompts: Any = Prompts()
    for _ in range(40):
        CudaRecorder(GPU)
        Overlap(
            *(nothing, prompts, nothing, 1, 0), capacity=1, surroundings=nullcontext, device=GPU
        )
    assert Stream.made == 2


def test_the_pool_of_a_run_outlives_its_first_graph(told: list[tuple[Any, ...]]) -> None:
    recorder = CudaRecorder(GPU)
    graph = weakref.ref(recorder.record(lambda: None, []).__self__)  # type: ignore[attr-defined]
    gc.collect()
    assert graph() is not None
    assert told == []


@pytest.mark.parametrize("spoilt", [False, True])
def test_a_failed_capture_is_over_for_the_allocator(
    spoilt: bool, told: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Graph, "spoilt", spoilt)

    def waits() -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.raises(RuntimeError, match="not permitted"):
        CudaRecorder(GPU).record(waits, [])
    calls = [("_cuda_endAllocateToPool", 0, POOL), ("_cuda_releasePool", 0, POOL)]
    assert told == (calls if spoilt else [])
    assert len(spoilt_captures._GRAPHS) == spoilt


def test_a_capture_that_fails_only_as_it_ends_is_over_as_well(
    told: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Graph, "spoilt", True)
    with pytest.raises(RuntimeError, match="previous error"):
        CudaRecorder(GPU).record(lambda: None, [])
    assert [call[0] for call in told] == ["_cuda_endAllocateToPool", "_cuda_releasePool"]
