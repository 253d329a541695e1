"""Optimizer state in host memory while nobody steps, and back to the bit."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class HostState:
    """Moves the state tensors of an optimizer off its device and back.

    The optimizer's own `state` names the host tensors in between, so a checkpoint reads them as it
    always does. Host memory is pinned for CUDA and kept for the next time. Scalars (`step`) stay.

    Args:
        optimizer: any whose per-parameter state is a dictionary.

    Attributes:
        away: whether the state is on the host.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._twins: dict[tuple[Tensor, str], Tensor] = {}
        self.away = False

    def offload(self) -> None:
        """Copy every state tensor to the host and let go of its device memory.

        Returns when all copies are there: their sources are free and the host may read them.
        """
        if self.away:
            return
        self.away = True
        devices = set()
        for key, slots, tensor in self._tensors():
            twin = self._twins.get(key)
            if twin is None or twin.shape != tensor.shape or twin.dtype != tensor.dtype:
                twin = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
                self._twins[key] = twin
            twin.copy_(tensor, non_blocking=True)
            slots[key[1]] = twin
            if tensor.is_cuda:
                devices.add(tensor.device)
        for device in devices:
            torch.cuda.current_stream(device).synchronize()

    def restore(self) -> None:
        """Copy every state tensor back to its parameter's device; later work there comes after."""
        if not self.away:
            return
        for (parameter, name), slots, tensor in self._tensors():
            back = torch.empty_like(tensor, device=parameter.device, pin_memory=False)
            slots[name] = back.copy_(tensor, non_blocking=True)
        self.away = False

    def tensors(self) -> Iterator[tuple[Tensor, Tensor, bool]]:
        """(parameter, state tensor, whether in host memory), host copies kept for later too."""
        for parameter, slots in self._optimizer.state.items():
            for value in slots.values():
                if isinstance(value, Tensor):
                    yield parameter, value, self.away and value.dim() > 0
        if not self.away:
            for (parameter, _), twin in self._twins.items():
                yield parameter, twin, True

    def _tensors(self) -> list[tuple[tuple[Tensor, str], dict[str, Any], Tensor]]:
        return [
            ((parameter, name), slots, value)
            for parameter, slots in self._optimizer.state.items()
            for name, value in slots.items()
            if isinstance(value, Tensor) and value.dim() > 0
        ]
