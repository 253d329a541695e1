"""silu(gate) * up in plain PyTorch."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import silu


def silu_mul(gate_up: Tensor, out: Tensor) -> None:
    """out = silu(gate) * up, the first factor rounded to the dtype."""
    gate, up = gate_up.chunk(2, dim=-1)
    out.copy_(silu(gate) * up)
