"""Rows of two tensors of logits: the exact KL between them and its gradient.

`kl_from_logits` is the public face; the linear ops call these functions on a chunk. Neither
autograd nor validation happens here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from rlhf_fast_kernels import native, reference, triton_support

OP = "kl_from_logits"


class KLRowSettings(NamedTuple):
    """How rows of logits are read, the reference's like the actor's.

    Attributes:
        temperature: [n] fp32, one a row, or None: `scale` for all.
        scale: the temperature where it is one number.
        softcap, ref_softcap: c of c tanh(logit / c), before the temperature; None: no cap.
        vocab_start: id of column 0 in the whole vocabulary.
        vocab_size: real size of the whole vocabulary; columns from there on have no probability.
            None: the columns are all of it.
    """

    temperature: Tensor | None
    scale: float
    softcap: float | None
    ref_softcap: float | None
    vocab_start: int = 0
    vocab_size: int | None = None

    def columns(self, width: int) -> int:
        """How many of `width` columns belong to the vocabulary."""
        if self.vocab_size is None:
            return width
        return max(0, min(width, self.vocab_size - self.vocab_start))


class KLRowStats(NamedTuple):
    """Three numbers a row, [n] each.

    Attributes:
        kl: KL in nats, fp32 (fp64 for fp64 logits). Of one shard: sum_j p_j (z_j - q_j) over its
            columns, with p normalised over them, fp64.
        lse, ref_lse: log-sum-exp of either side, fp64.
    """

    kl: Tensor
    lse: Tensor
    ref_lse: Tensor


def kl_row_stats(
    impl: str,
    logits: Tensor,
    ref_logits: Tensor,
    settings: KLRowSettings,
    *,
    shard: bool = False,
    mask: Tensor | None = None,
) -> KLRowStats:
    """One sweep over both sides.

    Args:
        impl: `"reference"`, `"cpu"` or `"triton"`.
        logits, ref_logits: [n, V], contiguous in V.
        settings: see `KLRowSettings`.
        shard: the columns are one of several shards; see `KLRowStats`.
        mask: [n] bool; rows where it is false are not read and yield 0.
    """
    logits, ref_logits = logits.detach(), ref_logits.detach()
    settings = _contiguous(settings)
    if impl == "reference":
        return _reference_stats(logits, ref_logits, settings, shard, mask)
    count = logits.shape[0]
    stats = KLRowStats(
        *(torch.empty(count, dtype=torch.float64, device=logits.device) for _ in range(3))
    )
    if count and impl == "triton":
        triton_support.kernels(OP).forward(logits, ref_logits, settings, stats, shard, mask)
    elif count:
        native.core().kl_from_logits_forward(
            count,
            native.view(logits),
            native.view(ref_logits),
            _mask_view(mask),
            _settings_for_cpu(settings, logits.shape[1]),
            shard,
            tuple(x.data_ptr() for x in stats),
            native.thread_count(),
        )
    return stats if shard else stats._replace(kl=stats.kl.to(torch.float32))


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
    """Write, or add, d loss / d logits.

    Args:
        impl, logits, ref_logits, settings, mask: as for `kl_row_stats`; in a shard, this rank's.
        stats: of the whole vocabulary.
        grad_kl: [n] d loss / d kl; rows where it is 0 get exactly 0.
        out: [n, V] fp32 or bf16 (any floating dtype for "reference" and "triton"), contiguous in V;
            may be either side's logits.
        accumulate: add to what is there.
    """
    logits, ref_logits = logits.detach(), ref_logits.detach()
    settings = _contiguous(settings)
    if impl == "reference":
        gradient = _reference_gradient(logits, ref_logits, settings, stats, grad_kl, mask)
        out.copy_(out + gradient if accumulate else gradient)
        return
    if out.numel() == 0:
        return
    grad_kl = grad_kl.to(torch.float32).contiguous()
    if impl == "triton":
        kernels = triton_support.kernels(OP)
        kernels.backward(logits, ref_logits, settings, stats, grad_kl, out, accumulate, mask)
        return
    kl = stats.kl.to(torch.float32).contiguous()
    native.core().kl_from_logits_backward(
        logits.shape[0],
        native.view(logits),
        native.view(ref_logits),
        _mask_view(mask),
        _settings_for_cpu(settings, logits.shape[1]),
        (kl.data_ptr(), stats.lse.data_ptr(), stats.ref_lse.data_ptr()),
        grad_kl.data_ptr(),
        native.view(out),
        out.shape[1],
        accumulate,
        native.thread_count(),
    )


def _contiguous(settings: KLRowSettings) -> KLRowSettings:
    if settings.temperature is None:
        return settings
    return settings._replace(temperature=settings.temperature.to(torch.float32).contiguous())


def _mask_view(mask: Tensor | None) -> native.MaskView | None:
    return None if mask is None else (mask.data_ptr(), mask.stride(0), 0)


def _settings_for_cpu(settings: KLRowSettings, width: int) -> tuple[float, ...]:
    return (
        settings.columns(width),
        0 if settings.temperature is None else settings.temperature.data_ptr(),
        settings.scale,
        settings.softcap or 0.0,
        settings.ref_softcap or 0.0,
    )


# ---- shards -------------------------------------------------------------------------------------


def merge_kl_shards(parts: Sequence[KLRowStats], dtype: torch.dtype = torch.float32) -> KLRowStats:
    """The statistics of the whole vocabulary from those of its shards, in the order given.

    With w_k = exp(lse_k - lse) and g_k the shard's sum p (z - q): KL = sum_k w_k g_k - lse +
    ref_lse. A shard without an entry above -inf has no weight. The order fixes the bits.
    """
    lses = [part.lse for part in parts]
    lse = torch.logsumexp(torch.stack(lses), dim=0)
    ref_lse = torch.logsumexp(torch.stack([part.ref_lse for part in parts]), dim=0)
    gap = torch.zeros_like(lse)
    for part, own in zip(parts, lses, strict=True):
        term = torch.exp(own - lse) * part.kl
        gap = gap + torch.where(own == -torch.inf, 0, term)
    return KLRowStats((gap - lse + ref_lse).to(dtype), lse, ref_lse)


def gather_kl_shards(stats: KLRowStats, group: Any) -> KLRowStats:
    """`merge_kl_shards` over the ranks of a process group, in rank order: the same bits on each."""
    own = torch.stack([x.double() for x in stats])
    gathered = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(gathered, own, group=group)
    return merge_kl_shards([KLRowStats(*part) for part in gathered])


# ---- reference ----------------------------------------------------------------------------------


def _sides(
    logits: Tensor, ref_logits: Tensor, settings: KLRowSettings, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(z, q, dz/dlogits), [n, columns] each; rows that do not count are 0."""
    columns = settings.columns(logits.shape[1])
    compute = reference.output_dtype(logits, ref_logits)
    slope = torch.ones((), dtype=compute, device=logits.device)
    if settings.temperature is None:
        temperature = slope * settings.scale
    else:
        temperature = settings.temperature.to(compute).unsqueeze(-1)
    sides: list[Tensor] = []
    for x, cap in ((logits, settings.softcap), (ref_logits, settings.ref_softcap)):
        x = x[:, :columns].to(compute)
        if mask is not None:
            x = torch.where(mask.unsqueeze(-1), x, 0)
        bounded = x if cap is None else cap * torch.tanh(x / cap)
        if cap is not None and not sides:
            slope = 1 - (bounded / cap).square()
        sides.append(bounded / temperature)
    return sides[0], sides[1], slope / temperature


