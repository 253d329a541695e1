"""Inputs and comparisons for the tests of the ops on hidden states and a vocabulary head."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlhf_fast_kernels import native, reference, triton_support

IMPLS = ["reference"]
if native.missing("logprobs_from_logits_forward", "kl_from_logits_forward", "ppo_loss") is None:
    IMPLS.append("cpu")
FAST = IMPLS[-1]
# Row kernels of every implementation, Triton's in the interpreter.
ALL_IMPLS = [*IMPLS, *(["triton"] if triton_support.on_triton(torch.device("cpu")) is None else [])]
SETTINGS: dict[str, Any] = {
    "clip_eps_low": 0.2,
    "clip_eps_high": 0.28,
    "dual_clip": 1.7,
    "entropy_coef": 0.01,
    "kl_coef": 0.1,
    "kl_estimator": "k3",
    "kl_gradient": "k2",
    "log_ratio_clamp": 20.0,
}


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(shape, generator=generator(seed))


def head(tokens: int, width: int, vocab: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """(hidden [T, H], weight [V, H], labels [T]): logits of a spread of about 2."""
    hidden = draw(tokens, width, seed=seed)
    weight = draw(vocab, width, seed=seed + 1, scale=2.0 * width**-0.5)
    return hidden, weight, torch.randint(0, vocab, (tokens,), generator=generator(seed + 2))


def per_token(tokens: int, vocab: int, seed: int = 10) -> dict[str, Tensor]:
    """What the loss reads: old and reference log-probs near those of the head, advantages."""
    level = -float(torch.tensor(float(vocab)).log())
    return {
        "old_logprobs": level + draw(tokens, seed=seed),
        "advantages": draw(tokens, seed=seed + 1),
        "ref_logprobs": level + draw(tokens, seed=seed + 2),
        "weights": 1 + 0.1 * draw(tokens, seed=seed + 3),
    }


def leaves(*tensors: Tensor | None, dtype: torch.dtype | None = None) -> list[Any]:
    """Fresh copies that require gradients."""
    return [
        None if x is None else x.detach().to(dtype or x.dtype).clone().requires_grad_()
        for x in tensors
    ]


def doubles(tensors: dict[str, Any]) -> dict[str, Any]:
    return {name: None if x is None else x.double() for name, x in tensors.items()}


def close(got: Tensor | None, want: Tensor | None, tolerance: float) -> None:
    """Within `tolerance` of the largest entry of the truth."""
    assert got is not None
    assert want is not None
    assert got.shape == want.shape
    size = 1.0 + float(want.detach().abs().max()) if want.numel() else 1.0
    error = (got.detach().double() - want.detach().double()).abs()
    worst = float(error.max()) if error.numel() else 0.0
    assert worst <= tolerance * size, (worst, size)


def relative(got: Tensor | None, want: Tensor | None) -> float:
    """Frobenius norm of the error over that of the truth."""
    assert got is not None
    assert want is not None
    difference = got.detach().double() - want.detach().double()
    return float(difference.norm() / (want.detach().double().norm() + 1e-30))


def reference_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    mask: Tensor,
    tensors: dict[str, Any],
    **more: Any,
) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """(loss, sums by name, extrema by name) of all logits at once."""
    value_part = {"values": None, "old_values": None, "returns": None}
    loss, sums, extrema = reference.linear_ppo_loss(
        hidden,
        weight,
        labels,
        mask=mask,
        value_clip_eps=None,
        value_coef=1.0,
        **value_part,
        **{**SETTINGS, **tensors, **more},
    )
    names = dict(zip(reference.PPO_SUM_NAMES, sums.unbind(), strict=True))
    peaks = dict(zip(("ratio_max", "negative_ratio_min"), extrema.unbind(), strict=True))
    return loss, names, peaks
