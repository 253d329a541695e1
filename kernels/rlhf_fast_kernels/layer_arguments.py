"""What `decoder_layer` takes, and whether it fits together."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from rlhf_fast_kernels.page_arguments import MAX_HEAD_DIM

OP = "decoder_layer"


class LayerWeights(NamedTuple):
    """The parameters of a layer, as `torch.nn.Linear` lays them out: `[out, in]`.

    H is the width of the stream, I that of the inner one, Hq and Hkv heads of D.

    Attributes:
        input_norm, post_norm: `[H]`.
        q, k, v: `[Hq D, H]`, `[Hkv D, H]`, `[Hkv D, H]`.
        o: `[H, Hq D]`.
        gate, up, down: `[I, H]`, `[I, H]`, `[H, I]`.
        q_bias, k_bias, v_bias, o_bias: as wide as their product, or None.
        q_norm, k_norm: `[D]`, both or none.
    """

    input_norm: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    post_norm: Tensor
    gate: Tensor
    up: Tensor
    down: Tensor
    q_bias: Tensor | None = None
    k_bias: Tensor | None = None
    v_bias: Tensor | None = None
    o_bias: Tensor | None = None
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None


@dataclass(frozen=True)
class LayerSettings:
    """Numbers of a layer.

    Attributes:
        head_dim: D.
        eps: of the norms.
        scale: of the scores.
        window: tokens that a token sees, itself included; None: all before it.
    """

    head_dim: int
    eps: float
    scale: float
    window: int | None = None


def check_layer(
    x: Tensor, weights: LayerWeights, cos: Tensor, sin: Tensor, settings: LayerSettings
) -> None:
    """Refuse shapes, strides, dtypes and devices that do not fit, naming the first.

    Raises:
        ValueError, TypeError: as `decoder_layer`.
    """
    if x.dim() != 2:
        raise ValueError(f"{OP}: x is {list(x.shape)}; expected [N, H]")
    width, head = x.shape[1], settings.head_dim
    q, kv, inner = len(weights.q), len(weights.k), len(weights.gate)
    if head % 2 or q % head or kv % head or kv == 0 or q % kv:
        raise ValueError(
            f"{OP}: q has {q} rows and k {kv}; expected multiples of head_dim {head}, an even "
            "number, and of k's"
        )
    if head > MAX_HEAD_DIM or not math.isfinite(settings.scale):
        raise ValueError(
            f"{OP}: head_dim is {head}, scale {settings.scale}; expected at most {MAX_HEAD_DIM} "
            "and a finite number"
        )
    if settings.window is not None and settings.window < 1:
        raise ValueError(f"{OP}: window is {settings.window}; expected at least 1 or None")
    if (weights.q_norm is None) != (weights.k_norm is None):
        raise ValueError(f"{OP}: one of q_norm and k_norm is missing; expected both or none")
    expected: dict[str, tuple[int, ...]] = {
        "input_norm": (width,),
        "post_norm": (width,),
        "q": (q, width),
        "k": (kv, width),
        "v": (kv, width),
        "o": (width, q),
        "gate": (inner, width),
        "up": (inner, width),
        "down": (width, inner),
        "q_bias": (q,),
        "k_bias": (kv,),
        "v_bias": (kv,),
        "o_bias": (width,),
        "q_norm": (head,),
        "k_norm": (head,),
    }
    tables = {"cos": (cos, (len(x), head)), "sin": (sin, (len(x), head))}
    given = {name: (tensor, expected[name]) for name, tensor in weights._asdict().items()}
    for name, (tensor, shape) in (given | tables).items():
        if tensor is None:
            continue
        if tensor.shape != shape or not (tensor.is_contiguous() or name in tables):
            found = f"{name} is {list(tensor.shape)} with strides {list(tensor.stride())}"
            raise ValueError(f"{OP}: {found}; expected contiguous {list(shape)}")
        if tensor.dtype != x.dtype or tensor.device != x.device:
            found = f"{name} is {tensor.dtype} on {tensor.device}"
            raise TypeError(f"{OP}: {found}; x is {x.dtype} on {x.device}")
