"""Other ways from hidden states to log-probs and the PPO loss, for benches of the linear ops."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rlhf_fast_kernels import linear_logprobs, ppo_loss


def all_logits(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """What trainers run: all logits, then log_softmax; bf16 logits are upcast."""
    log_p = torch.log_softmax((hidden @ weight.t()).float(), dim=-1)
    logprobs = log_p.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    return logprobs, -(log_p.exp() * log_p).sum(-1)


def all_logits_fp64(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The truth: fp64 stays fp64."""
    log_p = torch.log_softmax(hidden @ weight.t(), dim=-1)
    logprobs = log_p.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    return logprobs, -(log_p.exp() * log_p).sum(-1)


def chunked_autograd(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The same for 512 tokens at a time under activation checkpointing (verl's torch scheme)."""
    pieces = [
        checkpoint(all_logits, x, weight, y, use_reentrant=False)
        for x, y in zip(hidden.split(512), labels.split(512), strict=True)
    ]
    logprobs, entropy = zip(*pieces, strict=True)
    return torch.cat(logprobs), torch.cat(entropy)


def recomputing(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """This package's op that serves any loss, and so makes its logits twice: 8 T H V flops."""
    logprobs, entropy = linear_logprobs(hidden, weight, labels)
    assert entropy is not None
    return logprobs, entropy


def loss_of(
    logprobs: Tensor, entropy: Tensor, mask: Tensor, tensors: dict[str, Tensor], **settings: float
) -> Tensor:
    """`ppo_loss` of what any of the above returns."""
    return ppo_loss(
        logprobs=logprobs,
        entropy=entropy,
        mask=mask,
        normalizer=float(mask.shape[0]),
        **tensors,
        **settings,  # type: ignore[arg-type]
    ).loss
