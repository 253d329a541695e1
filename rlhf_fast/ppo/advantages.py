"""Advantage estimators: GAE with a critic, RLOO and GRPO without."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_fast.config import AlgorithmConfig, KLConfig, RewardConfig
from rlhf_fast.ppo.rewards import sequence_sum
from rlhf_fast.types import Experience, ScoredRollout
from rlhf_fast_kernels import gae, rewards_and_gae, whiten

GROUP_STD_FLOOR = 1e-4


def estimate(
    scored: ScoredRollout,
    shaped_scores: Tensor,
    *,
    kl_coef: float,
    bootstrap: Tensor | None,
    algorithm: AlgorithmConfig,
    kl: KLConfig,
    reward: RewardConfig,
) -> Experience:
    """Rewards, KL, advantages and returns of a scored rollout, unwhitened.

    Args:
        scored: the rollout and the roles' outputs.
        shaped_scores: [S] or [S, R] from `shape_scores`.
        kl_coef: present coefficient of the KL penalty.
        bootstrap: [S] value of the state after the last token, 0 for ended rows; None: all 0.
        algorithm, kl, reward: the rules.
    """
    mask = scored.loss_mask
    exact = scored.exact_kl is not None
    out = rewards_and_gae(
        scored.old_logprobs,
        None if exact else scored.ref_logprobs,
        scored.values,
        shaped_scores,
        mask,
        kl_coef=kl_coef,
        kl=scored.exact_kl,
        kl_estimator="exact" if exact else _estimator(kl),
        kl_in_reward=kl.placement == "reward",
        gamma=algorithm.gamma,
        gae_lambda=algorithm.gae_lambda,
        bootstrap=bootstrap,
    )
    rewards = out.rewards
    if reward.whiten:
        # Keeping the mean keeps the sign of a reward; dividing by the std alone is OAI's rule.
        rewards = whiten(rewards, mask, shift_mean=False)
    if algorithm.estimator == "gae":
        advantages, returns = out.advantages, out.returns
        if reward.whiten:
            advantages, returns = gae(
                rewards,
                scored.values,
                mask,
                gamma=algorithm.gamma,
                gae_lambda=algorithm.gae_lambda,
                bootstrap=bootstrap,
            )
        if scored.exact_kl is not None:
            advantages = advantages - kl_coef * own_share(scored, scored.exact_kl)
        return Experience(scored, rewards, out.kl, advantages, returns)
    totals = sequence_sum(rewards, mask)
    group = scored.rollout.samples_per_prompt
    relative = rloo if algorithm.estimator == "rloo" else grpo
    # A row that abstained, or has no trainable token, takes no part in its group's baseline.
    per_sequence = relative(totals, mask.any(1), group)
    advantages = torch.where(mask, per_sequence[:, None], rewards.new_zeros(()))
    returns = torch.where(mask, totals[:, None], rewards.new_zeros(()))
    return Experience(scored, rewards, out.kl, advantages, returns)


def _estimator(kl: KLConfig) -> str:
    """The exact KL in the loss is made by the loss; the rollout keeps an estimate."""
    return "k1" if kl.estimator == "exact" else kl.estimator


def own_share(scored: ScoredRollout, exact_kl: Tensor) -> Tensor:
    """[S, R] log-ratio of each token less the exact KL of its state; 0 outside the loss mask.

    The exact KL of a state is the same whichever token follows: as a reward it says that the state
    is far from the reference, not that this token leads away from it. k1 says both. The difference
    is what a token's own choice adds. Its mean is 0, so in the advantages of other tokens it is
    noise alone, which the exact KL saves. Without it nothing would hold a response of one token.
    """
    log_ratio = scored.old_logprobs - scored.ref_logprobs
    return torch.where(scored.loss_mask, log_ratio - exact_kl, exact_kl.new_zeros(()))


def _grouped(totals: Tensor, valid: Tensor, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """(totals [B, G] with invalid rows 0, valid [B, G], count [B, 1]), all in fp64.

    There sums of fp32 rewards are exact: the fp32 mean of rewards of 1e4 is off by more than the
    floor under a group's std, and equal ones would differ.
    """
    ok = valid.view(-1, group)
    x = torch.where(ok, totals.double().view(-1, group), 0.0)
    return x, ok.double(), ok.sum(1, keepdim=True).double()


def rloo(totals: Tensor, valid: Tensor, group: int) -> Tensor:
    """[S] reward minus the mean of the others of its group (Ahmadian et al. 2024, eq. 8).

    Args:
        totals: [S] summed reward of each sequence, groups of `group` adjacent rows.
        valid: [S] bool; invalid rows get 0 and are in no baseline. A row alone gets 0.
        group: samples per prompt G.
    """
    # Exact: equal rewards give 0, and no rounding that Adam would scale up.
    x, ok, n = _grouped(totals, valid, group)
    over = (n * x - x.sum(1, keepdim=True)) / (n - 1).clamp(min=1)
    return torch.where((ok > 0) & (n > 1), over, x.new_zeros(())).flatten().to(totals.dtype)


def grpo(totals: Tensor, valid: Tensor, group: int) -> Tensor:
    """[S] (reward - group mean) / group std, unbiased std (Shao et al. 2024, section 4.1.2).

    A group whose std is below GROUP_STD_FLOOR says nothing about its members: advantage 0, not
    amplified rounding noise. Arguments as in `rloo`.
    """
    x, ok, n = _grouped(totals, valid, group)
    mean = x.sum(1, keepdim=True) / n.clamp(min=1)
    centred = (x - mean) * ok
    std = (centred.square().sum(1, keepdim=True) / (n - 1).clamp(min=1)).sqrt()
    scaled = centred / std.clamp(min=GROUP_STD_FLOOR)
    told = (n > 1) & (std > GROUP_STD_FLOOR)
    return torch.where(told, scaled, x.new_zeros(())).flatten().to(totals.dtype)


def whitened(advantages: Tensor, mask: Tensor, *, unbiased: bool) -> Tensor:
    """Advantages with mean 0 and std 1 over the true slots of `mask`, exactly 0 elsewhere."""
    return whiten(advantages, mask, shift_mean=True, unbiased=unbiased)


def importance_weights(scored: ScoredRollout, cap: float) -> Tensor:
    """[S, R] truncated importance weight trainer/generator, at most `cap`; 1 everywhere if 0."""
    ones = torch.ones_like(scored.old_logprobs)
    if cap <= 0:
        return ones
    gap = scored.old_logprobs - scored.rollout.rollout_logprobs
    # Clamp in log space: exp never overflows, and masked slots are selected away.
    weights = gap.clamp(-20.0, 20.0).exp().clamp(max=cap)
    return torch.where(scored.loss_mask, weights, ones)
