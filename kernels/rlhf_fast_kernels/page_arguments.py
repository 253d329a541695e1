"""Checks that the ops on a paged key-value cache share."""

from __future__ import annotations

import torch
from torch import Tensor

MAX_HEAD_DIM = 256


def check_dims(op: str, name: str, x: Tensor, expected: str, dims: int) -> None:
    """Number of dims."""
    if x.dim() != dims:
        raise ValueError(f"{op}: {name} is {list(x.shape)}; expected {expected}")


def _check_like(op: str, name: str, x: Tensor, q: Tensor) -> None:
    if not x.dtype.is_floating_point or x.dtype != q.dtype:
        raise TypeError(f"{op}: {name} {list(x.shape)} is {x.dtype}; expected {q.dtype}, as q")
    if x.device != q.device:
        raise ValueError(f"{op}: {name} is on {x.device}; expected {q.device}, as q")
    if x.shape[-1] > 1 and x.stride(-1) != 1:
        expected = "a contiguous last dim"
        raise ValueError(
            f"{op}: {name} {list(x.shape)} has strides {x.stride()}; expected {expected}"
        )


def check_heads(op: str, name: str, x: Tensor, q: Tensor) -> None:
    """`[N, heads, D]` in the dtype and on the device of q, D as its."""
    check_dims(op, name, x, "[N, heads, D]", 3)
    if not 1 <= x.shape[-1] <= MAX_HEAD_DIM or x.shape[-1] != q.shape[-1]:
        expected = f"D in [1, {MAX_HEAD_DIM}], as of q {list(q.shape)}"
        raise ValueError(f"{op}: {name} is {list(x.shape)}; expected {expected}")
    if not x.dtype.is_floating_point:
        raise TypeError(f"{op}: {name} {list(x.shape)} is {x.dtype}; expected a float")
    _check_like(op, name, x, q)


def check_pages(op: str, name: str, x: Tensor, q: Tensor) -> None:
    """`[pages, page_size, Hkv, D]` in the dtype and on the device of q."""
    check_dims(op, name, x, "[pages, page_size, Hkv, D]", 4)
    if x.shape[-1] != q.shape[-1] or x.shape[1] < 1 or x.shape[2] < 1:
        expected = f"[pages, page_size, Hkv, {q.shape[-1]}]"
        raise ValueError(f"{op}: {name} is {list(x.shape)}; expected {expected}")
    _check_like(op, name, x, q)


def check_index(
    op: str, name: str, x: Tensor, dtype: torch.dtype, shape: tuple[int, ...], q: Tensor
) -> None:
    """Integers of one dtype and shape on the device of q, the last dim contiguous."""
    if x.dtype != dtype:
        raise TypeError(f"{op}: {name} {list(x.shape)} is {x.dtype}; expected {dtype}")
    if tuple(x.shape) != shape:
        raise ValueError(f"{op}: {name} is {list(x.shape)}; expected {list(shape)}")
    if x.device != q.device:
        raise ValueError(f"{op}: {name} is on {x.device}; expected {q.device}, as q")
    if x.shape[-1] > 1 and x.stride(-1) != 1:
        expected = "a contiguous last dim"
        raise ValueError(
            f"{op}: {name} {list(x.shape)} has strides {x.stride()}; expected {expected}"
        )


def check_range(op: str, name: str, x: Tensor, low: int, high: int) -> None:
    """Every value in [low, high]; reads the values."""
    if x.numel() == 0:
        return
    least, most = (int(end) for end in torch.aminmax(x))
    if least < low or most > high:
        found = least if least < low else most
        raise ValueError(f"{op}: {name} holds {found}; expected values in [{low}, {high}]")


def strides_of(x: Tensor) -> tuple[int, ...]:
    """Strides of all dims but the last, which is contiguous."""
    return x.stride()[:-1]
