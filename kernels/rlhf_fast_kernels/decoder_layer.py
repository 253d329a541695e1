"""A decoder layer of Llama's form over packed tokens, with gradients, as one node of the graph.

    q, k, v = n W_q^T, n W_k^T, n W_v^T (+ biases),   n = rms_norm(x)
    q, k    = rotary(rms_norm_heads(q)), rotary(rms_norm_heads(k))      (the norms: Qwen3 alone)
    y       = x + attention(q, k, v) W_o^T (+ bias)
    out     = y + swiglu(m W_gate^T, m W_up^T) W_down^T,   m = rms_norm(y)

with the ops of `layer_ops` and `packed_attention`, whose formulas and gradients these are. What one
node has over eleven: products add to the residual and to each other's gradients instead of a pass
of their own; q, k and v are one product where their weights lie side by side; norms and swiglu are
formed again in backward, so a third less is kept; and gradients are written over what they were
made from.

C++ for the parts and PyTorch's products, fp32 on a CPU. Elsewhere, and under torch.compile, plain
operations, which a compiler fuses by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf_fast_kernels import dispatch, native
from rlhf_fast_kernels.layer_arguments import OP, LayerSettings, LayerWeights, check_layer
from rlhf_fast_kernels.layer_ops import run_rms_norm_backward, run_rotary, run_swiglu
from rlhf_fast_kernels.packed_attention import check_segments, native_backward, native_forward
from rlhf_fast_kernels.reference.decoder_layer import decoder_layer as reference_layer
from rlhf_fast_kernels.registry import is_plain
from rlhf_fast_kernels.rms_norm import unchecked as norm


class Kept(NamedTuple):
    """What forward leaves to backward beside its arguments.

    qkv `[N, (Hq + 2 Hkv) D]` holds rotated q and k, or raw ones where they are normed: q and k
    `[N, heads, D]` are apart then. attended `[N, Hq, D]`, lse `[N, Hq]`, y `[N, H]`, gate and up
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


# ---- the parts ----------------------------------------------------------------------------------


class _Product(NamedTuple):
    """A product that makes columns `start` to `stop` of q|k|v."""

    weight: Tensor
    bias: Tensor | None
    start: int
    stop: int


def _products(w: LayerWeights) -> list[_Product]:
    """One product for q, k and v if their weights lie side by side, or three."""
    weights, biases = (w.q, w.k, w.v), (w.q_bias, w.k_bias, w.v_bias)
    whole = _side_by_side(weights)
    given = [bias for bias in biases if bias is not None]
    bias = _side_by_side(given) if len(given) == len(biases) else None
    if whole is not None and (bias is not None or not given):
        return [_Product(whole, bias, 0, len(whole))]
    products, start = [], 0
    for weight, bias in zip(weights, biases, strict=True):
        products.append(_Product(weight, bias, start, start + len(weight)))
        start += len(weight)
    return products


def _side_by_side(parts: Sequence[Any]) -> Tensor | None:
    """Contiguous tensors as one along dim 0, if each begins where the one before ends."""
    first = parts[0]
    memory, offset = first.untyped_storage().data_ptr(), first.storage_offset()
    for part in parts:
        if part.untyped_storage().data_ptr() != memory or part.storage_offset() != offset:
            return None
        offset += part.numel()
    whole: Tensor = first.detach().as_strided(
        (sum(map(len, parts)), *first.shape[1:]), first.stride()
    )
    return whole


def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    if bias is None:
        return torch.mm(x, weight.t(), out=out)
    return torch.addmm(bias, x, weight.t(), out=out)


