"""Every op in plain PyTorch: the specification, and the oracle of tests and benchmarks.

Computed in fp32, or in fp64 when an input is fp64. Written to be read; runs on every device.
"""

from __future__ import annotations

import torch
from torch import Tensor

KL_ESTIMATORS = ("k1", "k2", "k3")


def output_dtype(*tensors: Tensor | None) -> torch.dtype:
    """fp64 if an input is fp64, otherwise fp32."""
    double = any(x is not None and x.dtype == torch.float64 for x in tensors)
    return torch.float64 if double else torch.float32


# ---- rewards and GAE ----------------------------------------------------------------------------


def gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor | None,
    gamma: float,
    gae_lambda: float,
    bootstrap: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Advantages and returns; see `rewards_and_gae.gae` for shapes."""
    if mask is None:
        mask = torch.ones_like(values, dtype=torch.bool)
    if cu_seqlens is not None:
        return _gae_packed(rewards, values, mask, gamma, gae_lambda, bootstrap, cu_seqlens)
    dtype = output_dtype(rewards, values, bootstrap)
    rewards, values = rewards.to(dtype), values.to(dtype)
    next_value = values.new_zeros(values.shape[0]) if bootstrap is None else bootstrap.to(dtype)
    advantage = torch.zeros_like(next_value)
    steps = list(zip(rewards.unbind(1), values.unbind(1), mask.unbind(1), strict=True))
    columns = []
    for reward, value, valid in reversed(steps):
        delta = reward + gamma * next_value - value
        advantage = torch.where(valid, delta + gamma * gae_lambda * advantage, advantage)
        next_value = torch.where(valid, value, next_value)
        columns.append(advantage)
    if not columns:
        return torch.zeros_like(values), torch.zeros_like(values)
    advantages = torch.stack(columns[::-1], dim=1)
    zero = values.new_zeros(())
    return torch.where(mask, advantages, zero), torch.where(mask, advantages + values, zero)


def _gae_packed(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    gamma: float,
    gae_lambda: float,
    bootstrap: Tensor | None,
    cu_seqlens: Tensor,
) -> tuple[Tensor, Tensor]:
    dtype = output_dtype(rewards, values, bootstrap)
    if values.numel() == 0:
        return values.new_zeros(0, dtype=dtype), values.new_zeros(0, dtype=dtype)
    index, inside = _padded_index(cu_seqlens)
    padded = gae(rewards[index], values[index], mask[index] & inside, gamma, gae_lambda, bootstrap)
    flat = index[inside]
    advantages, returns = (
        values.new_zeros(values.shape, dtype=dtype).index_copy(0, flat, x[inside]) for x in padded
    )
    return advantages, returns


def _padded_index(cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """[K, longest] token index of each padded slot, and whether the slot holds a token."""
    starts, lengths = cu_seqlens[:-1].long(), cu_seqlens.diff().long()
    columns = torch.arange(int(lengths.max()), device=cu_seqlens.device)
    inside = columns < lengths[:, None]
    return torch.where(inside, starts[:, None] + columns, 0), inside


def kl_estimate(log_ratio: Tensor, kl_estimator: str) -> Tensor:
    """Per-token estimate of KL(policy || reference) from d = logprob - ref_logprob."""
    if kl_estimator == "k1":
        return log_ratio
    if kl_estimator == "k2":
        return log_ratio.square() / 2
    return torch.expm1(-log_ratio) + log_ratio


def rewards_and_gae(
    old_logprobs: Tensor,
    ref_logprobs: Tensor | None,
    values: Tensor,
    scores: Tensor,
    mask: Tensor | None,
    kl_coef: float,
    kl_estimator: str,
    kl_in_reward: bool,
    log_ratio_clamp: float | None,
    gamma: float,
    gae_lambda: float,
    bootstrap: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rewards, KL, advantages and returns; see `rewards_and_gae.rewards_and_gae` for shapes."""
    if mask is None:
        mask = torch.ones_like(values, dtype=torch.bool)
    dtype = output_dtype(old_logprobs, ref_logprobs, values, scores, bootstrap)
    zero = torch.zeros((), dtype=dtype, device=values.device)
    kl = zero.expand(values.shape)
    if ref_logprobs is not None:
        log_ratio = old_logprobs.to(dtype) - ref_logprobs.to(dtype)
        if log_ratio_clamp is not None:
            log_ratio = log_ratio.clamp(-log_ratio_clamp, log_ratio_clamp)
        kl = kl_estimate(log_ratio, kl_estimator)
    kl = torch.where(mask, kl, zero)
    rewards = -kl_coef * kl if kl_in_reward else torch.zeros_like(kl)
    if scores.shape == values.shape:
        rewards = rewards + torch.where(mask, scores.to(dtype), zero)
    else:
        at, of = last_true(mask, cu_seqlens)
        rewards = rewards.flatten().index_add(0, at, scores.to(dtype)[of]).view(values.shape)
    floats = (rewards, values.to(dtype), mask, gamma, gae_lambda)
    advantages, returns = gae(*floats, bootstrap, cu_seqlens)
    return rewards, kl, advantages, returns


