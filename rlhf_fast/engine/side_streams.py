"""Streams beside the current one on a CUDA device, made once and used again.

cuBLAS keeps a workspace for every stream that it was ever called on, 32 MiB on an H100, to the end
of the process. PyTorch hands out 32 streams in turn, so a stream a rollout would come to 1 GiB.
"""

from __future__ import annotations

import threading
from typing import Any

import torch


class _Made(threading.local):
    """A capture fails if another thread uses its stream; handles of cuBLAS are a thread's own."""

    def __init__(self) -> None:
        self.streams: dict[tuple[int, str], Any] = {}


_made = _Made()


def side_stream(device: torch.device, purpose: str) -> Any:
    """This thread's stream of a device for one purpose; None where there are no streams."""
    if device.type != "cuda":
        return None
    index = torch.cuda.current_device() if device.index is None else device.index
    key = index, purpose
    if key not in _made.streams:
        _made.streams[key] = torch.cuda.Stream(device)
    return _made.streams[key]
