"""The ops on hidden states and a vocabulary head in plain PyTorch: all logits at once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlhf_fast_kernels.reference.common import output_dtype
from rlhf_fast_kernels.reference.kl_from_logits import kl_from_logits
from rlhf_fast_kernels.reference.logprobs_from_logits import logprobs_from_logits
from rlhf_fast_kernels.reference.ppo_loss import ppo_loss


def head_logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, compute_dtype: torch.dtype | None
) -> Tensor:
    """[..., V] hidden weight^T + bias: operands rounded to `compute_dtype`, multiplied in fp32."""
    rounding = hidden.dtype if compute_dtype is None else compute_dtype
    wide = output_dtype(hidden, weight)
    logits = _rounded(hidden, rounding).to(wide) @ _rounded(weight, rounding).to(wide).t()
    return logits if bias is None else logits + bias.to(wide)


def _rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x with the values of `dtype` and the gradient of x: a cast would round the gradient too."""
    return x + (x.detach().to(dtype).to(x.dtype) - x.detach())


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
    ignore_index: int = -100,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """Log-probs and entropy of tokens; options are those of `logprobs_from_logits`."""
    # Before the product, so that an ignored token may hold NaN.
    kept = torch.where((labels != ignore_index).unsqueeze(-1), hidden, 0)
    logits = head_logits(kept, weight, bias, compute_dtype)
    logprobs, entropy, _ = logprobs_from_logits(
        logits, labels, ignore_index=ignore_index, **options
    )
    return logprobs, entropy


def linear_kl(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    *,
    bias: Tensor | None = None,
    ref_bias: Tensor | None = None,
    mask: Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
    **options: Any,
) -> Tensor:
    """KL(actor || reference) of each token; options are those of `kl_from_logits`."""
    if mask is not None:
        hidden, ref_hidden = (torch.where(mask.unsqueeze(-1), x, 0) for x in (hidden, ref_hidden))
    logits = head_logits(hidden, weight, bias, compute_dtype)
    with torch.no_grad():
        ref_logits = head_logits(ref_hidden, ref_weight, ref_bias, compute_dtype)
    return kl_from_logits(logits, ref_logits, mask=mask, **options)


def linear_ppo_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    mask: Tensor,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    vocab_size: int | None = None,
    compute_dtype: torch.dtype | None = None,
    reference_head: tuple[Tensor, Tensor, Tensor | None] | None = None,
    **settings: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss [], sums, extrema) of `reference.ppo_loss` on log-probs and entropy of all logits.

    Args:
        reference_head: (hidden, weight, bias) of the reference for the exact KL term, or None.
        settings: the tensors and numbers of `reference.ppo_loss` but `logprobs` and `entropy`.
    """
    chosen = torch.where(mask, labels, -100)
    shape: dict[str, Any] = {
        "temperature": temperature,
        "softcap": softcap,
        "vocab_size": vocab_size,
        "compute_dtype": compute_dtype,
    }
    logprobs, entropy = linear_logprobs(hidden, weight, chosen, bias=bias, **shape)
    kl = None
    if reference_head is not None:
        ref_hidden, ref_weight, ref_bias = reference_head
        kl = linear_kl(
            hidden, weight, ref_hidden, ref_weight, bias=bias, ref_bias=ref_bias, mask=mask,
            ref_softcap=softcap, **shape,
        )  # fmt: skip
    return ppo_loss(logprobs=logprobs, entropy=entropy, kl=kl, mask=mask, **settings)