def last_true(mask: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """(flat index of the last true slot, row or segment) of every row that has one."""
    if mask.numel() == 0:
        nothing = torch.zeros(0, dtype=torch.long, device=mask.device)
        return nothing, nothing
    if cu_seqlens is None:
        index = torch.arange(mask.numel(), device=mask.device).view(mask.shape)
        inside = mask
    else:
        index, real = _padded_index(cu_seqlens)
        inside = mask[index] & real
    last = torch.where(inside, index, -1).amax(dim=1)
    rows = (last >= 0).nonzero().flatten()
    return last[rows], rows


# ---- whitening ----------------------------------------------------------------------------------


def moments_dtype(x: Tensor) -> torch.dtype:
    """fp64 where the device has it."""
    return torch.float32 if x.device.type == "mps" else torch.float64


def masked_moments(x: Tensor, mask: Tensor | None) -> Tensor:
    """[3]: count, mean and sum of squared deviations over the true slots."""
    if mask is None:
        mask = torch.ones_like(x, dtype=torch.bool)
    wide = x.to(moments_dtype(x))
    zero = wide.new_zeros(())
    count = mask.sum().to(wide.dtype)
    mean = torch.where(mask, wide, zero).sum() / count.clamp(min=1)
    m2 = torch.where(mask, wide - mean, zero).square().sum()
    return torch.stack([count, mean, m2])


def mean_and_scale(stats: Tensor, unbiased: bool, eps: float) -> tuple[Tensor, Tensor]:
    """Mean and 1/std of moments; the scale is 1 where at most one slot was counted."""
    count, mean, m2 = stats.unbind()
    variance = m2 / (count - int(unbiased)).clamp(min=1)
    scale = torch.where(count > 1, (variance + eps).rsqrt(), torch.ones_like(count))
    return mean, scale


def whiten(
    x: Tensor,
    mask: Tensor | None,
    shift_mean: bool = True,
    unbiased: bool = False,
    eps: float = 1e-8,
    stats: Tensor | None = None,
) -> Tensor:
    """(x - mean) / std (+ mean if kept) over the true slots, 0 elsewhere."""
    if mask is None:
        mask = torch.ones_like(x, dtype=torch.bool)
    stats = masked_moments(x, mask) if stats is None else stats.to(x.device, moments_dtype(x))
    mean, scale = mean_and_scale(stats, unbiased, eps)
    y = (x.to(stats.dtype) - mean) * scale
    if not shift_mean:
        y = y + mean
    return torch.where(mask, y, y.new_zeros(())).to(output_dtype(x))


# ---- logprobs_from_logits -----------------------------------------------------------------------


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


# ---- ppo_loss -----------------------------------------------------------------------------------


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
        if ref_logprobs is not None:
            terms["kl"] = ppo_kl_term(
                current,
                kept(ref_logprobs).detach(),
                kl_estimator=kl_estimator,
                kl_gradient=kl_gradient,
                log_ratio_clamp=log_ratio_clamp,
            )
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
