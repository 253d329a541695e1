"""Host memory that a state is copied to, kept from one save to the next."""

from __future__ import annotations

import torch
from torch import Tensor


class HostBuffers:
    """One host tensor for every name; pinned for what comes from a GPU."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}
        self._devices: set[torch.device] = set()

    def copy(self, name: str, tensor: Tensor) -> Tensor:
        """The tensor's buffer, filled once `synchronize` has returned."""
        buffer = self._buffers.get(name)
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            buffer = torch.empty(
                tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=tensor.is_cuda
            )
            self._buffers[name] = buffer
        buffer.copy_(tensor.detach(), non_blocking=True)
        if tensor.is_cuda:
            self._devices.add(tensor.device)
        return buffer

    def synchronize(self) -> None:
        """Wait for all copies: what they were taken from may change now."""
        for device in self._devices:
            torch.cuda.current_stream(device).synchronize()
        self._devices.clear()
