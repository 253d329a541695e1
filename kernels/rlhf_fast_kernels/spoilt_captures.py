"""Captures of CUDA graphs that failed, which PyTorch's allocator takes to go on."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch

_GRAPHS: list[torch.cuda.CUDAGraph] = []


def abandon(graph: torch.cuda.CUDAGraph, pool: Any) -> None:
    """Tell the allocator that a spoilt capture is over: `capture_end` raises before it does.

    It would free nothing that other streams used any more, nor its cache before memory runs
    out. What the allocator of pinned memory asks about each stream points into the graph, so that
    is kept.

    Args:
        graph: whose capture failed on the current device.
        pool: handle of the memory that it captured into.
    """
    _GRAPHS.append(graph)
    index = torch.cuda.current_device()
    with suppress(RuntimeError):  # the allocator knows already
        torch._C._cuda_endAllocateToPool(index, pool)
        torch._C._cuda_releasePool(index, pool)
