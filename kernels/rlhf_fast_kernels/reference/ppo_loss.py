"""The PPO objective in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_fast_kernels.reference.common import kl_estimate, output_dtype

# Sums over the masked tokens, in the order of `enum PpoSum` in csrc/cpu/ppo_loss.h.
PPO_SUM_NAMES = (
    "tokens",
    "policy_loss",
    "approx_kl_k1",
    "approx_kl_k2",
    "approx_kl_k3",
    "ratio",
    "ratio_squared",
    "clip_low",
    "clip_high",
    "clip_dual",
    "kl",
    "entropy",
    "value_tokens",
    "value_loss",
    "value_clip",
    "returns",
    "returns_squared",
    "residual",
    "residual_squared",
)


def ppo_policy_terms(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    *,
    clip_eps_low: float,
    clip_eps_high: float,
    dual_clip: float | None,
    log_ratio_clamp: float,
) -> dict[str, Tensor]:
    """Per-token clipped surrogate and what is counted about it; same shape as the inputs."""
    delta = logprobs - old_logprobs
    clamped = delta.clamp(-log_ratio_clamp, log_ratio_clamp)
    ratio = clamped.exp()
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1.0 - clip_eps_low, 1.0 + clip_eps_high)
    loss = torch.maximum(unclipped, clipped)
    use_clip = clipped > unclipped
    terms = {
        "clip_low": use_clip & (advantages < 0),
        "clip_high": use_clip & (advantages > 0),
        "clip_dual": torch.zeros_like(use_clip),
    }
    if dual_clip is not None:
        cap = torch.where(advantages < 0, -dual_clip * advantages, torch.inf)
        terms["clip_dual"] = loss > cap
        loss = torch.minimum(loss, cap)
    return terms | {
        "policy_loss": loss,
        "approx_kl_k1": -delta,
        "approx_kl_k2": 0.5 * delta.square(),
        "approx_kl_k3": torch.expm1(clamped) - clamped,
        "ratio": ratio,
        "ratio_squared": ratio.square(),
    }


def kl_estimate_gradient(log_ratio: Tensor, estimator: str) -> Tensor:
    """d(estimate)/dd: 1 for k1, d for k2, 1 - exp(-d) for k3."""
    if estimator == "k1":
        return torch.ones_like(log_ratio)
    if estimator == "k2":
        return log_ratio
    return -torch.expm1(-log_ratio)


def ppo_kl_term(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    *,
    kl_estimator: str,
    kl_gradient: str,
    log_ratio_clamp: float,
) -> Tensor:
    """Per-token KL estimate with the gradient of k2, or its own; see `ppo_loss`."""
    with torch.no_grad():
        d = (logprobs - ref_logprobs).clamp(-log_ratio_clamp, log_ratio_clamp)
        value = kl_estimate(d, kl_estimator)
        slope = kl_estimate_gradient(d, "k2" if kl_gradient == "k2" else kl_estimator)
    # Exactly `value` forward (x - x is 0 for finite x), exactly `slope` backward.
    return value + slope * (logprobs - logprobs.detach())


def ppo_value_terms(
    values: Tensor,
    old_values: Tensor | None,
    returns: Tensor,
    *,
    value_clip_eps: float | None,
) -> dict[str, Tensor]:
    """Per-token value loss, clipped around `old_values` unless `value_clip_eps` is None."""
    residual = returns - values
    squared = residual.square()
    clipped = torch.zeros_like(squared, dtype=torch.bool)
    worst = squared
    if value_clip_eps is not None and old_values is not None:
        moved = values - old_values
        near = old_values + moved.clamp(-value_clip_eps, value_clip_eps)
        near_squared = (near - returns).square()
        # Inside the band `near` is `values` up to rounding, which must not count as clipped.
        clipped = (near_squared > squared) & (moved.abs() > value_clip_eps)
        worst = torch.maximum(squared, near_squared)
    return {
        "value_loss": 0.5 * worst,
        "value_clip": clipped,
        "returns": returns,
        "returns_squared": returns.square(),
        "residual": residual,
        "residual_squared": squared,
    }


def ppo_loss(
    *,
    logprobs: Tensor | None,
    old_logprobs: Tensor | None,
    advantages: Tensor | None,
    mask: Tensor,
    normalizer: float | Tensor,
    clip_eps_low: float,
    clip_eps_high: float,
    dual_clip: float | None,
    entropy: Tensor | None,
    entropy_coef: float,
    ref_logprobs: Tensor | None,
    kl_coef: float,
    kl_estimator: str,
    kl_gradient: str,
    values: Tensor | None,
    old_values: Tensor | None,
    returns: Tensor | None,
    value_clip_eps: float | None,
    value_coef: float,
    weights: Tensor | None,
    log_ratio_clamp: float,
    kl: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss [], sums [len(PPO_SUM_NAMES)], extrema [2]): the maths of the public `ppo_loss`."""
    compute = output_dtype(logprobs, values)

    def kept(x: Tensor) -> Tensor:  # before any arithmetic: 0 * NaN is NaN
        return torch.where(mask, x, 0).to(compute)

    terms: dict[str, Tensor] = {}
    objective = torch.zeros((), dtype=compute, device=mask.device)
    if logprobs is not None:
        assert old_logprobs is not None and advantages is not None  # noqa: PT018
        current = kept(logprobs)
        terms |= ppo_policy_terms(
            current,
            kept(old_logprobs).detach(),
            kept(advantages).detach(),
            clip_eps_low=clip_eps_low,
            clip_eps_high=clip_eps_high,
            dual_clip=dual_clip,
            log_ratio_clamp=log_ratio_clamp,
        )
        if weights is not None:
            terms["policy_loss"] = terms["policy_loss"] * kept(weights).detach()
        objective = objective + terms["policy_loss"].sum()
        terms["tokens"] = mask
        if kl is not None:
            terms["kl"] = kept(kl)
        elif ref_logprobs is not None:
            terms["kl"] = ppo_kl_term(
                current,
                kept(ref_logprobs).detach(),
                kl_estimator=kl_estimator,
                kl_gradient=kl_gradient,
                log_ratio_clamp=log_ratio_clamp,
            )
        if "kl" in terms:
            objective = objective + kl_coef * terms["kl"].sum()
        if entropy is not None:
            terms["entropy"] = kept(entropy)
            objective = objective - entropy_coef * terms["entropy"].sum()
    if values is not None:
        assert returns is not None
        terms |= ppo_value_terms(
            kept(values),
            None if old_values is None else kept(old_values).detach(),
            kept(returns).detach(),
            value_clip_eps=value_clip_eps,
        )
        objective = objective + value_coef * terms["value_loss"].sum()
        terms["value_tokens"] = mask
    return _ppo_reduce(objective, terms, mask, normalizer)


def _ppo_reduce(
    objective: Tensor,
    terms: dict[str, Tensor],
    mask: Tensor,
    normalizer: float | Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    count = torch.as_tensor(normalizer, dtype=objective.dtype, device=objective.device)
    # A step without a single loss token has normalizer 0; its sums are exact zeros as well.
    loss = torch.where(count > 0, objective / torch.where(count > 0, count, 1), objective * 0)
    with torch.no_grad():
        zero = torch.zeros((), dtype=objective.dtype, device=objective.device)
        sums = torch.stack(
            [
                torch.where(mask, terms[name], 0).to(objective.dtype).sum()
                if name in terms
                else zero
                for name in PPO_SUM_NAMES
            ]
        )
        extrema = torch.full((2,), -torch.inf, dtype=objective.dtype, device=objective.device)
        if "ratio" in terms and mask.numel() > 0:
            ratio = terms["ratio"]
            highest = torch.where(mask, ratio, -torch.inf).max()
            lowest = torch.where(mask, -ratio, -torch.inf).max()
            extrema = torch.stack([highest, lowest])
    return loss, sums, extrema
