"""The gated activation of Llama's feed-forward layers: silu(gate) * up.

    y[i] = gate[i] / (1 + exp(-gate[i])) * up[i]       gate = row[:I], up = row[I:]

Computed in fp32; as in Hugging Face's modules the activation is rounded to the dtype before the
product. -inf gives NaN, as PyTorch's silu does. For inference: no gradient.

`unchecked` and `prepare` are for engines, as those of `rms_norm`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn

import torch
from torch import Tensor

from rlhf_fast_kernels import dispatch, native, triton_support
from rlhf_fast_kernels.reference.silu_mul import silu_mul as reference_silu_mul
from rlhf_fast_kernels.registry import refuse_wrappers


def _refuse(gate_up: Tensor, out: Tensor | None) -> NoReturn:
    if not gate_up.dtype.is_floating_point:
        raise TypeError(f"silu_mul: gate_up must be floating point, got {gate_up.dtype}")
    if gate_up.dim() != 2 or gate_up.shape[1] % 2 != 0:
        raise ValueError(f"silu_mul: gate_up has shape {tuple(gate_up.shape)}, expected [N, 2 I]")
    assert out is not None
    if out.dtype != gate_up.dtype:
        raise TypeError(f"silu_mul: out is {out.dtype}, gate_up is {gate_up.dtype}")
    rows, columns = gate_up.shape
    raise ValueError(
        f"silu_mul: out has shape {tuple(out.shape)}, strides {out.stride()} on {out.device}, "
        f"expected [{rows}, {columns // 2}] on {gate_up.device} with adjacent elements of a row"
    )


def _fits(gate_up: Tensor, out: Tensor | None) -> bool:
    if gate_up.dim() != 2 or not gate_up.dtype.is_floating_point:
        return False
    rows, columns = gate_up.shape
    if columns % 2 != 0:
        return False
    return out is None or (
        out.shape == (rows, columns // 2)
        and out.dtype is gate_up.dtype
        and out.stride(1) == 1
        and out.device == gate_up.device
    )


# ---- C++ ----------------------------------------------------------------------------------------


def _arguments(gate_up: Tensor, out: Tensor) -> tuple[int, ...]:
    """Of `_core.silu_mul`: plain numbers."""
    rows, columns = out.shape
    return (
        *(native.DTYPE_CODES[out.dtype], rows, columns, gate_up.data_ptr(), gate_up.stride(0)),
        *(out.data_ptr(), out.stride(0), torch.get_num_threads()),
    )


def unchecked(gate_up: Tensor, out: Tensor) -> None:
    """`silu_mul` in C++ on CPU tensors that fit, for callers that made sure of it.

    fp32 or bf16, both of one dtype, rows with adjacent elements. Needs
    `native.missing("silu_mul") is None`. Anything else reads or writes foreign memory.
    """
    native.core().silu_mul(*_arguments(gate_up, out))()


def prepare(gate_up: Tensor, out: Tensor) -> Callable[[], None]:
    """The same as a call without arguments, for buffers that stay where they are.

    Addresses, shapes and the number of threads are read now; the caller keeps the tensors alive.
    """
    bound: Callable[[], None] = native.core().silu_mul(*_arguments(gate_up, out))
    return bound


def _native(gate_up: Tensor, out: Tensor) -> None:
    if gate_up.stride(1) != 1:
        gate_up = gate_up.contiguous()
    native.core().silu_mul(*_arguments(gate_up, out))()


# ---- Triton -------------------------------------------------------------------------------------


def _triton(gate_up: Tensor, out: Tensor) -> None:
    kernels = triton_support.kernels("silu_mul")
    if gate_up.stride(1) != 1:
        gate_up = gate_up.contiguous()
    rows, columns = out.shape
    parts = kernels.parts_of(columns)
    if rows * parts == 0:
        return
    triton_support.launch(
        kernels.silu_mul_kernel,
        rows * parts,
        out.device,
        *(gate_up, out, parts, columns, gate_up.stride(0), out.stride(0)),
        BLOCK=kernels.BLOCK,
        num_warps=kernels.NUM_WARPS,
    )


# ---- public function ----------------------------------------------------------------------------


def silu_mul(gate_up: Tensor, *, out: Tensor | None = None, impl: str | None = None) -> Tensor:
    """silu(gate) * up of rows that hold the gate in their first half and up in the second.

    Args:
        gate_up: `[N, 2 I]`; any strides, dense rows are read where they lie.
        out: where to write, `[N, I]` of the same dtype, adjacent elements of a row; may be
            `gate_up[:, :I]`. None: a new tensor.
        impl: implementation by name, see `rlhf_fast_kernels.dispatch`.

    Returns:
        out. Carries no gradient.

    Raises:
        ValueError: shapes, strides or devices that do not fit. TypeError: dtypes that do not.
    """
    if not _fits(gate_up, out):
        _refuse(gate_up, out)
    if out is None:
        rows, columns = gate_up.shape
        out = gate_up.new_empty((rows, columns // 2))
    refuse_wrappers("silu_mul", gate_up=gate_up, out=out)
    dispatch.choose("silu_mul", impl, gate_up).function(gate_up, out)
    return out


def _selftest(
    device: torch.device, dtype: torch.dtype, generator: torch.Generator
) -> dispatch.SelftestRun:
    gate_up = 3 * torch.randn(5, 600, generator=generator)
    if dtype != torch.float32:  # gates that are their own activation, to the last bit of bf16
        gate_up[:, :300] = (10 * gate_up[:, :300]).abs().clamp(min=16)
    gate_up = gate_up.to(device, dtype)
    return lambda impl: (silu_mul(gate_up, impl=impl),)


dispatch.register("silu_mul", "reference", torch.no_grad()(reference_silu_mul))
dispatch.register(
    "silu_mul",
    "cpu",
    _native,
    native.on_cpu("silu_mul", "BoundOp"),
    dtypes=tuple(native.DTYPE_CODES),
)
triton_support.register("silu_mul", _triton)
dispatch.register_selftest("silu_mul", _selftest)
