"""Root-mean-square norm of rows, with the residual added before it in the same pass.

    y = x / sqrt(mean(x^2) + eps) * weight           Zhang and Sennrich 2019; Llama, Mistral, Qwen
    y = x / sqrt(mean(x^2) + eps) * (1 + weight)     offset = 1: Gemma
    residual += x; y = norm(residual)                with a residual

The mean is formed in fp32. With offset 0 the normalised row is rounded to the dtype of x before the
product with the weight, as Hugging Face's Llama does; otherwise the product with offset + weight is
formed in fp32 and rounded once, as its Gemma does. The sum with the residual is rounded to the
dtype before it is squared. For inference: no gradient.

Under autocast over fp32 masters the residual and the weight are fp32, what is added to it and what
the next product reads bf16 or fp16: the sum, the row and the product with the weight are then fp32,
and the result is rounded once.

An engine that calls this several times a layer and token skips the checks and the choice of the
implementation: `unchecked` runs the C++ on tensors that fit, and `prepare` reads addresses and
shapes once and returns the bare call, for buffers that stay where they are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn

import torch
from torch import Tensor

from rlhf_fast_kernels import dispatch, native, triton_support
from rlhf_fast_kernels.reference.rms_norm import rms_norm as reference_rms_norm
from rlhf_fast_kernels.registry import refuse_wrappers

_NARROW = (torch.bfloat16, torch.float16)


def _refuse(x: Tensor, weight: Tensor, residual: Tensor | None, out: Tensor | None) -> NoReturn:
    if not x.dtype.is_floating_point:
        raise TypeError(f"rms_norm: x must be floating point, got {x.dtype}")
    if x.dim() not in (2, 3):
        raise ValueError(f"rms_norm: x has shape {tuple(x.shape)}, expected [N, H] or [N, A, H]")
    columns = x.shape[-1]
    if weight.shape != (columns,) or not weight.is_contiguous():
        raise ValueError(
            f"rms_norm: weight has shape {tuple(weight.shape)} and strides {weight.stride()}, "
            f"expected contiguous [{columns}]"
        )
    for name, other in (("weight", weight), ("residual", residual), ("out", out)):
        if other is None:
            continue
        if name != "weight" and other.dtype not in (x.dtype, weight.dtype, *_NARROW):
            raise TypeError(f"rms_norm: {name} is {other.dtype}, x is {x.dtype}")
        if other.device != x.device:
            raise ValueError(f"rms_norm: {name} is on {other.device}, x on {x.device}")
        if name != "weight" and not _fits_rows(x, other):
            raise ValueError(
                f"rms_norm: {name} has shape {tuple(other.shape)} and strides {other.stride()}, "
                f"expected {tuple(x.shape)} with adjacent elements of a row, none twice"
            )
    types = ", ".join(
        f"{name} is {other.dtype}"
        for name, other in (("x", x), ("weight", weight), ("residual", residual), ("out", out))
        if other is not None
    )
    raise TypeError(f"rms_norm: {types}; expected one type, or fp32 weight and residual")


def _fits_types(x: Tensor, weight: Tensor, residual: Tensor | None, out: Tensor | None) -> bool:
    """One type for all, or fp32 weight and residual between narrower x and out."""
    stream = x.dtype if residual is None else residual.dtype
    kinds = {x.dtype, x.dtype if out is None else out.dtype}
    return weight.dtype is stream and (
        kinds == {stream} or (stream is torch.float32 and kinds <= {stream, *_NARROW})
    )


def _fits(x: Tensor, weight: Tensor) -> bool:
    return (
        x.dim() in (2, 3)
        and weight.shape == x.shape[-1:]
        and weight.is_contiguous()
        and weight.device == x.device
        and x.dtype.is_floating_point
    )


def _fits_rows(x: Tensor, other: Tensor | None) -> bool:
    """Whether rows like those of x can be written to `other`."""
    if other is None:
        return True
    strides = other.stride()
    return (
        other.shape == x.shape
        and strides[-1] == 1
        and (0 not in strides or other.is_contiguous())
        and other.device == x.device
    )


# ---- C++ ----------------------------------------------------------------------------------------


def _arguments(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None, offset: float, out: Tensor
) -> tuple[float, ...]:
    """Of `_core.rms_norm`: plain numbers."""
    shape, strides, out_strides = x.shape, x.stride(), out.stride()
    inner = shape[1] if len(shape) == 3 else 1
    if residual is None:
        address = residual_outer = residual_inner = 0
    else:
        address, kept = residual.data_ptr(), residual.stride()
        residual_outer, residual_inner = kept[0], kept[-2]
    return (
        *(native.DTYPE_CODES[x.dtype], shape[0] * inner, inner, shape[-1]),
        *(x.data_ptr(), strides[0], strides[-2], weight.data_ptr()),
        *(address, residual_outer, residual_inner),
        *(out.data_ptr(), out_strides[0], out_strides[-2]),
        *(eps, offset, torch.get_num_threads()),
    )


def unchecked(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None, offset: float, out: Tensor
) -> None:
    """`rms_norm` in C++ on CPU tensors that fit, for callers that made sure of it.

    fp32 or bf16, all of one dtype; rows of x, residual and out with adjacent elements. Needs
    `native.missing("rms_norm") is None`. Anything else reads or writes foreign memory.
    """
    native.core().rms_norm(*_arguments(x, weight, eps, residual, offset, out))()


def prepare(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None, offset: float, out: Tensor
) -> Callable[[], None]:
    """The same as a call without arguments, for buffers that stay where they are.

    Addresses, shapes and the number of threads are read now; the caller keeps the tensors alive.
    """
    bound: Callable[[], None] = native.core().rms_norm(
        *_arguments(x, weight, eps, residual, offset, out)
    )
    return bound


def _native(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None, offset: float, out: Tensor
) -> None:
    if x.stride(-1) != 1:
        x = x.contiguous()
    if x.dtype is weight.dtype is out.dtype:
        native.core().rms_norm(*_arguments(x, weight, eps, residual, offset, out))()
        return
    stream = x if residual is None else residual.add_(x)
    wide = stream.new_empty(stream.shape)
    native.core().rms_norm(*_arguments(stream, weight, eps, None, offset, wide))()
    out.copy_(wide)


# ---- Triton -------------------------------------------------------------------------------------


def _triton(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None, offset: float, out: Tensor
) -> None:
    kernels = triton_support.kernels("rms_norm")
    columns = x.shape[-1]
    if columns > kernels.WIDEST:
        raise ValueError(f"rms_norm (triton): rows of {columns}, at most {kernels.WIDEST}")
    if x.stride(-1) != 1:
        x = x.contiguous()
    rows = x.numel() // columns if columns else 0
    if rows == 0:
        return
    kept = (0, 0) if residual is None else residual.stride()
    strides, out_strides = x.stride(), out.stride()
    triton_support.launch(
        kernels.rms_norm_kernel,
        rows,
        x.device,
        *(x, weight, residual, out, x.shape[1] if x.dim() == 3 else 1, columns),
        *(strides[0], strides[-2], kept[0], kept[-2], out_strides[0], out_strides[-2]),
        *(eps, offset),
        OFFSET=offset != 0,
        **kernels.settings(columns),
    )


# ---- public function ----------------------------------------------------------------------------


def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    *,
    residual: Tensor | None = None,
    offset: float = 0.0,
    out: Tensor | None = None,
    impl: str | None = None,
) -> Tensor:
    """x / rms(x) * weight over the last dim; with a residual, of the sum that it then holds.

    Args:
        x: `[N, H]`, or `[N, A, H]` such as the heads of a fused projection; any strides, dense rows
            are read where they lie.
        weight: contiguous `[H]`, dtype of x; fp32 with an fp32 residual, or without one of an fp32
            x, while the other tensors are bf16 or fp16.
        eps: added to the mean of squares.
        residual: shape of x, dtype of weight, adjacent elements of a row; x is added to it in place
            first.
        offset: added to the weight: 1.0 for Gemma.
        out: where to write, shape of x, its dtype, or bf16 or fp16 beside an fp32 weight; adjacent
            elements of a row; may be x. None: a new tensor like x.
        impl: implementation by name, see `rlhf_fast_kernels.dispatch`.

    Returns:
        out. Carries no gradient.

    Raises:
        ValueError: shapes, strides or devices that do not fit. TypeError: dtypes that do not.
    """
    if not (
        _fits(x, weight)
        and _fits_rows(x, residual)
        and _fits_rows(x, out)
        and _fits_types(x, weight, residual, out)
    ):
        _refuse(x, weight, residual, out)
    if out is None:
        # empty_like costs half, but keeps the strides of a transposed x.
        out = torch.empty_like(x) if x.is_contiguous() else x.new_empty(x.shape)
    refuse_wrappers("rms_norm", x=x, weight=weight, residual=residual, out=out)
    dispatch.choose("rms_norm", impl, x).function(x, weight, eps, residual, offset, out)
    return out


def _selftest(
    device: torch.device, dtype: torch.dtype, generator: torch.Generator
) -> dispatch.SelftestRun:
    x, residual = (torch.randn(5, 300, generator=generator) for _ in range(2))
    if dtype != torch.float32:  # rows of +-2: nothing is rounded that another order could flip
        x = residual = x.sign()
    x, residual = x.to(device, dtype), residual.to(device, dtype)
    weight = torch.randn(300, generator=generator).to(device, dtype)

    def run(impl: str) -> tuple[Tensor, ...]:
        kept = residual.clone()
        return rms_norm(x, weight, 1e-6, residual=kept, impl=impl), kept

    return run


dispatch.register("rms_norm", "reference", torch.no_grad()(reference_rms_norm))
dispatch.register(
    "rms_norm",
    "cpu",
    _native,
    native.on_cpu("rms_norm", "BoundOp"),
    dtypes=tuple(native.DTYPE_CODES),
)
triton_support.register("rms_norm", _triton)
dispatch.register_selftest("rms_norm", _selftest)
