"""Attention over pages in plain PyTorch, as defined in `rlhf_fast_kernels.paged_attention`."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_fast_kernels.reference.common import output_dtype


def paged_attention(
    q: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    page_table: Tensor,
    context_lengths: Tensor,
    cu_queries: Tensor | None = None,
    *,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
) -> Tensor:
    """`[N, Hq, D]` in the dtype of q; computed in fp32, or in fp64 if q is fp64."""
    page_size = key_pages.shape[1]
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    offsets = range(len(q) + 1) if cu_queries is None else cu_queries.tolist()
    for s, context in enumerate(context_lengths.tolist()):
        begin, end = offsets[s], offsets[s + 1]
        if begin == end or context == 0:
            continue
        positions = context - (end - begin) + torch.arange(end - begin, device=q.device)
        low = 0 if window is None else max(0, int(positions[0]) - window + 1)
        at = torch.arange(low, context, device=q.device)
        pages = page_table[s, at // page_size].long()
        keys, values = key_pages[pages, at % page_size], value_pages[pages, at % page_size]
        seen = at <= positions[:, None]
        if window is not None:
            seen &= at > positions[:, None] - window
        out[begin:end] = attend(q[begin:end], keys, values, seen, scale, softcap).to(q.dtype)
    return out


def attend(
    q: Tensor, keys: Tensor, values: Tensor, seen: Tensor, scale: float, softcap: float | None
) -> Tensor:
    """`[n, Hq, D]` of one sequence: keys and values `[m, Hkv, D]`, seen `[n, m]` bool.

    A query that sees nothing gives exactly 0; what stands in keys that it does not see changes
    nothing.
    """
    wide = output_dtype(q)
    group = q.shape[1] // keys.shape[1]
    keys = keys.to(wide).repeat_interleave(group, 1)
    values = values.to(wide).repeat_interleave(group, 1)
    scores = torch.einsum("nhd,mhd->hnm", q.to(wide), keys) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    weights = torch.softmax(scores.masked_fill(~seen, float("-inf")), -1)
    weights = weights.masked_fill(~seen, 0.0)
    # Weight 0 times NaN is NaN: what is not finite comes in by the queries that see it alone.
    broken = ~values.isfinite()
    spoilt = torch.einsum("nm,mhd->nhd", seen.to(wide), broken.to(wide)) > 0
    out = torch.einsum("hnm,mhd->nhd", weights, values.masked_fill(broken, 0.0))
    return out.masked_fill(spoilt, float("nan"))
