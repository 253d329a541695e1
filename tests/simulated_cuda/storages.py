"""Storages on the simulated device: PyTorch makes and sizes them in code of its CUDA build."""

from __future__ import annotations

import itertools
import os
import weakref
from typing import Any

import simulated_cuda
import torch
import torch.storage


def _over(storage: Any, length: int) -> torch.Tensor:
    """Bytes of a storage as a tensor."""
    empty = torch.empty(0, dtype=torch.uint8, device=storage.device)
    return empty.set_(storage, 0, (length,), (1,))


def _copied(storage: Any, device: Any, non_blocking: bool = False) -> Any:
    device, size = torch.device(device), storage.size()
    copy = torch.empty(size, dtype=torch.uint8, device=device).untyped_storage()
    if size:
        _over(copy, size).copy_(_over(storage, size), non_blocking=non_blocking)
    return copy


_numbers = itertools.count()
_shared: weakref.WeakValueDictionary[bytes, Any] = weakref.WeakValueDictionary()


def _handles(storage: Any, *_: Any) -> tuple[Any, ...]:
    """As of CUDA IPC: good for as long as this process holds the storage."""
    file = simulated_cuda.share_storage(_over(storage, 0))
    # Files get the numbers of others that are closed, and PyTorch remembers what it has mapped by
    # the handle.
    handle = f"{next(_numbers)} /proc/{os.getpid()}/fd/{file}".encode()
    _shared[handle] = storage
    index = torch.device(storage.device).index
    return index, handle, storage.nbytes(), 0, b"counter", 0, b"event", False


def _of_handles(cls: Any, device: int, handle: bytes, size: int, *_: Any) -> Any:
    storage = _shared.get(handle)
    if storage is None:
        storage = torch.empty(0, dtype=torch.uint8, device=f"cuda:{device}").untyped_storage()
        path = handle.decode().partition(" ")[2]
        simulated_cuda.map_storage(_over(storage, 0), path, size)
    assert (storage.device.index, storage.nbytes()) == (device, size)
    return storage


def _nothing(*_: Any, **__: Any) -> None:
    """Nobody counts who has mapped what."""


def install() -> None:
    """Replace what asks for a CUDA build."""
    torch.UntypedStorage._share_cuda_ = _handles  # type: ignore[method-assign]
    torch.UntypedStorage._release_ipc_counter_cuda = _nothing  # type: ignore[method-assign]
    torch.UntypedStorage._new_shared_cuda = classmethod(_of_handles)  # type: ignore[assignment]
    resize, clone = torch.UntypedStorage.resize_, torch.UntypedStorage.clone

    def resized(self: Any, size: int) -> Any:
        if self.device.type != "cuda":
            return resize(self, size)
        simulated_cuda.resize_storage(_over(self, 0), size)
        return self

    def cloned(self: Any) -> Any:
        return _copied(self, self.device) if self.device.type == "cuda" else clone(self)

    torch.UntypedStorage.resize_ = resized  # type: ignore[method-assign]
    torch.UntypedStorage.clone = cloned  # type: ignore[method-assign]
    torch.storage._to = torch._utils._to = _copied
