"""Log-probs and entropy from logits in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_fast_kernels.reference.common import output_dtype


def logprobs_from_logits(
    logits: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    with_entropy: bool = True,
    ignore_index: int = -100,
) -> tuple[Tensor, Tensor | None]:
    """log p(label) and H(p) of p = softmax(logits / temperature); see `rlhf_fast_kernels`.

    `where` comes before the softmax, so an ignored row may hold NaN. A label outside [0, V) gives
    NaN here: looking for it would stall an accelerator; the public function does on CPUs.
    """
    compute = output_dtype(logits)
    kept = labels != ignore_index
    z = torch.where(kept.unsqueeze(-1), logits, 0).to(compute)
    if isinstance(temperature, Tensor):
        z = z / temperature.to(compute).unsqueeze(-1)
    else:
        z = z / temperature
    log_p = torch.log_softmax(z, dim=-1)
    in_range = (labels >= 0) & (labels < logits.shape[-1])
    picked = log_p.gather(-1, torch.where(in_range, labels, 0).unsqueeze(-1)).squeeze(-1)
    picked = torch.where(in_range, picked, torch.nan)
    logprobs = torch.where(kept, picked, 0)
    if not with_entropy:
        return logprobs, None
    # p log p -> 0 as p -> 0: a vocabulary entry at -inf adds nothing.
    finite_log_p = torch.where(log_p == -torch.inf, 0, log_p)
    entropy = -(log_p.exp() * finite_log_p).sum(-1)
    return logprobs, torch.where(kept, entropy, 0)
