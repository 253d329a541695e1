"""What the references of several ops share."""

from __future__ import annotations

import torch
from torch import Tensor

KL_ESTIMATORS = ("k1", "k2", "k3")


def output_dtype(*tensors: Tensor | None) -> torch.dtype:
    """fp64 if an input is fp64, otherwise fp32."""
    double = any(x is not None and x.dtype == torch.float64 for x in tensors)
    return torch.float64 if double else torch.float32


def kl_estimate(log_ratio: Tensor, kl_estimator: str) -> Tensor:
    """Per-token estimate of KL(policy || reference) from d = logprob - ref_logprob."""
    if kl_estimator == "k1":
        return log_ratio
    if kl_estimator == "k2":
        return log_ratio.square() / 2
    return torch.expm1(-log_ratio) + log_ratio
