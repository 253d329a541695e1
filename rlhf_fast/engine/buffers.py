"""Buffers whose memory comes and goes while the views of them stay."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor


def allocate_again(buffers: Iterable[Tensor]) -> None:
    """Memory for buffers that begin their storages, without values."""
    for buffer in buffers:
        buffer.untyped_storage().resize_(buffer.numel() * buffer.itemsize)


def give_up(buffers: Iterable[Tensor]) -> None:
    """Give the memory back; views keep their shapes and lose their values."""
    for buffer in buffers:
        buffer.untyped_storage().resize_(0)


def nbytes_of(buffers: Iterable[Tensor]) -> int:
    """Bytes of memory that the buffers have now."""
    return sum(buffer.untyped_storage().nbytes() for buffer in buffers)
