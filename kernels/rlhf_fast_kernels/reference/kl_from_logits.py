"""The exact KL between two rows of logits in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_fast_kernels.reference.common import output_dtype


def _scaled(logits: Tensor, temperature: float | Tensor, softcap: float | None) -> Tensor:
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
    log_p = torch.log_softmax(_scaled(logits, temperature, softcap), dim=-1)
    log_q = torch.log_softmax(_scaled(ref_logits, temperature, ref_softcap), dim=-1)
    # p log p -> 0 as p -> 0, whatever q: an entry at -inf adds nothing.
    gone = log_p == -torch.inf
    gap = torch.where(gone, 0, log_p) - torch.where(gone, 0, log_q)
    kl = (log_p.exp() * gap).sum(-1)
    return kl if mask is None else torch.where(mask, kl, 0)