def _reference_stats(
    logits: Tensor,
    ref_logits: Tensor,
    settings: KLRowSettings,
    shard: bool,
    mask: Tensor | None,
) -> KLRowStats:
    z, q, _ = _sides(logits, ref_logits, settings, mask)
    lse, ref_lse = torch.logsumexp(z, -1), torch.logsumexp(q, -1)
    log_p = z - lse.unsqueeze(-1)
    gone = log_p == -torch.inf
    # The difference of log-probs, not of logits: a common offset would cost digits.
    gap = torch.where(gone, 0, log_p - (q - ref_lse.unsqueeze(-1)))
    value = (log_p.exp() * gap).sum(-1)
    lse, ref_lse = lse.double(), ref_lse.double()
    if shard:
        value = torch.where(lse == -torch.inf, 0, value + lse - ref_lse)
    if mask is not None:
        value = torch.where(mask, value, 0)
    return KLRowStats(value, lse, ref_lse)


def _reference_gradient(
    logits: Tensor,
    ref_logits: Tensor,
    settings: KLRowSettings,
    stats: KLRowStats,
    grad_kl: Tensor,
    mask: Tensor | None,
) -> Tensor:
    z, q, slope = _sides(logits, ref_logits, settings, mask)
    lse, ref_lse = (x.to(z.dtype).unsqueeze(-1) for x in (stats.lse, stats.ref_lse))
    p = (z - lse).exp()
    gap = (z - lse) - (q - ref_lse) - stats.kl.to(z.dtype).unsqueeze(-1)
    value = p * gap * slope * grad_kl.to(z.dtype).unsqueeze(-1)
    kept = p > 0 if mask is None else (p > 0) & mask.unsqueeze(-1)
    gradient = torch.zeros(logits.shape, dtype=z.dtype, device=z.device)
    gradient[:, : z.shape[1]] = torch.where(kept, value, 0)
    return gradient
