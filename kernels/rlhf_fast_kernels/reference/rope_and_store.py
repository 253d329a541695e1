"""Norm, rotation and storing in plain PyTorch, as defined in `rlhf_fast_kernels.rope_and_store`."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_fast_kernels.reference.common import output_dtype


def rope_and_store(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    slots: Tensor,
    *,
    positions: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    norm_eps: float = 1e-6,
) -> None:
    """Changes q, key_pages and value_pages; computed in fp32, or in fp64 if q is fp64."""
    k = rms_norm(k, k_norm, norm_eps)
    if q_norm is not None:
        q.copy_(rms_norm(q, q_norm, norm_eps))
    if cos is not None and sin is not None and positions is not None:
        q.copy_(rotate(q, cos[positions], sin[positions]))
        k = rotate(k, cos[positions], sin[positions])
    stored = (slots >= 0).nonzero().squeeze(-1)
    page_size = key_pages.shape[1]
    at = slots[stored] // page_size, slots[stored] % page_size
    key_pages[at] = k[stored]
    value_pages[at] = v[stored]


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """`weight * x / sqrt(mean(x^2) + eps)` over the last dim, x rounded before the product."""
    if weight is None:
        return x
    wide = x.to(output_dtype(x))
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`x cos + rotate_half(x) sin` of the first entries of a head, as many as the tables have."""
    width = cos.shape[-1]
    wide = x[..., :width].to(output_dtype(x))
    first, second = wide.chunk(2, -1)
    turned = wide * cos[:, None] + torch.cat((-second, first), -1) * sin[:, None]
    return torch.cat((turned.to(x.dtype), x[..., width:]), -1)
