"""verl's policy losses and value loss on our loss kernel, by the names of its registry.

    vanilla     clipped, dual clip                    `compute_policy_loss_vanilla`
    gspo        one ratio a sequence                  `compute_policy_loss_gspo`
    clip_cov    vanilla less some tokens of high covariance   `compute_policy_loss_clip_cov`
    rlhf_fast   vanilla, and without the dual clip where `clip_ratio_c` is null

All take `[B, R]` tensors and verl's `ActorConfig`, give the loss `[]` in fp32 and verl's metrics.
The name `rlhf_fast` exists only where the adapter is on: a worker without it says so at once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rlhf_fast.integrations.peer_ops import (
    Aggregation,
    masked_total,
    policy_loss,
    sequence_mean_weights,
    value_loss,
)

_LOG_RATIO_BOUND = 20.0
# clip_cov bounds nothing: this is the most that the kernel takes, e^88 is the end of fp32.
_WIDEST_LOG_RATIO = 80.0
_GSPO_LOG_RATIO_END = 10.0


def compute_policy_loss_vanilla(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """The clipped policy loss with dual clip, `[]` fp32, and verl's metrics."""
    mask = response_mask.bool()
    loss, sums = policy_loss(
        log_prob,
        old_log_prob,
        advantages,
        mask,
        _weighted(mask, loss_agg_mode, config, rollout_is_weights),
        dual_clip=config.get("clip_ratio_c", 3.0),
        **_clip_range(config),
    )
    drift = _drift(old_log_prob, log_prob, mask, _LOG_RATIO_BOUND)
    return loss, _means(
        sums["tokens"], sums["clip_low"] + sums["clip_high"], drift, sums["clip_dual"]
    )


