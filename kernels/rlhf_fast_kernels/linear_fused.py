"""`linear_logprobs` forward in one fused Triton kernel: no logits in memory, not even a chunk.

The products are Triton's, not cuBLAS's; what they cost in speed they save in memory, 12 bytes a row
and 4096 columns beside the results. Backward makes its logits chunk by chunk.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_fast_kernels import triton_support
from rlhf_fast_kernels.logit_settings import RowSettings, RowStats

OP = "linear_logprobs"


def fused_stats(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    settings: RowSettings,
    *,
    bias: Tensor | None = None,
    with_entropy: bool = True,
    shard: bool = False,
    rows: Tensor | None = None,
) -> RowStats:
    """Log-probability, entropy and log-sum-exp of rows against a vocabulary head.

    Args:
        hidden: [N, H] fp32, bf16 or fp16; a strided last dim is copied.
        weight: [V, H] of the same dtype; likewise.
        labels: [n] int64 ids of the whole vocabulary.
        settings: see `RowSettings`; a temperature tensor is [n]. In a shard it must hold
            `vocab_size`.
        bias: [V] of any floating dtype, or None.
        with_entropy: otherwise the entropy is None.
        shard: the rows of the weight are one of several shards; see `RowStats`.
        rows: [n] int64, the row of `hidden` that each label is for; others are not read. One out of
            range gives NaN. None: labels and rows correspond.

    Returns:
        `RowStats`, [n] each. A label outside the vocabulary gives NaN, an ignored one 0.

    Raises:
        TypeError: hidden and weight differ in dtype.
        ValueError: shapes that do not fit.
    """
    _validate(hidden, weight, labels, bias, rows)
    labels = labels.contiguous()
    logprobs = torch.empty(labels.shape, dtype=torch.float32, device=labels.device)
    entropy = torch.empty_like(logprobs) if with_entropy else None
    lse = torch.empty(labels.shape, dtype=torch.float64, device=labels.device)
    stats = RowStats(logprobs, entropy, lse)
    if labels.numel() == 0:
        return stats
    if settings.temperature is not None:
        fp32 = settings.temperature.to(torch.float32).contiguous()
        settings = settings._replace(temperature=fp32)
    triton_support.kernels(OP).forward(
        _dense_rows(hidden.detach()),
        _dense_rows(weight.detach()),
        None if bias is None else bias.detach().contiguous(),
        labels,
        settings,
        stats,
        shard,
        None if rows is None else rows.contiguous(),
    )
    return stats


def _dense_rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _validate(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, rows: Tensor | None
) -> None:
    if hidden.dtype != weight.dtype:
        raise TypeError(
            f"{OP}: the fused kernel multiplies operands of one dtype, got hidden {hidden.dtype} "
            f"and weight {weight.dtype}"
        )
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"{OP}: the fused kernel takes hidden [N, H] and weight [V, H], "
            f"got {tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"{OP}: bias has shape {tuple(bias.shape)}, expected {tuple(weight.shape[:1])}"
        )
    expected = hidden.shape[:1] if rows is None else rows.shape
    if labels.shape != expected or labels.dim() != 1:
        of = "hidden" if rows is None else "rows"
        raise ValueError(
            f"{OP}: the fused kernel takes one label a row of {of}, "
            f"got {tuple(labels.shape)} for {tuple(expected)}"
        )
