"""Causal attention inside the segments of a packed batch, with gradients.

Segment s holds tokens cu_seqlens[s] .. cu_seqlens[s + 1] - 1. Token i of a segment sees tokens

    max(0, i - window + 1) <= j <= i        (window None: from 0)

of it, and with query head h reading key-value head h // (Hq / Hkv)

    lse_i = ln sum_j exp(scale q_i . k_j)
    p_ij  = exp(scale q_i . k_j - lse_i)
    out_i = sum_j p_ij v_j

The backward forms p again from lse (Dao et al., FlashAttention, 2022); D_i = out_i . grad_out_i

    g_ij   = p_ij (grad_out_i . v_j - D_i)
    grad_q = scale g k        grad_k = scale g^T q        grad_v = p^T grad_out

so nothing of the size of the scores exists. Sums are fp32 in a fixed order: the same bits twice,
for any number of threads, and whatever segments stand beside. NaN in a segment stays in it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from rlhf_fast_kernels import dispatch, native, reference, triton_support
from rlhf_fast_kernels.checked_mode import reads_values
from rlhf_fast_kernels.page_arguments import MAX_HEAD_DIM, check_heads, check_index
from rlhf_fast_kernels.registry import is_plain

OP = "packed_attention"
Gradients = tuple[Tensor, Tensor, Tensor]


# ---- launchers ----------------------------------------------------------------------------------
#
# forward(q, k, v, cu_seqlens, scale, window, max_length) -> (out, lse), and
# backward(q, k, v, cu_seqlens, scale, window, max_length, out, lse, grad_out) -> gradients.


class _Reference:
    @staticmethod
    def forward(
        q: Tensor, k: Tensor, v: Tensor, cu: Tensor, scale: float, window: int | None, _longest: int
    ) -> tuple[Tensor, Tensor]:
        return reference.packed_attention(q, k, v, cu, scale=scale, window=window)

    @staticmethod
    def backward(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu: Tensor,
        scale: float,
        window: int | None,
        _longest: int,
        *of_out: Tensor,
    ) -> Gradients:
        return reference.packed_attention_backward(
            *(q, k, v, cu, *of_out), scale=scale, window=window
        )


def _heads(x: Tensor) -> tuple[int, int, int]:
    return x.data_ptr(), x.stride(0), x.stride(1)


def _run_native(
    function: Any,
    tensors: tuple[Tensor, ...],
    cu: Tensor,
    lse: Tensor,
    scale: float,
    window: int | None,
) -> None:
    q, k = tensors[:2]
    function(
        native.DTYPE_CODES[q.dtype],
        (len(cu) - 1, q.shape[1], k.shape[1], q.shape[2]),
        cu.data_ptr(),
        scale,
        window or 0,
        tuple(map(_heads, tensors)),
        lse.data_ptr(),
        native.thread_count(),
    )


def native_forward(
    q: Tensor, k: Tensor, v: Tensor, cu: Tensor, scale: float, window: int | None
) -> tuple[Tensor, Tensor]:
    """(out, lse) in C++ on CPU tensors that fit, for ops that made sure of it."""
    out, lse = _results(q)
    _run_native(native.core().packed_attention, (q, k, v, out), cu, lse, scale, window)
    return out, lse


def native_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu: Tensor,
    scale: float,
    window: int | None,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    grads: Gradients,
) -> None:
    """Write the gradients of q, k and v, of any strides of tokens and heads."""
    function = native.core().packed_attention_backward
    _run_native(function, (q, k, v, out, grad_out, *grads), cu, lse, scale, window)


class _Native:
    @staticmethod
    def forward(
        q: Tensor, k: Tensor, v: Tensor, cu: Tensor, scale: float, window: int | None, _longest: int
    ) -> tuple[Tensor, Tensor]:
        return native_forward(q, k, v, cu, scale, window)

    @staticmethod
    def backward(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu: Tensor,
        scale: float,
        window: int | None,
        _longest: int,
        *of_out: Tensor,
    ) -> Gradients:
        grads = _like(q), _like(k), _like(v)
        native_backward(q, k, v, cu, scale, window, *of_out, grads)  # type: ignore[call-arg,arg-type]
        return grads


class _Triton:
    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, Tensor]:
        out, lse = _results(arguments[0])
        triton_support.kernels(OP).forward(*arguments, out, lse)
        return out, lse

    @staticmethod
    def backward(*arguments: Any) -> Gradients:
        grads = _like(arguments[0]), _like(arguments[1]), _like(arguments[2])
        triton_support.kernels(OP).backward(*arguments, *grads)
        return grads


def _results(q: Tensor) -> tuple[Tensor, Tensor]:
    """New out and lse; tokens of no segment do not exist, so all of it is written."""
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    return _like(q), torch.empty(q.shape[:2], dtype=wide, device=q.device)


def _like(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


# ---- autograd and torch.library -----------------------------------------------------------------

Settings = tuple[float, int | None, int, str]  # scale, window, max_length, impl


def _forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, settings: Settings
) -> tuple[Tensor, Tensor]:
    scale, window, longest, impl = settings
    chosen: Any = dispatch.choose(OP, impl, q).function
    result: tuple[Tensor, Tensor] = chosen.forward(q, k, v, cu_seqlens, scale, window, longest)
    return result


def _backward(saved: tuple[Tensor, ...], settings: Settings, grad_out: Tensor) -> Gradients:
    q, k, v, cu_seqlens, out, lse = saved
    scale, window, longest, impl = settings
    if grad_out.shape[-1] > 1 and grad_out.stride(-1) != 1:
        grad_out = grad_out.contiguous()
    chosen: Any = dispatch.choose(OP, impl, q).function
    grads: Gradients = chosen.backward(
        *(q, k, v, cu_seqlens, scale, window, longest, out, lse, grad_out.to(q.dtype))
    )
    return grads


class _PackedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, settings: Settings
    ) -> tuple[Tensor, Tensor]:
        out, lse = _forward(q, k, v, cu_seqlens, settings)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(lse)
        ctx.save_for_backward(q, k, v, cu_seqlens, out, lse)
        ctx.settings = settings
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, _lse: Any) -> tuple[Tensor | None, ...]:
        # `once_differentiable` would let a gradient of the gradient pass that misses this part.
        if torch.is_grad_enabled():
            raise RuntimeError(
                f"{OP}: gradients of its gradients do not exist; call backward without "
                "create_graph=True, or attend with torch's scaled_dot_product_attention"
            )
        if grad_out is None:
            return (None,) * 5
        return (*_backward(ctx.saved_tensors, ctx.settings, grad_out), None, None)


@torch.library.custom_op("rlhf_fast::packed_attention", mutates_args=())
def _op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    scale: float,
    window: int | None,
    max_length: int,
    impl: str,
) -> tuple[Tensor, Tensor]:
    if reads_values(q):
        _check_values(OP, q, cu_seqlens)
    return _forward(q, k, v, cu_seqlens, (scale, window, max_length, impl))


@_op.register_fake
def _op_fake(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return _results(q)


@torch.library.custom_op("rlhf_fast::packed_attention_backward", mutates_args=())
def _backward_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    scale: float,
    window: int | None,
    max_length: int,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    settings = (scale, window, max_length, impl)
    return _backward((q, k, v, cu_seqlens, out, lse), settings, grad_out)


@_backward_op.register_fake
def _backward_op_fake(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Gradients:
    return _like(q), _like(k), _like(v)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:4], *output)
    ctx.settings = inputs[4:]


def _op_backward(ctx: Any, grad_out: Tensor, _lse: Any) -> tuple[Tensor | None, ...]:
    grads = _backward_op(*ctx.saved_tensors, grad_out, *ctx.settings)
    return (*grads, *(None,) * 5)


_op.register_autograd(_op_backward, setup_context=_setup_context)


# ---- arguments ----------------------------------------------------------------------------------


def _check(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float, window: int | None
) -> None:
    check_heads(OP, "q", q, q)
    check_heads(OP, "k", k, q)
    check_heads(OP, "v", v, q)
    if k.shape != v.shape or len(k) != len(q):
        found = f"k is {list(k.shape)}, v {list(v.shape)}, q {list(q.shape)}"
        raise ValueError(f"{OP}: {found}; expected k and v [{len(q)}, Hkv, {q.shape[2]}]")
    if k.shape[1] < 1 or q.shape[1] % k.shape[1] != 0:
        raise ValueError(f"{OP}: q has {q.shape[1]} heads, k {k.shape[1]}; expected a multiple")
    _check_offsets(OP, q, cu_seqlens)
    if not -math.inf < scale < math.inf:  # no isfinite of a symbolic number while tracing
        raise ValueError(f"{OP}: scale is {scale}; expected a finite number")
    if window is not None and window < 1:
        raise ValueError(f"{OP}: window is {window}; expected at least 1 or None")


def check_segments(op: str, x: Tensor, cu_seqlens: Tensor) -> None:
    """Refuse offsets that do not cut the rows of x into segments; their values on a CPU alone.

    Raises:
        ValueError, TypeError: naming `op`.
    """
    _check_offsets(op, x, cu_seqlens)
    if reads_values(x):
        _check_values(op, x, cu_seqlens)


def _check_offsets(op: str, x: Tensor, cu_seqlens: Tensor) -> None:
    if cu_seqlens.dim() != 1 or len(cu_seqlens) < 1:
        raise ValueError(f"{op}: cu_seqlens is {list(cu_seqlens.shape)}; expected [K + 1]")
    check_index(op, "cu_seqlens", cu_seqlens, torch.int32, tuple(cu_seqlens.shape), x)


def _check_values(op: str, x: Tensor, cu_seqlens: Tensor) -> None:
    # This runs once a layer: a list of some numbers is quicker than three operations on a tensor.
    offsets = cu_seqlens.tolist()
    if offsets[0] != 0 or offsets[-1] != len(x) or offsets != sorted(offsets):
        raise ValueError(
            f"{op}: cu_seqlens is {offsets}; expected offsets that rise from 0 to {len(x)}"
        )


# ---- the public function ------------------------------------------------------------------------


def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    *,
    scale: float | None = None,
    window: int | None = None,
    max_length: int | None = None,
    impl: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of every token over its own segment up to itself.

    Args:
        q: `[N, Hq, D]`, D at most 256; fp32 and bf16 everywhere, fp16 also on a GPU (others run in
            the reference). Any strides of tokens and heads: a view of a fused qkv product, or of
            `[heads, N, D]`.
        k, v: `[N, Hkv, D]` in q's dtype; Hq is a multiple of Hkv.
        cu_seqlens: `[K + 1]` int32 offsets of the segments, from 0 to N; empty segments are legal.
        scale: of the scores; default D ** -0.5.
        window: tokens that a token sees, itself included.
        max_length: tokens of the longest segment, which the caller vouches for; it sizes a GPU's
            grid without waiting for the device. Default N.
        impl: implementation by name, see `rlhf_fast_kernels.dispatch`.

    Returns:
        out `[N, Hq, D]` in q's dtype, and lse `[N, Hq]` fp32 (fp64 for fp64) without gradient.

    Raises:
        ValueError, TypeError: shape, dtype, device or value of an argument. Offsets that do not
            rise from 0 to N are found on the CPU alone (and with RLHF_FAST_CHECK=1).
        RuntimeError: by backward, if it is called with create_graph=True.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    _check(q, k, v, cu_seqlens, scale, window)
    chosen = dispatch.choose(OP, impl, q).impl
    settings = (scale, window, len(q) if max_length is None else max_length, chosen)
    if torch.compiler.is_compiling() or not is_plain((q, k, v, cu_seqlens)):
        compiled: tuple[Tensor, Tensor] = _op(q, k, v, cu_seqlens, *settings)
        return compiled[0], compiled[1].detach()
    if reads_values(q):
        _check_values(OP, q, cu_seqlens)
    result: tuple[Tensor, Tensor] = _PackedAttention.apply(q, k, v, cu_seqlens, settings)
    return result


def unsupported(q: Tensor) -> str | None:
    """Why a faster implementation than the reference does not serve q's device, dtype and width.

    Args:
        q: `[N, Hq, D]`.
    """
    if q.shape[-1] > MAX_HEAD_DIM:
        return f"heads of {q.shape[-1]} elements, at most {MAX_HEAD_DIM}"
    choice = dispatch.choose(OP, None, q)
    if choice.impl == "reference":
        return f"{choice.reason}: the reference"
    return None


def _selftest(
    device: torch.device, dtype: torch.dtype, generator: torch.Generator
) -> dispatch.SelftestRun:
    def normal(heads: int) -> Tensor:
        return torch.randn(150, heads, 64, generator=generator).to(device, dtype)

    q, k, v, above = normal(4), normal(2), normal(2), normal(4)
    if dtype != torch.float32:
        # Results that are rounded to the other neighbour stay within the tolerance.
        v, above, q, k = v / 64, above / 64, q / 8, k / 8
    cu_seqlens = torch.tensor([0, 100, 100, 150], dtype=torch.int32).to(device)

    def run(impl: str) -> tuple[Tensor, ...]:
        x, y, z = (t.clone().requires_grad_() for t in (q, k, v))
        out, lse = packed_attention(x, y, z, cu_seqlens, window=70, impl=impl)
        return out.detach(), lse, *torch.autograd.grad(out, (x, y, z), above)

    return run


dispatch.register(OP, "reference", _Reference)
dispatch.register(
    OP,
    "cpu",
    _Native,
    native.on_cpu("packed_attention", "packed_attention_backward"),
    dtypes=tuple(native.DTYPE_CODES),
)
triton_support.register(OP, _Triton, preference=4)
dispatch.register_selftest(OP, _selftest)
