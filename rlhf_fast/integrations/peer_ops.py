"""Our ops in the shapes that other trainers share: what more than one adapter needs."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf_fast_kernels import gae, logprobs_from_logits, masked_moments, ppo_loss, whiten


def label_logprobs(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """log softmax(logits / temperature)[label], fp32, of labels' shape `[...]`; logits `[..., V]`.

    A label of -100 gives exact 0 and no gradient.
    """
    return logprobs_from_logits(logits, labels, temperature=temperature, with_entropy=False)[0]


def row_entropy(logits: Tensor) -> Tensor:
    """Entropy of softmax(logits) in nats, fp32 `[...]`; a logit of -inf is probability 0."""
    labels = torch.zeros(logits.shape[:-1], dtype=torch.long, device=logits.device)
    entropy = logprobs_from_logits(logits, labels)[1]
    assert entropy is not None
    return entropy


def vocabulary_group(group: Any) -> Any:
    """The process group over which a vocabulary is split, or None if one rank has all of it."""
    return None if group is None or group.size() == 1 else group


# ---- KL estimates -------------------------------------------------------------------------------


# Beyond this k3 lies past 10, at which every peer bounds it; the exponential stays finite.
_K3_LOG_RATIO_END = 20.0


class _KLEstimate(torch.autograd.Function):
    """Keeps one slope a token for backward, where the formula would keep an intermediate a step."""

    @staticmethod
    def forward(
        ctx: Any,
        logprobs: Tensor,
        ref_logprobs: Tensor,
        estimator: str,
        bound: float,
        k2_weight: Tensor | float | None,
    ) -> Tensor:
        wide = torch.promote_types(logprobs.dtype, ref_logprobs.dtype)
        wide = torch.promote_types(wide, torch.float32)
        d = logprobs.to(wide) - ref_logprobs.to(wide)
        value, slope = _estimate_and_slope(d, estimator)
        if k2_weight is not None:
            slope = d * k2_weight
        else:
            slope = torch.where(value.abs() <= bound, slope, 0)
        ctx.save_for_backward(slope)
        ctx.dtypes = logprobs.dtype, ref_logprobs.dtype
        return value.clamp(-bound, bound)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        (slope,) = ctx.saved_tensors
        gradient = upstream * slope
        mine, theirs = ctx.dtypes
        needs = ctx.needs_input_grad
        return (
            gradient.to(mine) if needs[0] else None,
            (-gradient).to(theirs) if needs[1] else None,
            *(None,) * 3,
        )


def _estimate_and_slope(d: Tensor, estimator: str) -> tuple[Tensor, Tensor]:
    """The estimate and its derivative by d = logprob - ref_logprob."""
    if estimator == "k1":
        return d, torch.ones_like(d)
    if estimator == "abs":
        return d.abs(), d.sign()
    if estimator == "k2":
        return d.square() / 2, d
    near = d.clamp(-_K3_LOG_RATIO_END, _K3_LOG_RATIO_END)
    decay = torch.expm1(-near)
    return decay + near, -decay


def kl_estimate(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    estimator: str,
    bound: float,
    k2_weight: Tensor | float | None = None,
) -> Tensor:
    """Per-token estimate of KL(policy || reference), with a gradient to both.

    In plain PyTorch: no kernel returns an estimate per token together with its gradient.

    Args:
        logprobs, ref_logprobs: any one shape.
        estimator: k1 | abs | k2 | k3 of d = logprob - ref_logprob (Schulman 2020).
        bound: of the estimate's size, at most 10 for k3; no gradient passes beyond it.
        k2_weight: the gradient is this times d instead of the estimate's own.

    Returns:
        fp32 (fp64 if an input is), shape of the inputs.
    """
    value: Tensor = _KLEstimate.apply(logprobs, ref_logprobs, estimator, bound, k2_weight)
    return value


# ---- advantages and statistics ------------------------------------------------------------------


def gae_over_all_columns(
    rewards: Tensor, values: Tensor, mask: Tensor | None, gamma: float, gae_lambda: float
) -> tuple[Tensor, Tensor]:
    """Advantages and returns `[B, A]` where a masked step is a step of value 0 and reward 0.

    This is the rule of trainers that multiply by the mask and then walk through every column: a
    hole in the mask discounts, and columns before the first action hold advantages too. What the
    masked slots hold changes nothing, NaN included.
    """
    if mask is not None:
        kept = mask.bool()
        rewards, values = torch.where(kept, rewards, 0), torch.where(kept, values, 0)
    everywhere = torch.ones_like(values, dtype=torch.bool)
    advantages, returns = gae(rewards, values, everywhere, gamma=gamma, gae_lambda=gae_lambda)
    return advantages.to(values.dtype), returns.to(values.dtype)


def differentiable(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def moments_fit(values: Tensor, mask: Tensor) -> bool:
    """Whether the statistics kernel computes what a peer's masked mean and variance do.

    It has no gradient, takes one or two dims, and counts a slot once: a mask of floating-point
    weights is another thing.
    """
    return (
        values.dim() in (1, 2)
        and values.shape == mask.shape
        and values.is_floating_point()
        and not mask.is_floating_point()
        and not differentiable(values)
    )


def masked_total(values: Tensor, mask: Tensor, axis: int | tuple[int, ...] | None = None) -> Tensor:
    """Sum of values x mask over `axis`, where what a slot of mask 0 holds changes nothing."""
    kept = torch.where(mask.bool(), values, 0)
    if mask.is_floating_point():
        kept = kept * mask
    return kept.sum() if axis is None else kept.sum(axis)


def scale_to_unit(values: Tensor, mask: Tensor, shift_mean: bool) -> Tensor:
    """Every slot of `values`, masked ones too, less the mean of the true ones over their spread.

    Sample variance + 1e-8 under the root. See `moments_fit` for what this takes.
    """
    stats = masked_moments(values, mask.bool())
    scaled = whiten(values, None, shift_mean=shift_mean, unbiased=True, eps=1e-8, stats=stats)
    return scaled.to(values.dtype)


# ---- losses -------------------------------------------------------------------------------------


class Aggregation(NamedTuple):
    """How a peer makes one number of a loss per token: sum of weight x loss / normalizer."""

    normalizer: float | Tensor
    weights: Tensor | None = None


def sequence_mean_weights(mask: Tensor) -> Tensor:
    """`[B, R]` 1 / (true slots of the row + 1e-8): a mean per sequence."""
    return (1 / (mask.sum(-1, keepdim=True) + 1e-8)).expand(mask.shape)


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    how: Aggregation,
    *,
    clip_eps_low: float,
    clip_eps_high: float,
    dual_clip: float | None,
    log_ratio_clamp: float = 20.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The clipped policy loss `[]` and sums over the true slots of the bool mask `[B, R]`."""
    output = ppo_loss(
        mask=mask,
        normalizer=how.normalizer,
        logprobs=logprobs,
        old_logprobs=old_logprobs,
        advantages=advantages,
        weights=how.weights,
        clip_eps_low=clip_eps_low,
        clip_eps_high=clip_eps_high,
        dual_clip=dual_clip,
        log_ratio_clamp=log_ratio_clamp,
    )
    return output.loss, output.metrics


def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    normalizer: float | Tensor,
    clip_eps: float | None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Half the clipped squared error `[]` and sums over the true slots of the bool mask."""
    output = ppo_loss(
        mask=mask,
        normalizer=normalizer,
        values=values,
        old_values=old_values,
        returns=returns,
        value_clip_eps=clip_eps,
    )
    return output.loss, output.metrics