def _heads(qkv: Tensor, w: LayerWeights, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v `[N, heads, D]` as views of q|k|v."""
    parts = qkv.split([len(w.q), len(w.k), len(w.v)], dim=1)
    q, k, v = (x.unflatten(1, (-1, width)) for x in parts)
    return q, k, v


# ---- forward and backward -----------------------------------------------------------------------


def _in_fp32() -> AbstractContextManager[Any]:
    """Without autocast, whose products are bf16: C++ reads them as fp32."""
    if torch.is_autocast_enabled("cpu"):
        return torch.autocast("cpu", enabled=False)
    return nullcontext()


def _forward(
    x: Tensor,
    w: LayerWeights,
    cos: Tensor,
    sin: Tensor,
    cu_seqlens: Tensor,
    settings: LayerSettings,
    *,
    keep: bool,
) -> tuple[Tensor, Kept | None]:
    """(out, what backward needs, if it is to be kept)."""
    eps = settings.eps
    rows = torch.empty_like(x)
    norm(x, w.input_norm, eps, None, 0.0, rows)
    products = _products(w)
    qkv = x.new_empty(len(x), products[-1].stop)
    for p in products:
        _multiply(rows, p.weight, p.bias, qkv[:, p.start : p.stop])
    q, k, v = _heads(qkv, w, settings.head_dim)
    if w.q_norm is not None and w.k_norm is not None:
        raw, q, k = (q, k), x.new_empty(q.shape), x.new_empty(k.shape)
        norm(raw[0], w.q_norm, eps, None, 0.0, q)
        norm(raw[1], w.k_norm, eps, None, 0.0, k)
    for part in (q, k):
        run_rotary(part, cos, sin, part, transposed=False)
    attended, lse = native_forward(q, k, v, cu_seqlens, settings.scale, settings.window)
    y = torch.addmm(x, attended.flatten(1), w.o.t())
    if w.o_bias is not None:
        y += w.o_bias
    of_attention = (qkv, q, k, attended, lse) if keep else None
    del qkv, q, k, v, part, attended, lse  # the widest part is still to come
    norm(y, w.post_norm, eps, None, 0.0, rows)
    gate, up = torch.mm(rows, w.gate.t()), torch.mm(rows, w.up.t())
    inner = torch.empty_like(gate) if keep else gate
    run_swiglu(gate, up, inner)
    out = torch.addmm(y, inner, w.down.t(), out=rows)
    return out, None if of_attention is None else Kept(*of_attention, y, gate, up)


class _Backward:
    """Gradients of one layer, from its last operation to its first.

    Args:
        x, w, cos, sin, cu_seqlens, settings: as in forward.
        kept: what forward left; gate and up are overwritten.
        wanted: weights whose gradient is asked for.
    """

    def __init__(
        self,
        x: Tensor,
        w: LayerWeights,
        tables: tuple[Tensor, Tensor],
        cu_seqlens: Tensor,
        settings: LayerSettings,
        kept: Kept,
        wanted: frozenset[str],
    ) -> None:
        self.x, self.w, self.tables, self.cu_seqlens = x, w, tables, cu_seqlens
        self.settings, self.kept, self.wanted = settings, kept, wanted
        self.grads: dict[str, Tensor] = {}
        self.rows = torch.empty_like(x)  # of a norm, formed again

    def run(self, above: Tensor) -> Tensor:
        """The gradient of x; those of weights stand in `grads`."""
        of_y = self._inner(above)
        of_qkv = self._attention(of_y)
        return self._input(of_y, of_qkv)

    def _inner(self, above: Tensor) -> Tensor:
        """Gradient of y from that of out."""
        w, kept, eps = self.w, self.kept, self.settings.eps
        spread, inner = torch.mm(above, w.down), torch.empty_like(kept.gate)
        run_swiglu(kept.gate, kept.up, inner, spread, kept.gate, kept.up)
        of_gate, of_up = kept.gate, kept.up
        norm(kept.y, w.post_norm, eps, None, 0.0, self.rows)
        self._weight("down", above, inner)
        self._weight("gate", of_gate, self.rows)
        self._weight("up", of_up, self.rows)
        of_rows = torch.mm(of_gate, w.gate).addmm_(of_up, w.up)
        of_y = torch.empty_like(self.x)
        self.grads["post_norm"] = run_rms_norm_backward(
            kept.y, w.post_norm, of_rows, eps, above, of_y
        )
        return of_y

    def _attention(self, of_y: Tensor) -> Tensor:
        """Gradient of q|k|v, before norms and rotation, from that of y."""
        w, kept, settings = self.w, self.kept, self.settings
        self._weight("o", of_y, kept.attended.flatten(1))
        self._bias("o_bias", of_y)
        of_attended = torch.mm(of_y, w.o).view_as(kept.attended)
        of_qkv = torch.empty_like(kept.qkv)
        raw_q, raw_k, v = _heads(kept.qkv, w, settings.head_dim)
        of_q, of_k, of_v = _heads(of_qkv, w, settings.head_dim)
        heads = (("q_norm", raw_q, of_q), ("k_norm", raw_k, of_k))
        normed = w.q_norm is not None
        apart = [of.new_empty(of.shape) if normed else of for _, _, of in heads]
        native_backward(
            *(kept.q, kept.k, v, self.cu_seqlens, settings.scale, settings.window),
            *(kept.attended, kept.lse, of_attended, (apart[0], apart[1], of_v)),
        )
        for (name, raw, of), grad in zip(heads, apart, strict=True):
            run_rotary(grad, *self.tables, grad, transposed=True)
            if normed:
                weight, raw = getattr(w, name), raw.contiguous()
                self.grads[name] = run_rms_norm_backward(
                    raw, weight, grad, settings.eps, None, grad
                )
                of.copy_(grad)
        return of_qkv

    def _input(self, of_y: Tensor, of_qkv: Tensor) -> Tensor:
        """Gradient of x from those of y and of q|k|v."""
        x, w, eps = self.x, self.w, self.settings.eps
        norm(x, w.input_norm, eps, None, 0.0, self.rows)
        of_rows: Tensor | None = None
        for p in _products(w):
            part = of_qkv[:, p.start : p.stop]
            if of_rows is None:
                of_rows = torch.mm(part, p.weight)
            else:
                of_rows.addmm_(part, p.weight)
        assert of_rows is not None
        sizes = [len(w.q), len(w.k), len(w.v)]
        if not self.wanted.isdisjoint(("q", "k", "v")):
            parts = torch.mm(of_qkv.t(), self.rows).split(sizes)
            self.grads |= dict(zip(("q", "k", "v"), parts, strict=True))
        for name, columns in zip(("q", "k", "v"), of_qkv.split(sizes, dim=1), strict=True):
            self._bias(f"{name}_bias", columns)
        self.grads["input_norm"] = run_rms_norm_backward(x, w.input_norm, of_rows, eps, of_y, of_y)
        return of_y

    def _weight(self, name: str, above: Tensor, rows: Tensor) -> None:
        if name in self.wanted:
            self.grads[name] = torch.mm(above.t(), rows)

    def _bias(self, name: str, above: Tensor) -> None:
        if name in self.wanted:
            self.grads[name] = above.sum(0)


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
        given = (x, LayerWeights(*weights), cos, sin, cu_seqlens)  # type: ignore[arg-type]
        with _in_fp32():
            out, kept = _forward(*given, settings, keep=True)
        assert kept is not None
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
        tables = (cos, sin)
        backward = _Backward(x, weights, tables, cu_seqlens, ctx.settings, kept, wanted)
        with _in_fp32():
            grad = backward.run(above.contiguous())
        of_weights = (backward.grads.get(name) for name in LayerWeights._fields)
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
    with _in_fp32():
        return _forward(x, weights, cos, sin, cu_seqlens, settings, keep=False)[0]


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


_PARTS = ("swiglu", "rotary", "rms_norm", "rms_norm_backward")
_ATTENTION = ("packed_attention", "packed_attention_backward")
dispatch.register(OP, "reference", reference_layer)
dispatch.register(OP, "cpu", _native, native.on_cpu(*_PARTS, *_ATTENTION), dtypes=(torch.float32,))
dispatch.register_selftest(OP, _selftest)
