"""Masked moments and whitening in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_fast_kernels.reference.common import output_dtype


def moments_dtype(x: Tensor) -> torch.dtype:
    """fp64 where the device has it."""
    return torch.float32 if x.device.type == "mps" else torch.float64


def row_moments(x: Tensor, mask: Tensor) -> Tensor:
    """[S, 3]: count, mean and sum of squared deviations over the true slots of each row."""
    wide = x.to(moments_dtype(x))
    zero = wide.new_zeros(())
    count = mask.sum(1).to(wide.dtype)
    mean = torch.where(mask, wide, zero).sum(1) / count.clamp(min=1)
    m2 = torch.where(mask, wide - mean[:, None], zero).square().sum(1)
    return torch.stack([count, mean, m2], dim=1)


def masked_moments(x: Tensor, mask: Tensor | None) -> Tensor:
    """[3]: count, mean and sum of squared deviations over the true slots."""
    if mask is None:
        mask = torch.ones_like(x, dtype=torch.bool)
    return row_moments(x.reshape(1, -1), mask.reshape(1, -1))[0]


def merge_moments(moments: Tensor) -> Tensor:
    """[3]: moments of the union of the disjoint sets whose moments are the rows of [W, 3]."""
    if len(moments) == 1:
        return moments[0]
    counts, means, m2s = moments.unbind(1)
    count = counts.sum()
    mean = (counts * means).sum() / count.clamp(min=1)
    m2 = (m2s + counts * (means - mean).square()).sum()
    return torch.stack([count, mean, m2])


def mean_and_scale(stats: Tensor, unbiased: bool, eps: float) -> tuple[Tensor, Tensor]:
    """Mean and 1/std of moments; the scale is 1 where at most one slot was counted."""
    count, mean, m2 = stats.unbind()
    variance = m2 / (count - int(unbiased)).clamp(min=1)
    scale = torch.where(count > 1, (variance + eps).rsqrt(), torch.ones_like(count))
    return mean, scale


def whiten(
    x: Tensor,
    mask: Tensor | None,
    shift_mean: bool = True,
    unbiased: bool = False,
    eps: float = 1e-8,
    stats: Tensor | None = None,
) -> Tensor:
    """(x - mean) / std (+ mean if kept) over the true slots, 0 elsewhere."""
    if mask is None:
        mask = torch.ones_like(x, dtype=torch.bool)
    if stats is None:
        stats = masked_moments(x, mask)
    else:
        stats = merge_moments(stats.to(x.device, moments_dtype(x)).view(-1, 3))
    mean, scale = mean_and_scale(stats, unbiased, eps)
    y = (x.to(stats.dtype) - mean) * scale
    if not shift_mean:
        y = y + mean
    return torch.where(mask, y, y.new_zeros(())).to(output_dtype(x))
