"""Small tensors on their way to an accelerator."""

from __future__ import annotations

import torch
from torch import Tensor


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` on `device`; from the host to CUDA without waiting for what the device is doing.

    A plain copy waits for its stream, and so for every forward that was asked for before it. From
    pinned memory, which torch keeps until the copy is done, nobody waits.
    """
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def release_cached() -> None:
    """Give the device memory that the allocator keeps back, for blocks of other sizes."""
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
