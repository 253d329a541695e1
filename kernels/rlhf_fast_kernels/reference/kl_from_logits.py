"""The exact KL between two rows of logits and its gradient in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_fast_kernels.kl_settings import KLRowSettings, KLRowStats
from rlhf_fast_kernels.reference.common import output_dtype

SERIES_BELOW = 0.01  # there six terms of e^v - 1 - v are exact in fp64


def _one_side(logits: Tensor, temperature: float | Tensor, softcap: float | None) -> Tensor:
    """z: the capped logits over the temperature."""
    z = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    if isinstance(temperature, Tensor):
        temperature = temperature.to(z.dtype).unsqueeze(-1)
    return z / temperature


def kl_from_logits(
    logits: Tensor,
    ref_logits: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    ref_softcap: float | None = None,
    mask: Tensor | None = None,
    vocab_size: int | None = None,
) -> Tensor:
    """sum_j p_j (log p_j - log q_j); see `rlhf_fast_kernels`.

    `where` comes before the softmax, so a masked row may hold NaN.
    """
    compute = output_dtype(logits, ref_logits)
    logits, ref_logits = (x[..., :vocab_size].to(compute) for x in (logits, ref_logits.detach()))
    if mask is not None:
        logits, ref_logits = (torch.where(mask.unsqueeze(-1), x, 0) for x in (logits, ref_logits))
    log_p = torch.log_softmax(_one_side(logits, temperature, softcap), dim=-1)
    log_q = torch.log_softmax(_one_side(ref_logits, temperature, ref_softcap), dim=-1)
    # p log p -> 0 as p -> 0, whatever q: an entry at -inf adds nothing.
    gone = log_p == -torch.inf
    gap = torch.where(gone, 0, log_p) - torch.where(gone, 0, log_q)
    kl = (log_p.exp() * gap).sum(-1)
    return kl if mask is None else torch.where(mask, kl, 0)


# ---- the same as explicit functions of rows -----------------------------------------------------


def kl_stats(
    logits: Tensor,
    ref_logits: Tensor,
    settings: KLRowSettings,
    *,
    mask: Tensor | None = None,
    shard: bool = False,
) -> KLRowStats:
    """What `kl_rows.kl_row_stats` returns; fp64 logits give an fp64 KL."""
    columns = settings.columns(logits.shape[-1])
    logits, ref_logits = logits[..., :columns], ref_logits[..., :columns]
    if mask is not None:
        logits = torch.where(mask.unsqueeze(-1), logits, 0)
        ref_logits = torch.where(mask.unsqueeze(-1), ref_logits, 0)
    z, ref_z, _ = _scaled(logits, ref_logits, settings)
    lse, ref_lse = torch.logsumexp(z, dim=-1), torch.logsumexp(ref_z, dim=-1)
    kl = _divergence(z, ref_z, lse.unsqueeze(-1), ref_lse.unsqueeze(-1))
    if shard:
        kl = torch.where((lse == -torch.inf), 0, kl)
        kl = torch.where((lse > -torch.inf) & (ref_lse == -torch.inf), torch.inf, kl)
    else:
        kl = torch.where((lse == -torch.inf) | (ref_lse == -torch.inf), torch.nan, kl)
    if mask is not None:
        kl, lse, ref_lse = (torch.where(mask, x, 0) for x in (kl, lse, ref_lse))
    return KLRowStats(kl, lse.double(), ref_lse.double())


def _scaled(
    logits: Tensor, ref_logits: Tensor, settings: KLRowSettings
) -> tuple[Tensor, Tensor, Tensor | None]:
    """z of both sides, and tanh(logits / softcap) if there is a softcap."""
    compute = output_dtype(logits, ref_logits)
    z, ref_z, bounded = logits.to(compute), ref_logits.to(compute), None
    if settings.softcap is not None:
        bounded = torch.tanh(z / settings.softcap)
        z = settings.softcap * bounded
    if settings.ref_softcap is not None:
        ref_z = settings.ref_softcap * torch.tanh(ref_z / settings.ref_softcap)
    temperature = _temperature(settings, compute)
    return z / temperature, ref_z / temperature, bounded


def _temperature(settings: KLRowSettings, compute: torch.dtype) -> float | Tensor:
    if settings.temperature is None:
        return settings.scale
    return settings.temperature.to(compute).unsqueeze(-1)


def _divergence(z: Tensor, ref_z: Tensor, lse: Tensor, ref_lse: Tensor) -> Tensor:
    """sum p (e^v - 1 - v) with v = log q - log p: no term is negative, so nothing cancels."""
    log_p, log_q = z - lse, ref_z - ref_lse
    p = log_p.exp()
    # The difference of the logits comes first: it is exact where policies are close.
    v = (lse - ref_lse) - (z - ref_z)
    series = v * v * (1 / 2 + v * (1 / 6 + v * (1 / 24 + v * (1 / 120 + v * (1 / 720)))))
    apart = log_q.exp() - p - torch.where(log_p == -torch.inf, 0, p * v)
    terms = torch.where(v.abs() < SERIES_BELOW, p * series, apart)
    # p = 0 leaves q, 0 where both are; q = 0 < p is infinite, even where exp(log p) underflows.
    terms = torch.where(log_p == -torch.inf, log_q.exp(), terms)
    impossible = (log_p > -torch.inf) & (log_q == -torch.inf)
    return torch.where(impossible, torch.inf, terms).sum(-1)


def kl_gradient(
    logits: Tensor,
    ref_logits: Tensor,
    settings: KLRowSettings,
    stats: KLRowStats,
    grad_kl: Tensor,
) -> Tensor:
    """What `kl_rows.kl_row_gradient` writes: grad_kl p (log p - log q - KL) by the logits."""
    width = logits.shape[-1]
    columns = settings.columns(width)
    z, ref_z, bounded = _scaled(logits[..., :columns], ref_logits[..., :columns], settings)
    log_p = z - stats.lse.to(z.dtype).unsqueeze(-1)
    centre = (stats.lse - stats.ref_lse).to(z.dtype)
    u = (z - ref_z) - centre.unsqueeze(-1) - stats.kl.to(z.dtype).unsqueeze(-1)
    g = grad_kl.to(z.dtype).unsqueeze(-1)
    grad = g * log_p.exp() * u / _temperature(settings, z.dtype)
    grad = torch.where(torch.isfinite(stats.kl).unsqueeze(-1), grad, torch.nan)
    grad = torch.where(log_p == -torch.inf, 0, grad)
    if bounded is not None:
        grad = grad * (1 - bounded.square())
    return torch.nn.functional.pad(torch.where(g == 0, 0, grad), (0, width - columns))
