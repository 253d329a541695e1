"""Attention in packed segments in plain PyTorch, as `rlhf_fast_kernels.packed_attention` has it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from rlhf_fast_kernels.reference.common import output_dtype


def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    *,
    scale: float,
    window: int | None = None,
) -> tuple[Tensor, Tensor]:
    """(out `[N, Hq, D]` in q's dtype, lse `[N, Hq]`); computed in fp32, or in fp64 for fp64."""
    wide = output_dtype(q)
    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.zeros(q.shape[:2], dtype=wide, device=q.device)
    for here in _segments(cu_seqlens):
        scores = _scores(q[here], k[here], scale, window)
        lse[here] = scores.logsumexp(-1).T
        weights = torch.softmax(scores, -1)
        out[here] = torch.einsum("hij,jhd->ihd", weights, _grouped(v[here], q)).to(q.dtype)
    return out, lse


def packed_attention_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    *,
    scale: float,
    window: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, of their shapes and dtype."""
    grads = tuple(torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    for here in _segments(cu_seqlens):
        scores = _scores(q[here], k[here], scale, window)
        weights = torch.exp(scores - lse[here].T[:, :, None])
        above = grad_out[here].to(scores.dtype)
        delta = (above * out[here].to(scores.dtype)).sum(-1).T[:, :, None]
        below = torch.einsum("ihd,jhd->hij", above, _grouped(v[here], q)) - delta
        of_scores = weights * below * scale
        of_q = torch.einsum("hij,jhd->ihd", of_scores, _grouped(k[here], q))
        of_k = torch.einsum("hij,ihd->jhd", of_scores, q[here].to(scores.dtype))
        of_v = torch.einsum("hij,ihd->jhd", weights, above)
        for grad, part in zip(grads, (of_q, of_k, of_v), strict=True):
            # Query heads of a group read one head of k and v: it gets the sum of their gradients.
            heads = part.unflatten(1, (grad.shape[1], -1)).sum(2)
            grad[here] = heads.to(grad.dtype)
    return grads[0], grads[1], grads[2]


def _segments(cu_seqlens: Tensor) -> Iterator[slice]:
    ends = cu_seqlens.tolist()
    for begin, end in itertools.pairwise(ends):
        if begin < end:
            yield slice(begin, end)


def _grouped(x: Tensor, q: Tensor) -> Tensor:
    """`[n, Hkv, D]` -> `[n, Hq, D]`, each head once for every query head that reads it."""
    return x.to(output_dtype(q)).repeat_interleave(q.shape[1] // x.shape[1], 1)


def _scores(q: Tensor, k: Tensor, scale: float, window: int | None) -> Tensor:
    """`[Hq, n, n]` of one segment, -inf where a query does not see the key."""
    position = torch.arange(len(q), device=q.device)
    distance = position[:, None] - position[None, :]
    seen = distance >= 0
    if window is not None:
        seen &= distance < window
    scores = torch.einsum("ihd,jhd->hij", q.to(output_dtype(q)), _grouped(k, q)) * scale
    return scores.masked_fill(~seen, float("-inf"))
