"""Rows of two sets of logits: their exact KL and its gradient, for every op that meets logits.

`kl_from_logits` is the public face; the op that makes logits chunk by chunk from hidden states
calls these functions on a chunk. Neither autograd nor validation happens here.

    stats = kl_row_stats("cpu", logits, ref_logits, settings)
    kl_row_gradient("cpu", logits, ref_logits, settings, stats, grad_kl, out)

In a vocabulary shard (tensor parallelism) `kl_row_stats(..., shard=True)` describes the shard
alone, `gather_kl_shards` the whole; `kl_row_gradient` takes the statistics of the whole and fills
the shard.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rlhf_fast_kernels import native, triton_support
from rlhf_fast_kernels.kl_settings import KLRowSettings, KLRowStats
from rlhf_fast_kernels.logit_rows import Layout, common_layouts
from rlhf_fast_kernels.reference.common import output_dtype
from rlhf_fast_kernels.reference.kl_from_logits import kl_gradient, kl_stats

__all__ = [
    "KLRowSettings",
    "KLRowStats",
    "gather_kl_shards",
    "kl_row_gradient",
    "kl_row_stats",
    "merge_kl_shards",
]

OP = "kl_from_logits"


# ---- statistics ---------------------------------------------------------------------------------


def kl_row_stats(
    impl: str,
    logits: Tensor,
    ref_logits: Tensor,
    settings: KLRowSettings,
    *,
    shard: bool = False,
    mask: Tensor | None = None,
) -> KLRowStats:
    """KL(softmax z || softmax z') and both log-sum-exps in one sweep of both logits.

    Args:
        impl: `"reference"`, `"cpu"` or `"triton"`.
        logits: [..., V], read where the rows lie; layouts of more than two strides are copied.
        ref_logits: of the same shape, perhaps of another dtype.
        settings: see `KLRowSettings`; a temperature tensor has the shape [...].
        shard: the columns are one of several shards; see `KLRowStats`.
        mask: bool [...]; rows where it is false are not read and give 0.

    Returns:
        `KLRowStats` of shape [...].
    """
    logits, ref_logits, settings = logits.detach(), ref_logits.detach(), settings.ready()
    if impl == "reference":
        return kl_stats(logits, ref_logits, settings, mask=mask, shard=shard)
    shape, device = logits.shape[:-1], logits.device
    kl = torch.empty(shape, dtype=torch.float32, device=device)
    lse = torch.empty(shape, dtype=torch.float64, device=device)
    stats = KLRowStats(kl, lse, torch.empty_like(lse))
    if kl.numel() == 0:
        return stats
    mask = None if mask is None else mask.contiguous()
    layouts = common_layouts(logits, ref_logits)
    if layouts is None:
        logits, ref_logits = logits.contiguous(), ref_logits.contiguous()
        layouts = common_layouts(logits, ref_logits)
        assert layouts is not None
    if impl == "triton":
        kernels = triton_support.kernels(OP)
        kernels.forward(logits, ref_logits, layouts, settings, mask, stats, shard)
        return stats
    native.core().kl_from_logits_forward(
        _rows_for_cpu(logits, layouts[0]),
        _rows_for_cpu(ref_logits, layouts[1]),
        _settings_for_cpu(settings, logits.shape[-1]),
        0 if mask is None else mask.data_ptr(),
        shard,
        tuple(x.data_ptr() for x in stats),
        native.thread_count(),
    )
    return stats


def _rows_for_cpu(x: Tensor, layout: Layout) -> tuple[int, ...]:
    return (x.data_ptr(), native.DTYPE_CODES[x.dtype], *layout)


def _settings_for_cpu(settings: KLRowSettings, width: int) -> tuple[float, ...]:
    return (
        settings.columns(width),
        0 if settings.temperature is None else settings.temperature.data_ptr(),
        settings.scale,
        settings.softcap or 0.0,
        settings.ref_softcap or 0.0,
    )


# ---- shards -------------------------------------------------------------------------------------


def merge_kl_shards(parts: Sequence[KLRowStats]) -> KLRowStats:
    """The statistics of the whole vocabulary from those of its shards, in the order given.

    With w_k = exp(lse_k - lse) the actor's share of shard k, and v_k = exp(ref_lse_k - ref_lse) the
    reference's,

        KL = sum_k w_k (KL_k + log w_k - log v_k)

    exactly (the chain rule of the KL), in fp64 and in a fixed order. A shard in which the actor has
    nothing above -inf has no weight.
    """
    lse = torch.logsumexp(torch.stack([part.lse for part in parts]), dim=0)
    ref_lse = torch.logsumexp(torch.stack([part.ref_lse for part in parts]), dim=0)
    nothing = (lse == -torch.inf) | (ref_lse == -torch.inf)
    total = torch.where(nothing, torch.nan, 0.0).to(lse)
    for part in parts:
        log_w = part.lse - lse
        term = log_w.exp() * (part.kl + (log_w - (part.ref_lse - ref_lse)))
        total = total + torch.where(part.lse == -torch.inf, 0, term)
    return KLRowStats(total.to(parts[0].kl.dtype), lse, ref_lse)


def gather_kl_shards(stats: KLRowStats, group: Any) -> KLRowStats:
    """`merge_kl_shards` over the ranks of a process group, in rank order: the same bits on each."""
    own = torch.stack([x.double() for x in stats])
    gathered = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(gathered, own, group=group)
    merged = merge_kl_shards([KLRowStats(*part) for part in gathered])
    return merged._replace(kl=merged.kl.to(stats.kl.dtype))


# ---- gradient -----------------------------------------------------------------------------------


def kl_row_gradient(
    impl: str,
    logits: Tensor,
    ref_logits: Tensor,
    settings: KLRowSettings,
    stats: KLRowStats,
    grad_kl: Tensor,
    out: Tensor,
    *,
    accumulate: bool = False,
    mask: Tensor | None = None,
) -> None:
    """Write d loss / d logits in one sweep of both logits.

    Args:
        impl, logits, ref_logits, settings: those of `kl_row_stats`.
        stats: of the whole vocabulary.
        grad_kl: d loss / d KL, of shape [...]. Rows where it is 0 are not read and
            become exactly 0.
        out: of logits' shape, contiguous in V, of logits' or another floating dtype; may be
            either side's logits.
        accumulate: add to `out` instead, in fp32.
        mask: rows where it is false have gradient 0, whatever grad_kl holds.
    """
    logits, ref_logits, settings = logits.detach(), ref_logits.detach(), settings.ready()
    if out.numel() == 0:
        return
    if mask is not None:
        grad_kl = torch.where(mask, grad_kl, 0)
    if impl == "reference":
        grad = kl_gradient(logits, ref_logits, settings, stats, grad_kl)
        out.copy_(out.to(output_dtype(out)) + grad if accumulate else grad)
        return
    grad_kl = grad_kl.to(torch.float32).contiguous()
    stats = KLRowStats(*(x.contiguous() for x in stats))
    layouts = common_layouts(logits, ref_logits, out)
    if layouts is None:
        dense = torch.empty(out.shape, dtype=out.dtype, device=out.device)
        if accumulate:
            dense.copy_(out)
        dense_logits, dense_ref = logits.contiguous(), ref_logits.contiguous()
        kl_row_gradient(
            impl, dense_logits, dense_ref, settings, stats, grad_kl, dense, accumulate=accumulate
        )
        out.copy_(dense)
        return
    if impl == "triton":
        kernels = triton_support.kernels(OP)
        kernels.backward(logits, ref_logits, layouts, settings, stats, grad_kl, out, accumulate)
        return
    native.core().kl_from_logits_backward(
        _rows_for_cpu(logits, layouts[0]),
        _rows_for_cpu(ref_logits, layouts[1]),
        _settings_for_cpu(settings, logits.shape[-1]),
        (*(x.data_ptr() for x in stats), grad_kl.data_ptr()),
        _rows_for_cpu(out, layouts[2]),
        logits.shape[-1],
        accumulate,
        native.thread_count(),
    )