def compute_policy_loss_gspo(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "seq-mean-token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """The clipped loss where each token has the ratio of its sequence, and verl's metrics.

    The log ratio of a sequence is the mean over its tokens; a token's gradient is that of its own
    log-prob. No dual clip.
    """
    mask = response_mask.bool()
    with torch.no_grad():
        log_ratio = log_prob.float() - old_log_prob.float()
        tokens = mask.sum(-1, keepdim=True).clamp(min=1)
        sequence = masked_total(log_ratio, mask, -1).unsqueeze(-1) / tokens
    # x - x is 0 with a gradient of 1; a slot outside the mask may hold NaN and is not read.
    token = log_prob.float()
    shared = (token - token.detach() + sequence).clamp(max=_GSPO_LOG_RATIO_END)
    loss, sums = policy_loss(
        shared,
        torch.zeros_like(shared),
        advantages,
        mask,
        _weighted(mask, loss_agg_mode, config, rollout_is_weights),
        dual_clip=None,
        **_clip_range(config),
    )
    drift = _drift(old_log_prob, log_prob, mask)
    clipped = sums["clip_low"] + sums["clip_high"]
    return loss, _means(sums["tokens"], clipped, drift, torch.zeros_like(drift))


def compute_policy_loss_clip_cov(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """The clipped loss less a few tokens whose covariance lies in a band, and verl's metrics.

    Which ones is drawn from PyTorch's generator of the CPU, as verl draws it. The log ratio is
    bounded by +-80, where verl's exponential overflows at 88.

    Raises:
        ValueError: `policy_loss.clip_cov_ratio` is not above 0.
    """
    mask = response_mask.bool()
    dropped = _clip_cov_drops(old_log_prob, log_prob, advantages, mask, config)
    how = _weighted(mask, loss_agg_mode, config, rollout_is_weights)
    kept = torch.where(dropped, 0.0, 1.0 if how.weights is None else how.weights)
    loss, sums = policy_loss(
        log_prob,
        old_log_prob,
        advantages,
        mask,
        Aggregation(how.normalizer, kept),
        dual_clip=None,
        log_ratio_clamp=_WIDEST_LOG_RATIO,
        **_clip_range(config),
    )
    return loss, _means(sums["tokens"], dropped.sum(), _drift(old_log_prob, log_prob, mask))


@torch.no_grad()
def _clip_cov_drops(
    old_log_prob: Tensor, log_prob: Tensor, advantages: Tensor, mask: Tensor, config: Any
) -> Tensor:
    """bool `[B, R]`: drawn among the unclipped tokens whose covariance lies in the band."""
    options = config.policy_loss
    share = _given(options.clip_cov_ratio, 0.0002)
    if share <= 0:
        raise ValueError(f"policy_loss.clip_cov_ratio must be above 0, got {share}")
    clip = _clip_range(config)
    ratio = (log_prob - old_log_prob).exp()
    bounded = ratio.clamp(1 - clip["clip_eps_low"], 1 + clip["clip_eps_high"])
    clipped = -advantages * bounded > -advantages * ratio
    tokens = mask.sum()

    def centred(x: Tensor) -> Tensor:
        return x - masked_total(x, mask) / (tokens + 1e-8)

    covariance = centred(advantages) * centred(log_prob)
    low, high = _given(options.clip_cov_lb, 1.0), _given(options.clip_cov_ub, 5.0)
    candidates = (mask & ~clipped & (covariance > low) & (covariance < high)).nonzero()
    order = torch.randperm(len(candidates)) if len(candidates) else torch.empty(0, dtype=torch.long)
    rows, columns = candidates[order[: max(int(share * tokens.item()), 1)].to(mask.device)].unbind(
        1
    )
    dropped = torch.zeros_like(mask)
    dropped[rows, columns] = True
    return dropped


# ---- what the policy losses share ---------------------------------------------------------------


def _given(value: float | None, otherwise: float) -> float:
    return otherwise if value is None else value


def _clip_range(config: Any) -> dict[str, float]:
    return {
        "clip_eps_low": _given(config.clip_ratio_low, config.clip_ratio),
        "clip_eps_high": _given(config.clip_ratio_high, config.clip_ratio),
    }


def _weighted(
    mask: Tensor, loss_agg_mode: str, config: Any, rollout_is_weights: Tensor | None
) -> Aggregation:
    """How verl makes one number of the loss, the weights of its rollout correction among it."""
    how = _aggregation(mask, loss_agg_mode, **config.global_batch_info)
    if rollout_is_weights is None:
        return how
    given = rollout_is_weights.expand(mask.shape)
    return Aggregation(how.normalizer, given if how.weights is None else how.weights * given)


@torch.no_grad()
def _drift(
    old_log_prob: Tensor, log_prob: Tensor, mask: Tensor, bound: float = torch.inf
) -> Tensor:
    """Sum of old - new log-probs over the true slots, each within +-bound."""
    drift = (old_log_prob.float() - log_prob.float()).clamp(-bound, bound)
    return torch.where(mask, drift, 0).sum()


_METRICS = ("actor/pg_clipfrac", "actor/ppo_kl", "actor/pg_clipfrac_lower")


def _means(tokens: Tensor, *sums: Tensor) -> dict[str, float]:
    """Sums over the true slots as verl's metrics, in the order of `_METRICS`."""
    # One transfer for all: each item() of its own would wait for the device.
    stacked = torch.stack([x.detach().to(torch.float32) for x in sums])
    return dict(zip(_METRICS, (stacked / tokens.clamp(min=1)).tolist(), strict=False))


def value_loss_or(own: Callable[..., Any]) -> Callable[..., Any]:
    """verl's value loss on our kernel; `own` is verl's, for means per sequence and a range of 0."""

    def compute_value_loss(
        vpreds: Tensor,
        returns: Tensor,
        values: Tensor,
        response_mask: Tensor,
        cliprange_value: float,
        loss_agg_mode: str = "token-mean",
        dp_size: int = 1,
        batch_num_tokens: int | None = None,
        global_batch_size: int | None = None,
        loss_scale_factor: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Half the clipped squared error and the clipped fraction, both `[]` fp32."""
        totals = (dp_size, batch_num_tokens, global_batch_size, loss_scale_factor)
        mask = response_mask.bool()
        how = _aggregation(mask, loss_agg_mode, *totals)
        if how.weights is not None or cliprange_value == 0:
            inputs = (vpreds, returns, values, response_mask, cliprange_value, loss_agg_mode)
            return own(*inputs, *totals)
        loss, sums = value_loss(vpreds, values, returns, mask, how.normalizer, cliprange_value)
        return loss, sums["value_clip"] / sums["value_tokens"].clamp(min=1)

    return compute_value_loss


def _aggregation(
    mask: Tensor,
    mode: str,
    dp_size: int = 1,
    batch_num_tokens: float | None = None,
    global_batch_size: float | None = None,
    loss_scale_factor: float | None = None,
) -> Aggregation:
    """verl's `loss_agg_mode` as one normalizer and, for means per sequence, weights."""
    if mode == "token-sum":
        return Aggregation(1 / dp_size)
    if mode == "token-mean":
        return Aggregation(_total("batch_num_tokens", batch_num_tokens, dp_size, mask.sum()))
    sequences = mask.any(-1).sum()
    if mode in ("seq-mean-token-sum", "seq-mean-token-sum-norm"):
        total = _total("global_batch_size", global_batch_size, dp_size, sequences)
        if mode == "seq-mean-token-sum":
            return Aggregation(total)
        return Aggregation(total * (loss_scale_factor or mask.shape[-1]))
    if mode == "seq-mean-token-mean":
        total = _total("global_batch_size", global_batch_size, dp_size, sequences)
        return Aggregation(total, sequence_mean_weights(mask))
    raise ValueError(f"Invalid loss_agg_mode: {mode}")


def _total(name: str, given: float | None, dp_size: int, here: Tensor) -> float | Tensor:
    if given is not None:
        return given / dp_size
    if dp_size > 1:
        raise ValueError(f"{name} is required when dp_size > 1")
    return here
