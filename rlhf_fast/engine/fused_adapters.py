"""LoRA in the fused forward: two small products beside each product of a block, never a merge.

    y = x W^T + (x A^T) B^T        A = the active adapters' A one below the other
                                   B = scale * their B, each over the outputs of its projection

Projections that are one product (q|k|v, gate|up) take one pair: B is 0 where an output belongs to
another projection. A and B are small copies, written for each rollout from the adapters that are
active then.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from peft.tuners import lora
from torch import Tensor

from rlhf_fast.engine.fused_support import active_adapters


class LowRank(NamedTuple):
    """What is added to a product: A `[R, in]` and B `[out, R]`, scale included."""

    a: Tensor
    b: Tensor

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.itemsize for t in self)


class LayerAdapters(NamedTuple):
    """Of the four products of a block; None: nothing is added."""

    qkv: LowRank | None
    out: LowRank | None
    gate_up: LowRank | None
    down: LowRank | None


@torch.no_grad()
def layer_adapters(block: Any, dtype: torch.dtype) -> LayerAdapters:
    """The active adapters of a block, in the type that products run in."""
    attention, mlp = block.self_attn, block.mlp
    return LayerAdapters(
        _joined((attention.q_proj, attention.k_proj, attention.v_proj), dtype),
        _joined((attention.o_proj,), dtype),
        _joined((mlp.gate_proj, mlp.up_proj), dtype),
        _joined((mlp.down_proj,), dtype),
    )


def _joined(projections: tuple[Any, ...], dtype: torch.dtype) -> LowRank | None:
    parts: list[tuple[int, Tensor, Tensor]] = []  # (first output, A, scaled B)
    outputs = 0
    for projection in projections:
        if isinstance(projection, lora.LoraLayer):
            for name in active_adapters(projection):
                low: Any = projection
                scaled = low.lora_B[name].weight.float() * low.scaling[name]
                parts.append((outputs, low.lora_A[name].weight, scaled))
        outputs += projection.weight.shape[0]
    if not parts:
        return None
    a = torch.cat([part.to(dtype) for _, part, _ in parts])
    b = torch.zeros(outputs, len(a), dtype=dtype, device=a.device)
    rank = 0
    for first, _, part in parts:
        b[first : first + part.shape[0], rank : rank + part.shape[1]] = part
        rank += part.shape[1]
    return LowRank(a, b)
