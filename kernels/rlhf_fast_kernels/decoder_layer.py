"""A decoder layer of Llama's form over packed tokens, with gradients, as one node of the graph.

    q, k, v = n W_q^T, n W_k^T, n W_v^T (+ biases),   n = rms_norm(x)
    q, k    = rotary(rms_norm_heads(q)), rotary(rms_norm_heads(k))      (the norms: Qwen3 alone)
    y       = x + attention(q, k, v) W_o^T (+ bias)
    out     = y + swiglu(m W_gate^T, m W_up^T) W_down^T,   m = rms_norm(y)

with the ops of `layer_ops` and `packed_attention`, whose formulas and gradients these are. What one
node has over eleven: products add to the residual and to each other's gradients instead of a pass
of their own; q, k and v are one product where their weights lie side by side (on tiles, where that
changes no bit); norms and swiglu are formed again in backward, so a third less is kept; gradients
are written over what they were made from; and Python, whose lock two models that train side by side
wait for, is entered once.

In C++ (csrc/cpu/decoder_layer.cpp), fp32 on a CPU, with products on tiles or by PyTorch's BLAS
(`matmul`). Elsewhere, and under torch.compile, plain operations, which a compiler fuses by itself.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf_fast_kernels import dispatch, native
from rlhf_fast_kernels.layer_arguments import OP, LayerSettings, LayerWeights, check_layer
from rlhf_fast_kernels.matmul import SGEMM, tiles
from rlhf_fast_kernels.packed_attention import check_segments
from rlhf_fast_kernels.reference.decoder_layer import decoder_layer as reference_layer
from rlhf_fast_kernels.registry import is_plain


class Kept(NamedTuple):
    """What forward leaves to backward beside its arguments.

    qkv `[N, (Hq + 2 Hkv) D]` holds rotated q and k, or raw ones where they are normed: q and k
    `[N, heads, D]` are apart then. attended `[N, Hq D]`, lse `[N, Hq]`, y `[N, H]`, gate and up
    `[N, I]`.
    """

    qkv: Tensor
    q: Tensor
    k: Tensor
    attended: Tensor
    lse: Tensor
    y: Tensor
    gate: Tensor
    up: Tensor


# ---- forward and backward in C++ ----------------------------------------------------------------

Inputs = tuple[Tensor, LayerWeights, Tensor, Tensor, Tensor, LayerSettings]
_NORMS = frozenset(("input_norm", "post_norm", "q_norm", "k_norm"))


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _bound(inputs: Inputs, kept: Kept) -> Any:
    """The layer as an object of the compiled module; the caller keeps the tensors alive."""
    x, w, cos, sin, cu_seqlens, settings = inputs
    head = settings.head_dim
    numbers = (*x.shape, len(w.gate), len(w.q) // head, len(w.k) // head, head)
    return native.core().DecoderLayer(
        (*numbers, len(cu_seqlens) - 1, settings.window or 0),
        *(settings.eps, settings.scale),
        tuple(t.data_ptr() for t in (cu_seqlens, x, cos, sin)),
        *(tuple(map(_address, w)), tuple(map(_address, kept))),
        *(SGEMM, native.thread_count()),
    )


def _forward(inputs: Inputs, *, keep: bool) -> tuple[Tensor, Kept]:
    """(out, what backward needs); the latter is good for nothing unless it is to be kept."""
    x, w, *_, settings = inputs
    tokens, head, inner = len(x), settings.head_dim, len(w.gate)
    heads, kv_heads = len(w.q) // head, len(w.k) // head
    qkv = x.new_empty(tokens, (heads + 2 * kv_heads) * head)
    q, k, _ = (
        part.unflatten(1, (-1, head)) for part in qkv.split([len(w.q), len(w.k), len(w.v)], 1)
    )
    if w.q_norm is not None:
        q, k = x.new_empty(q.shape), x.new_empty(k.shape)
    attended, lse = x.new_empty(tokens, len(w.q)), x.new_empty(tokens, heads)
    gate, up = x.new_empty(tokens, inner), x.new_empty(tokens, inner)
    kept = Kept(qkv, q, k, attended, lse, torch.empty_like(x), gate, up)
    out, product = torch.empty_like(x), torch.empty_like(gate) if keep else gate
    _bound(inputs, kept).forward(out.data_ptr(), product.data_ptr())
    return out, kept


def _backward(
    inputs: Inputs, kept: Kept, above: Tensor, wanted: frozenset[str]
) -> tuple[Tensor, dict[str, Tensor]]:
    """(the gradient of x, those of the weights that are wanted)."""
    x, w, *_ = inputs
    projections = ("q", "k", "v")
    grads = {
        name: torch.empty_like(weight)
        for name, weight in w._asdict().items()
        if weight is not None and name not in projections and (name in wanted or name in _NORMS)
    }
    addresses = {name: grad.data_ptr() for name, grad in grads.items()}
    if not wanted.isdisjoint(projections):
        sizes = [len(w.q), len(w.k), len(w.v)]
        together = x.new_empty(sum(sizes), x.shape[1])
        addresses["q"] = together.data_ptr()
        grads |= dict(zip(projections, together.split(sizes), strict=True))
    below, bound = torch.empty_like(x), _bound(inputs, kept)
    room = x.new_empty(bound.room())
    bound.backward(
        *(above.data_ptr(), below.data_ptr()),
        *(tuple(addresses.get(name, 0) for name in LayerWeights._fields), room.data_ptr()),
    )
    return below, grads


class _DecoderLayer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        settings: LayerSettings,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        cu_seqlens: Tensor,
        *weights: Tensor | None,
    ) -> Tensor:
        inputs = (x, LayerWeights(*weights), cos, sin, cu_seqlens, settings)  # type: ignore[arg-type]
        out, kept = _forward(inputs, keep=True)
        ctx.settings, ctx.spent = settings, False
        # All of it this way, so that checkpointing finds it: it drops what was saved and no more.
        ctx.save_for_backward(x, cos, sin, cu_seqlens, *weights, *kept)
        return out

    @staticmethod
    def backward(ctx: Any, above: Tensor) -> tuple[Tensor | None, ...]:
        # `once_differentiable` would let a gradient of the gradient pass that misses this part.
        if torch.is_grad_enabled():
            raise RuntimeError(
                f"{OP}: gradients of its gradients do not exist in C++; call backward without "
                "create_graph=True, or pass impl='reference'"
            )
        if ctx.spent:
            raise RuntimeError(
                f"{OP}: a second backward of one graph, whose first one wrote over what was kept; "
                "run forward again, or pass impl='reference'"
            )
        ctx.spent = True
        x, cos, sin, cu_seqlens, *rest = ctx.saved_tensors
        count = len(LayerWeights._fields)
        weights, kept = LayerWeights(*rest[:count]), Kept(*rest[count:])
        needed = zip(LayerWeights._fields, ctx.needs_input_grad[-count:], strict=True)
        wanted = frozenset(name for name, needs in needed if needs)
        inputs = (x, weights, cos, sin, cu_seqlens, ctx.settings)
        grad, grads = _backward(inputs, kept, above.contiguous(), wanted)
        of_weights = (grads.get(name) for name in LayerWeights._fields)
        return (None, grad, None, None, None, *of_weights)


def _native(
    x: Tensor,
    weights: LayerWeights,
    cos: Tensor,
    sin: Tensor,
    cu_seqlens: Tensor,
    settings: LayerSettings,
) -> Tensor:
    x = x.contiguous()
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *weights)):
        out: Tensor = _DecoderLayer.apply(settings, x, cos, sin, cu_seqlens, *weights)
        return out
    return _forward((x, weights, cos, sin, cu_seqlens, settings), keep=False)[0]


# ---- the public function ------------------------------------------------------------------------


def decoder_layer(
    x: Tensor,
    weights: LayerWeights,
    cos: Tensor,
    sin: Tensor,
    cu_seqlens: Tensor,
    settings: LayerSettings,
    *,
    impl: str | None = None,
) -> Tensor:
    """One layer over packed segments, with gradients of x and of the weights that ask for one.

    Args:
        x: `[N, H]`.
        weights: the layer's, contiguous, in x's dtype and on its device.
        cos, sin: `[N, D]` in x's dtype; no gradient.
        cu_seqlens: `[K + 1]` int32 offsets of the segments, from 0 to N.
        settings: numbers of the layer.
        impl: implementation by name, see `rlhf_fast_kernels.dispatch`.

    Returns:
        `[N, H]`.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or offsets that do not fit.
        RuntimeError: by backward, called with create_graph=True, or a second time.
    """
    check_layer(x, weights, cos, sin, settings)
    check_segments(OP, x, cu_seqlens)
    choice = dispatch.choose(OP, impl, x)
    if torch.compiler.is_compiling() or not is_plain((x, *weights)):
        choice = dispatch.choose(OP, "reference", x)
    out: Tensor = choice.function(
        x, weights, cos.contiguous(), sin.contiguous(), cu_seqlens, settings
    )
    return out


# ---- registration -------------------------------------------------------------------------------


def _selftest(
    device: torch.device, dtype: torch.dtype, generator: torch.Generator
) -> dispatch.SelftestRun:
    def normal(*shape: int) -> Tensor:
        return (torch.randn(shape, generator=generator) / shape[-1] ** 0.5).to(device, dtype)

    x, (cos, sin) = 4 * normal(9, 16), (normal(9, 8), normal(9, 8))
    square, narrow, wide = (16, 16), (8, 16), (24, 16)
    shapes = ((16,), square, narrow, narrow, square, (16,), wide, wide, (16, 24))
    weights = LayerWeights(*(normal(*shape) for shape in shapes))
    cu_seqlens = torch.tensor([0, 4, 9], dtype=torch.int32).to(device)
    settings = LayerSettings(head_dim=8, eps=1e-6, scale=8**-0.5, window=3)

    def run(impl: str) -> tuple[Tensor, ...]:
        leaves = [t.clone().requires_grad_() for t in (x, *weights[:9])]
        layer = LayerWeights(*leaves[1:])
        out = decoder_layer(leaves[0], layer, cos, sin, cu_seqlens, settings, impl=impl)
        return out.detach(), *torch.autograd.grad(out, leaves, torch.cos(out.detach()))

    return run


def _available(device: torch.device) -> str | None:
    reason = native.on_cpu("DecoderLayer", "tiles_usable")(device)
    if reason is None and not SGEMM and not tiles():
        return "this build of PyTorch shows no sgemm"
    return reason


dispatch.register(OP, "reference", reference_layer)
dispatch.register(OP, "cpu", _native, _available, dtypes=(torch.float32,))
dispatch.register_selftest(OP, _selftest)
