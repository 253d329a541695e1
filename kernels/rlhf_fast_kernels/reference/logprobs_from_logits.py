"""Log-probs, entropy and their gradient from logits in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_fast_kernels.logit_settings import RowSettings, RowStats
from rlhf_fast_kernels.reference.common import output_dtype


def logprobs_from_logits(
    logits: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    rows: Tensor | None = None,
    vocab_size: int | None = None,
    with_entropy: bool = True,
    ignore_index: int = -100,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """log p(label), H(p) and log sum exp z of p = softmax(z); see `rlhf_fast_kernels`.

    `where` comes before the softmax, so an ignored row may hold NaN. A label outside [0, V) gives
    NaN here: looking for it would stall an accelerator; the public function does on CPUs.
    The log-sum-exp carries no gradient.
    """
    if rows is not None:
        logits = logits.reshape(-1, logits.shape[-1])[rows]
    logits = logits[..., :vocab_size]
    kept = labels != ignore_index
    logits = torch.where(kept.unsqueeze(-1), logits, 0)
    z, _ = _scaled(logits, temperature, softcap)
    log_p = torch.log_softmax(z, dim=-1)
    in_range = (labels >= 0) & (labels < logits.shape[-1])
    picked = log_p.gather(-1, torch.where(in_range, labels, 0).unsqueeze(-1)).squeeze(-1)
    picked = torch.where(in_range, picked, torch.nan)
    logprobs = torch.where(kept, picked, 0)
    lse = torch.where(kept, torch.logsumexp(z.detach(), dim=-1), 0)
    if not with_entropy:
        return logprobs, None, lse
    return logprobs, torch.where(kept, _entropy(log_p), 0), lse


def _scaled(
    logits: Tensor, temperature: float | Tensor, softcap: float | None
) -> tuple[Tensor, Tensor | None]:
    """z, and tanh(logits / softcap) if there is a softcap."""
    z = logits.to(output_dtype(logits))
    bounded = None
    if softcap is not None:
        bounded = torch.tanh(z / softcap)
        z = softcap * bounded
    if isinstance(temperature, Tensor):
        temperature = temperature.to(z.dtype).unsqueeze(-1)
    return z / temperature, bounded


def _entropy(log_p: Tensor) -> Tensor:
    # p log p -> 0 as p -> 0: a vocabulary entry at -inf adds nothing.
    finite_log_p = torch.where(log_p == -torch.inf, 0, log_p)
    return -(log_p.exp() * finite_log_p).sum(-1)


# ---- the same as explicit functions of rows -----------------------------------------------------


def logit_stats(
    logits: Tensor, labels: Tensor, settings: RowSettings, *, with_entropy: bool, shard: bool
) -> RowStats:
    """What `logit_rows.row_stats` returns."""
    width = logits.shape[-1]
    kept = labels != settings.ignore_index
    temperature = settings.scale if settings.temperature is None else settings.temperature
    logits = torch.where(kept.unsqueeze(-1), logits[..., : settings.columns(width)], 0)
    z, _ = _scaled(logits, temperature, settings.softcap)
    lse = torch.logsumexp(z, dim=-1)
    here, legal = _label_columns(labels, settings, width)
    label = torch.where(here < 0, 0, _at(z, here))
    logprobs = label if shard else torch.where(here < 0, torch.nan, label - lse)
    logprobs = torch.where(legal, logprobs, torch.nan)
    entropy = None
    if with_entropy:
        entropy = _entropy(z - lse.unsqueeze(-1))
        entropy = torch.where(lse == -torch.inf, torch.nan, entropy)
        entropy = torch.where(kept, entropy, 0)
    return RowStats(torch.where(kept, logprobs, 0), entropy, torch.where(kept, lse, 0).double())


def _label_columns(labels: Tensor, settings: RowSettings, width: int) -> tuple[Tensor, Tensor]:
    """(column of each label or -1 if it is not here, whether it belongs to the vocabulary)."""
    column = labels - settings.vocab_start
    here = (column >= 0) & (column < settings.columns(width))
    legal = (labels >= 0) & (labels < settings.labels_end(width))
    return torch.where(here & legal, column, -1), legal


def _at(z: Tensor, column: Tensor) -> Tensor:
    if z.shape[-1] == 0:
        return z.new_zeros(column.shape)
    return z.gather(-1, column.clamp(min=0).unsqueeze(-1)).squeeze(-1)


def logit_gradient(
    logits: Tensor,
    labels: Tensor,
    settings: RowSettings,
    stats: RowStats,
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
) -> Tensor:
    """What `logit_rows.row_gradient` writes; a row whose upstream gradients are 0 is exactly 0."""
    width = logits.shape[-1]
    temperature = settings.scale if settings.temperature is None else settings.temperature
    columns = settings.columns(width)
    z, bounded = _scaled(logits[..., :columns], temperature, settings.softcap)
    zero = torch.zeros_like(labels, dtype=z.dtype)
    g = (zero if grad_logprobs is None else grad_logprobs.to(z.dtype)).unsqueeze(-1)
    h = (zero if grad_entropy is None else grad_entropy.to(z.dtype)).unsqueeze(-1)
    log_p = z - stats.lse.to(z.dtype).unsqueeze(-1)
    grad = -g * log_p.exp()
    if grad_entropy is not None:
        assert stats.entropy is not None
        shifted = log_p + stats.entropy.to(z.dtype).unsqueeze(-1)
        grad = grad - torch.where(log_p == -torch.inf, 0, h * log_p.exp() * shifted)
    here, legal = _label_columns(labels, settings, width)
    grad = grad + torch.where(torch.arange(columns, device=grad.device) == here.unsqueeze(-1), g, 0)
    grad = torch.where(legal.unsqueeze(-1), grad, torch.nan)
    grad = grad / (temperature.unsqueeze(-1) if isinstance(temperature, Tensor) else temperature)
    if bounded is not None:
        grad = grad * (1 - bounded.square())
    used = (labels != settings.ignore_index).unsqueeze(-1) & ((g != 0) | (h != 0))
    return torch.nn.functional.pad(torch.where(used, grad, 0), (0, width - columns))
