"""Root-mean-square norm in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None, offset: float, out: Tensor
) -> None:
    """out = x / rms(x) * (offset + weight); with a residual, residual += x and x is that sum."""
    if residual is not None:
        x = residual.add_(x)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if offset == 0:
        out.copy_(y.to(x.dtype) * weight)  # Llama's rounding
    else:
        out.copy_(y * (offset + weight.to(wide.dtype)))  # Gemma's
