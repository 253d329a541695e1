"""KL, reward placement and GAE in plain PyTorch: a loop over time."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_fast_kernels.reference.common import kl_estimate, output_dtype
from rlhf_fast_kernels.reference.whiten import row_moments


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


def rewards_and_gae(
    old_logprobs: Tensor,
    ref_logprobs: Tensor | None,
    kl: Tensor | None,
    values: Tensor,
    scores: Tensor,
    mask: Tensor | None,
    kl_coef: float,
    kl_estimator: str,
    kl_in_reward: bool,
    log_ratio_clamp: float | None,
    reward_clip: float | None,
    gamma: float,
    gae_lambda: float,
    bootstrap: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Rewards, KL, advantages, returns and the moments of each row's advantages.

    See `rewards_and_gae.rewards_and_gae` for shapes.
    """
    if mask is None:
        mask = torch.ones_like(values, dtype=torch.bool)
    dtype = output_dtype(old_logprobs, ref_logprobs, kl, values, scores, bootstrap)
    zero = torch.zeros((), dtype=dtype, device=values.device)
    kl = zero.expand(values.shape) if kl is None else kl.to(dtype)
    if ref_logprobs is not None:
        log_ratio = old_logprobs.to(dtype) - ref_logprobs.to(dtype)
        if log_ratio_clamp is not None:
            log_ratio = log_ratio.clamp(-log_ratio_clamp, log_ratio_clamp)
        kl = kl_estimate(log_ratio, kl_estimator)
    kl = torch.where(mask, kl, zero)
    rewards = -kl_coef * kl if kl_in_reward else torch.zeros_like(kl)
    scores = scores.to(dtype)
    if reward_clip is not None:
        scores = scores.clamp(-reward_clip, reward_clip)
    if scores.shape == values.shape:
        rewards = rewards + torch.where(mask, scores, zero)
    else:
        at, of = last_true(mask, cu_seqlens)
        rewards = rewards.flatten().index_add(0, at, scores[of]).view(values.shape)
    floats = (rewards, values.to(dtype), mask, gamma, gae_lambda)
    advantages, returns = gae(*floats, bootstrap, cu_seqlens)
    moments = _advantage_moments(advantages, mask, cu_seqlens)
    return rewards, kl, advantages, returns, moments


def _advantage_moments(advantages: Tensor, mask: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """[S, 3] or [K, 3]: `row_moments`, of the segments where the rows are packed."""
    if cu_seqlens is None:
        return row_moments(advantages, mask)
    if advantages.numel() == 0:
        advantages = advantages.new_zeros(cu_seqlens.shape[0] - 1, 0)
        return row_moments(advantages, advantages.bool())
    index, inside = _padded_index(cu_seqlens)
    return row_moments(advantages[index], mask[index] & inside)


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
