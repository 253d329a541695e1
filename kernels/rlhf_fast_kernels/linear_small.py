"""A linear layer for few rows on a CPU, in fp32, with bias and residual in the same pass.

    out[n, m] = sum_k x[n, k] weight[m, k] (+ bias[m]) (+ residual[n, m])

For decoding steps: up to about 64 rows, weights of hundreds to a few thousand rows and columns,
which are read as they lie. Another dtype or an accelerator gets PyTorch's linear layer. For
inference: no gradient.

`unchecked` and `prepare` are for engines, as those of `rms_norm`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn

import torch
from torch import Tensor

from rlhf_fast_kernels import dispatch, native
from rlhf_fast_kernels.reference.linear_small import linear_small as reference_linear_small
from rlhf_fast_kernels.registry import refuse_wrappers


def _refuse(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, out: Tensor | None
) -> NoReturn:
    if not x.dtype.is_floating_point:
        raise TypeError(f"linear_small: x must be floating point, got {x.dtype}")
    if x.dim() != 2:
        raise ValueError(f"linear_small: x has shape {tuple(x.shape)}, expected [N, K]")
    if weight.dim() != 2 or weight.shape[1] != x.shape[1]:
        raise ValueError(
            f"linear_small: weight has shape {tuple(weight.shape)}, expected [M, {x.shape[1]}]"
        )
    result = (x.shape[0], weight.shape[0])
    for name, other, shape in (
        ("weight", weight, tuple(weight.shape)),
        ("bias", bias, result[1:]),
        ("residual", residual, result),
        ("out", out, result),
    ):
        if other is None:
            continue
        if other.dtype != x.dtype:
            raise TypeError(f"linear_small: {name} is {other.dtype}, x is {x.dtype}")
        if other.device != x.device:
            raise ValueError(f"linear_small: {name} is on {other.device}, x on {x.device}")
        if not _rows(other, x, shape):
            raise ValueError(
                f"linear_small: {name} has shape {tuple(other.shape)} and strides "
                f"{other.stride()}, expected {shape} with adjacent elements of a row"
            )
    raise AssertionError("tensors that fit")


def _rows(tensor: Tensor | None, x: Tensor, shape: tuple[int, ...]) -> bool:
    return tensor is None or (
        tensor.shape == shape
        and tensor.dtype is x.dtype
        and (tensor.stride(-1) == 1 or tensor.shape[-1] < 2)
        and tensor.device == x.device
    )


def _fits(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, out: Tensor | None
) -> bool:
    if x.dim() != 2 or weight.dim() != 2 or not x.dtype.is_floating_point:
        return False
    result = (x.shape[0], weight.shape[0])
    return (
        _rows(weight, x, (result[1], x.shape[1]))
        and _rows(bias, x, result[1:])
        and _rows(residual, x, result)
        and _rows(out, x, result)
    )


def _arguments(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, out: Tensor
) -> tuple[int, ...]:
    """Of `_core.linear_small`: plain numbers."""
    rows, columns = out.shape
    return (
        *(rows, x.shape[1], columns, x.data_ptr(), x.stride(0)),
        *(weight.data_ptr(), weight.stride(0), 0 if bias is None else bias.data_ptr()),
        *((0, 0) if residual is None else (residual.data_ptr(), residual.stride(0))),
        *(out.data_ptr(), out.stride(0), torch.get_num_threads()),
    )


def unchecked(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, out: Tensor
) -> None:
    """`linear_small` in C++ on CPU tensors that fit, for callers that made sure of it.

    fp32, rows with adjacent elements, out apart from x. Needs
    `native.missing("linear_small") is None`. Anything else reads or writes foreign memory.
    """
    native.core().linear_small(*_arguments(x, weight, bias, residual, out))()


def prepare(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, out: Tensor
) -> Callable[[], None]:
    """The same as a call without arguments, for buffers that stay where they are.

    Addresses, shapes and the number of threads are read now; the caller keeps the tensors alive.
    """
    bound: Callable[[], None] = native.core().linear_small(
        *_arguments(x, weight, bias, residual, out)
    )
    return bound


def _native(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, out: Tensor
) -> None:
    if x.stride(1) != 1:
        x = x.contiguous()
    native.core().linear_small(*_arguments(x, weight, bias, residual, out))()


def linear_small(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    out: Tensor | None = None,
    *,
    impl: str | None = None,
) -> Tensor:
    """x @ weight^T (+ bias) (+ residual) for few rows.

    Args:
        x: `[N, K]`, any strides, dense rows are read where they lie; N up to about 64.
        weight: `[M, K]`, adjacent elements of a row, as in `torch.nn.Linear`.
        bias: `[M]`.
        residual: `[N, M]`, adjacent elements of a row; is not written.
        out: where to write, `[N, M]`, adjacent elements of a row; may be the residual, not x. None:
            a new tensor.
        impl: implementation by name, see `rlhf_fast_kernels.dispatch`.

    Returns:
        out, dtype of x. Carries no gradient.

    Raises:
        ValueError: shapes, strides or devices that do not fit. TypeError: dtypes that do not.
    """
    if not _fits(x, weight, bias, residual, out):
        _refuse(x, weight, bias, residual, out)
    if out is None:
        out = x.new_empty((x.shape[0], weight.shape[0]))
    refuse_wrappers("linear_small", x=x, weight=weight, bias=bias, residual=residual, out=out)
    dispatch.choose("linear_small", impl, x).function(x, weight, bias, residual, out)
    return out


def _selftest(
    device: torch.device, dtype: torch.dtype, generator: torch.Generator
) -> dispatch.SelftestRun:
    x, weight = torch.randn(9, 50, generator=generator), torch.randn(37, 50, generator=generator)
    x, weight = x.to(device, dtype), weight.to(device, dtype) / 7
    return lambda impl: (linear_small(x, weight, impl=impl),)


dispatch.register("linear_small", "reference", torch.no_grad()(reference_linear_small))
dispatch.register(
    "linear_small",
    "cpu",
    _native,
    native.on_cpu("linear_small", "BoundOp"),
    dtypes=(torch.float32,),
)
dispatch.register_selftest("linear_small", _selftest)
