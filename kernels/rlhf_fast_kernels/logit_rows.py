"""Rows of logits: sums over the vocabulary and gradients, for every op that meets logits.

`logprobs_from_logits` is the public face; the ops that make logits chunk by chunk from hidden
states call these functions on a chunk. Neither autograd nor validation happens here.

    stats = row_stats("cpu", logits, labels, settings, with_entropy=True)
    row_gradient("cpu", logits, labels, settings, stats, g, h, out)

In a vocabulary shard (tensor parallelism) `row_stats(..., shard=True)` describes the shard alone
and `gather_shards` the whole; `row_gradient` takes the statistics of the whole and fills the shard.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rlhf_fast_kernels import native, triton_support
from rlhf_fast_kernels.logit_settings import RowSettings, RowStats
from rlhf_fast_kernels.reference.logprobs_from_logits import logit_gradient, logit_stats

__all__ = [
    "RowSettings",
    "RowStats",
    "common_layouts",
    "gather_shards",
    "merge_shards",
    "row_gradient",
    "row_layout",
    "row_stats",
]

OP = "logprobs_from_logits"
Layout = tuple[int, int, int, int]


# ---- where rows lie -----------------------------------------------------------------------------


def row_layout(logits: Tensor) -> Layout | None:
    """(outer, inner, outer stride, inner stride) of the rows in elements.

    Two strides describe every view that slices or transposes the leading dims of a 3-D tensor.
    None where they do not suffice, or where the vocabulary itself is strided.
    """
    vocab = logits.shape[-1]
    if vocab > 1 and logits.stride(-1) != 1:
        return None
    merged: list[tuple[int, int]] = []
    for size, stride in zip(logits.shape[:-1], logits.stride()[:-1], strict=True):
        if size == 1:
            continue
        if merged and merged[-1][1] == size * stride:
            merged[-1] = (merged[-1][0] * size, stride)
        else:
            merged.append((size, stride))
    if len(merged) > 2:
        return None
    while len(merged) < 2:
        merged.insert(0, (1, 0))
    (outer, outer_stride), (inner, inner_stride) = merged
    return outer, inner, outer_stride, inner_stride


def _addressable(logits: Tensor) -> tuple[Tensor, Layout]:
    layout = row_layout(logits)
    if layout is None:
        logits = logits.contiguous()
        layout = row_layout(logits)
        assert layout is not None
    return logits, layout


def common_layouts(*tensors: Tensor) -> list[Layout] | None:
    """(outer, inner, outer stride, inner stride) of each, with the same sizes; None if impossible.

    Rows at a single stride can be cut into outer and inner ones anywhere.
    """
    found = [row_layout(x) for x in tensors]
    layouts = [layout for layout in found if layout is not None]
    if len(layouts) < len(found):
        return None
    outer, inner = max(layout[:2] for layout in layouts)
    common = []
    for layout in layouts:
        if layout[0] == 1:
            layout = (outer, inner, inner * layout[3], layout[3])
        if layout[:2] != (outer, inner):
            return None
        common.append(layout)
    return common


# ---- statistics ---------------------------------------------------------------------------------


def row_stats(
    impl: str,
    logits: Tensor,
    labels: Tensor,
    settings: RowSettings,
    *,
    with_entropy: bool,
    shard: bool = False,
    rows: Tensor | None = None,
) -> RowStats:
    """Log-probability, entropy and log-sum-exp in one read of the logits.

    Args:
        impl: `"reference"`, `"cpu"` or `"triton"`.
        logits: [..., V], read where the rows lie; a strided last dim is copied.
        labels: int64 ids of the whole vocabulary, one a row.
        settings: see `RowSettings`. In a shard it must hold `vocab_size`.
        with_entropy: otherwise the entropy is None.
        shard: the columns are one of several shards; see `RowStats`.
        rows: int64 of labels' shape, the flattened row that each label is for; others are not
            read. One out of range gives NaN in Triton and is illegal elsewhere.

    Returns:
        `RowStats` of labels' shape. A label outside the vocabulary gives NaN.
    """
    logits, labels, settings = logits.detach(), labels.contiguous(), settings.ready()
    if impl == "reference":
        if rows is not None:
            logits = logits.reshape(-1, logits.shape[-1])[rows]
        return logit_stats(logits, labels, settings, with_entropy=with_entropy, shard=shard)
    stats = _new_stats(labels, with_entropy)
    if labels.numel() == 0:
        return stats
    logits, layout = _addressable(logits)
    if impl == "triton":
        kernels = triton_support.kernels(OP)
        kernels.forward(logits, layout, labels, settings, stats, shard, rows)
        return stats
    native.core().logprobs_from_logits_forward(
        (logits.data_ptr(), native.DTYPE_CODES[logits.dtype], *layout),
        _settings_for_cpu(settings, logits.shape[-1]),
        labels.data_ptr(),
        labels.numel(),
        _pointer(rows),
        shard,
        (stats.logprobs.data_ptr(), _pointer(stats.entropy), stats.lse.data_ptr()),
        native.thread_count(),
    )
    return stats


def _new_stats(labels: Tensor, with_entropy: bool) -> RowStats:
    logprobs = torch.empty(labels.shape, dtype=torch.float32, device=labels.device)
    lse = torch.empty(labels.shape, dtype=torch.float64, device=labels.device)
    return RowStats(logprobs, torch.empty_like(logprobs) if with_entropy else None, lse)


def _pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _settings_for_cpu(settings: RowSettings, width: int) -> tuple[float, ...]:
    return (
        settings.columns(width),
        settings.vocab_start,
        settings.labels_end(width),
        settings.ignore_index,
        _pointer(settings.temperature),
        settings.scale,
        settings.softcap or 0.0,
    )


# ---- shards -------------------------------------------------------------------------------------


def merge_shards(parts: Sequence[RowStats], labels: Tensor, settings: RowSettings) -> RowStats:
    """The statistics of the whole vocabulary from those of its shards, in the order given.

    With w_k = exp(lse_k - lse): entropy = sum_k w_k (H_k + lse - lse_k). A shard without an entry
    above -inf (lse_k = -inf) has no weight. The order fixes the bits.
    """
    first = parts[0]
    ignored = labels == settings.ignore_index
    shard_lse = [part.lse for part in parts]
    lse = torch.logsumexp(torch.stack(shard_lse), dim=0)
    label = first.logprobs.double()
    for part in parts[1:]:
        label = label + part.logprobs
    entropy = None
    if first.entropy is not None:
        total = torch.where(lse == -torch.inf, torch.nan, 0.0).to(lse)
        for part, own in zip(parts, shard_lse, strict=True):
            assert part.entropy is not None
            above = lse - own
            term = torch.exp(-above) * (part.entropy + above)
            total = total + torch.where(own == -torch.inf, 0, term)
        entropy = torch.where(ignored, 0, total).to(first.entropy.dtype)
    logprobs = torch.where(ignored, 0, label - lse).to(first.logprobs.dtype)
    return RowStats(logprobs, entropy, torch.where(ignored, 0, lse))


def gather_shards(stats: RowStats, labels: Tensor, settings: RowSettings, group: Any) -> RowStats:
    """`merge_shards` over the ranks of a process group, in rank order: the same bits on each."""
    kind = stats.logprobs.dtype
    fields = [stats.logprobs, stats.lse, *([] if stats.entropy is None else [stats.entropy])]
    own = torch.stack([field.double() for field in fields])
    gathered = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(gathered, own, group=group)
    parts = [
        RowStats(part[0].to(kind), part[2].to(kind) if len(fields) == 3 else None, part[1])
        for part in gathered
    ]
    return merge_shards(parts, labels, settings)


# ---- gradient -----------------------------------------------------------------------------------


def row_gradient(
    impl: str,
    logits: Tensor,
    labels: Tensor,
    settings: RowSettings,
    stats: RowStats,
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    out: Tensor,
    *,
    slots: Tensor | None = None,
) -> None:
    """Write d loss / d logits in one read of the logits.

    Args:
        impl: as for `row_stats`.
        logits: as for `row_stats`; all of them, or this rank's shard.
        labels: as for `row_stats`. In a shard `settings.vocab_size` says which are legal.
        settings: those of the forward pass.
        stats: lse, and with `grad_entropy` the entropy, of the whole vocabulary.
        grad_logprobs: d loss / d logprobs of labels' shape, or None for zero.
        grad_entropy: the same of the entropy.
        out: of logits' shape, contiguous in V, of logits' or another floating dtype; may be
            `logits` itself. Rows whose upstream gradients are both 0 become exactly 0.
        slots: int64, one a row of the logits: the position of its label, -1 for a row without,
            whose gradient is 0. None: labels and rows correspond.
    """
    logits, labels, settings = logits.detach(), labels.contiguous(), settings.ready()
    if out.numel() == 0:
        return
    if impl == "reference":
        upstream = (grad_logprobs, grad_entropy)
        _reference_gradient(logits, labels, settings, stats, upstream, out, slots)
        return
    g = None if grad_logprobs is None else grad_logprobs.to(torch.float32).contiguous()
    h = None if grad_entropy is None else grad_entropy.to(torch.float32).contiguous()
    logits, _ = _addressable(logits)
    layouts = common_layouts(logits, out)
    if layouts is None:
        dense = torch.empty(logits.shape, dtype=out.dtype, device=out.device)
        row_gradient(impl, logits, labels, settings, stats, g, h, dense, slots=slots)
        out.copy_(dense)
        return
    if impl == "triton":
        kernels = triton_support.kernels(OP)
        kernels.backward(logits, layouts, labels, settings, stats, (g, h), out, slots)
        return
    layout, out_layout = layouts
    native.core().logprobs_from_logits_backward(
        (logits.data_ptr(), native.DTYPE_CODES[logits.dtype], *layout),
        _settings_for_cpu(settings, logits.shape[-1]),
        labels.data_ptr(),
        _pointer(slots),
        (_pointer(stats.entropy), stats.lse.data_ptr()),
        (_pointer(g), _pointer(h)),
        (out.data_ptr(), native.DTYPE_CODES[out.dtype], *out_layout[2:], out.shape[-1]),
        native.thread_count(),
    )


def _reference_gradient(
    logits: Tensor,
    labels: Tensor,
    settings: RowSettings,
    stats: RowStats,
    upstream: tuple[Tensor | None, Tensor | None],
    out: Tensor,
    slots: Tensor | None,
) -> None:
    if slots is None:
        out.copy_(logit_gradient(logits, labels, settings, stats, *upstream))
        return
    if labels.numel() == 0:
        out.zero_()
        return
    at = slots.clamp(min=0).reshape(logits.shape[:-1])

    def pick(x: Tensor | None) -> Tensor | None:
        return None if x is None else x[at]

    grad = logit_gradient(
        logits,
        torch.where(slots.reshape(at.shape) < 0, settings.ignore_index, labels[at]),
        settings._replace(temperature=pick(settings.temperature)),
        RowStats(stats.logprobs[at], pick(stats.entropy), stats.lse[at]),
        *map(pick, upstream),
    )
    out.copy_(grad)
