"""A decoder layer in plain PyTorch, as `rlhf_fast_kernels.decoder_layer` has it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor
from torch.nn import functional

from rlhf_fast_kernels.reference.layer_ops import rotary, swiglu, trained_rms_norm
from rlhf_fast_kernels.reference.packed_attention import packed_attention

if TYPE_CHECKING:
    from rlhf_fast_kernels.layer_arguments import LayerSettings, LayerWeights


def decoder_layer(
    x: Tensor,
    weights: LayerWeights,
    cos: Tensor,
    sin: Tensor,
    cu_seqlens: Tensor,
    settings: LayerSettings,
) -> Tensor:
    """`[N, H]` to `[N, H]`."""
    w, eps, width = weights, settings.eps, settings.head_dim
    rows = trained_rms_norm(x, w.input_norm, eps)
    q, k, v = (
        functional.linear(rows, weight, bias).unflatten(-1, (-1, width))
        for weight, bias in ((w.q, w.q_bias), (w.k, w.k_bias), (w.v, w.v_bias))
    )
    if w.q_norm is not None and w.k_norm is not None:
        q, k = trained_rms_norm(q, w.q_norm, eps), trained_rms_norm(k, w.k_norm, eps)
    q, k = rotary(q, cos, sin), rotary(k, cos, sin)
    out, _ = packed_attention(q, k, v, cu_seqlens, scale=settings.scale, window=settings.window)
    x = x + functional.linear(out.flatten(1), w.o, w.o_bias)
    rows = trained_rms_norm(x, w.post_norm, eps)
    inner = swiglu(functional.linear(rows, w.gate), functional.linear(rows, w.up))
    return x + functional.linear(inner, w.down)
