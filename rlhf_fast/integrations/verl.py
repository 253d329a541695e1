"""verl's log-probs, entropy, statistics, advantages, KL penalty and losses on our kernels.

    VERL_USE_EXTERNAL_MODULES=rlhf_fast.integrations.verl      in the environment of every process

verl then imports this module in each of its processes before its workers import the helpers.
Imported in any other way it replaces nothing until `install()` or `patched()`.

`response_mask` is `[B, R]`, 1 for tokens of the model, 0 for padding and replies of tools; holes
are legal. Shapes, masks and aggregation are verl's own. Log-probs are fp32 whatever the dtype of
the logits, as on verl's path through flash-attn; scalar losses are fp32. In masked slots advantages
and returns are exactly 0, where verl leaves what its scan passed by. The value loss as a mean per
sequence runs verl's own code.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from rlhf_fast.integrations.patching import Entry, Patch, Replacement, Report, constant
from rlhf_fast.integrations.peer_ops import (
    kl_estimate,
    masked_total,
    moments_fit,
    row_entropy,
    scale_to_unit,
)
from rlhf_fast.integrations.verl_losses import (
    compute_policy_loss_clip_cov,
    compute_policy_loss_gspo,
    compute_policy_loss_vanilla,
    value_loss_or,
)
from rlhf_fast_kernels import (
    gae,
    linear_logprobs,
    masked_moments,
    whiten,
)
from rlhf_fast_kernels import (
    logprobs_from_logits as label_logprobs,
)
from rlhf_fast_kernels.logit_arguments import ends_in_leaf

_ESTIMATORS = {"kl": "k1", "mse": "k2", "low_var_kl": "k3"}
_K3_BOUND = 10.0


# ---- verl.utils.torch_functional ----------------------------------------------------------------


def may_overwrite(logits: Tensor) -> bool:
    """Whether a gradient may be written over the logits: no leaf would end as its own gradient."""
    return logits.requires_grad and not ends_in_leaf(logits) and logits.is_contiguous()


def logprobs_from_logits(logits: Tensor, labels: Tensor, inplace_backward: bool = True) -> Tensor:
    """Log-probability of each label, fp32 `[...]`; logits `[..., V]`.

    `inplace_backward` writes the gradient over the logits on an accelerator, as verl's path through
    flash-attn does; on a CPU, where verl never does, it has no effect.
    """
    inplace = inplace_backward and logits.device.type == "cuda" and may_overwrite(logits)
    return label_logprobs(logits, labels, with_entropy=False, inplace_backward=inplace)[0]


def entropy_from_logits(logits: Tensor) -> Tensor:
    """Entropy of each row in nats, `[...]` in logits' dtype; a logit of -inf adds nothing."""
    return row_entropy(logits).to(logits.dtype)


def entropy_from_logits_with_chunking(logits: Tensor, chunk_size: int = 2048) -> Tensor:
    """Entropy of each row in nats, fp32 `[N]`. Needs no chunks: nothing of logits' size is made."""
    return row_entropy(logits)


def masked_sum(values: Tensor, mask: Tensor, axis: int | tuple[int, ...] | None = None) -> Tensor:
    """Sum of values x mask over `axis`; what a slot of mask 0 holds changes nothing."""
    if axis is None and moments_fit(values, mask):
        count, mean, _ = masked_moments(values, mask.bool()).unbind()
        return (count * mean).to(values.dtype)
    return masked_total(values, mask, axis)


def masked_mean(values: Tensor, mask: Tensor, axis: int | tuple[int, ...] | None = None) -> Tensor:
    """Mean over the slots of mask 1, `sum / (count + 1e-8)`: 0 where there is none."""
    count = mask.sum() if axis is None else mask.sum(axis)
    return masked_sum(values, mask, axis) / (count + 1e-8)


def masked_var(values: Tensor, mask: Tensor, unbiased: bool = True) -> Tensor:
    """Variance over the slots of mask 1, with Bessel's correction if unbiased.

    Raises:
        ValueError: unbiased over fewer than two slots.
    """
    if unbiased:
        _require_two(mask)
    if moments_fit(values, mask):
        count, _, m2 = masked_moments(values, mask.bool()).unbind()
        return (m2 / (count - int(unbiased)).clamp(min=1)).to(values.dtype)
    centred = values - masked_mean(values, mask)
    variance = masked_mean(centred.square(), mask)
    total = mask.sum()
    return variance * (total / (total - 1)) if unbiased else variance


def masked_whiten(values: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    """Every slot less the mean, over the spread, of those of mask 1.

    Raises:
        ValueError: fewer than two slots of mask 1.
    """
    _require_two(mask)
    if moments_fit(values, mask):
        return scale_to_unit(values, mask, shift_mean)
    mean, variance = masked_mean(values, mask), masked_var(values, mask)
    scaled = (values - mean) * torch.rsqrt(variance + 1e-8)
    return scaled if shift_mean else scaled + mean


def _require_two(mask: Tensor) -> None:
    if mask.sum() <= 1:
        raise ValueError("a variance needs a mask with more than one true slot")


# ---- verl.trainer.ppo.core_algos; its losses are in verl_losses ---------------------------------


def compute_gae_advantage_return(
    token_level_rewards: Tensor,
    values: Tensor,
    response_mask: Tensor,
    gamma: float | Tensor,
    lam: float | Tensor,
) -> tuple[Tensor, Tensor]:
    """Whitened advantages and raw returns `[B, R]`; holes carry the next value and advantage on.

    Whitening is over the batch, sample variance. With one token in the batch its advantage is 0,
    with none all are; verl raises.
    """
    mask = response_mask.bool()
    advantages, returns = gae(
        token_level_rewards, values, mask, gamma=float(gamma), gae_lambda=float(lam)
    )
    dtype = torch.promote_types(token_level_rewards.dtype, values.dtype)
    return whiten(advantages, mask, unbiased=True).to(dtype), returns.to(dtype)


def kl_penalty(logprob: Tensor, ref_logprob: Tensor, kl_penalty: str) -> Tensor:
    """Per-token KL estimate: kl | k1, abs, mse | k2, low_var_kl | k3; with a `+`, k2's gradient."""
    name = kl_penalty.removesuffix("+")
    estimator = _ESTIMATORS.get(name, name)
    if estimator not in ("k1", "abs", "k2", "k3"):
        raise NotImplementedError(f"kl_penalty {kl_penalty!r}")
    weight = 1.0 if kl_penalty.endswith("+") else None
    bound = _K3_BOUND if estimator == "k3" else torch.inf
    value = kl_estimate(logprob, ref_logprob, estimator, bound, weight)
    return value.to(torch.promote_types(logprob.dtype, ref_logprob.dtype))


# ---- the fused head -----------------------------------------------------------------------------


def _fused_linear_forward(
    self: Any,
    hidden_states: Tensor,
    vocab_weights: Tensor,
    input_ids: Tensor,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Log-probs (fp32) and entropy (hidden's dtype), `[N]` or `[B, T]`; logits never exist."""
    labels = input_ids.to(torch.int64)
    logprobs, entropy = linear_logprobs(
        hidden_states, vocab_weights, labels, temperature=temperature, with_entropy=True
    )
    assert entropy is not None
    return logprobs, entropy.to(hidden_states.dtype)


# ---- the generator ------------------------------------------------------------------------------


def _load_replica() -> Any:
    """What `RolloutReplicaRegistry` calls for its entry."""
    from rlhf_fast.integrations.verl_replica import replica_class

    return replica_class()


_TORCH, _CORE = "verl.utils.torch_functional", "verl.trainer.ppo.core_algos"
_PATCH = Patch(
    "verl",
    {
        "0.9.1": (
            Replacement(_TORCH, "logprobs_from_logits", constant(logprobs_from_logits)),
            Replacement(_TORCH, "entropy_from_logits", constant(entropy_from_logits)),
            Replacement(
                _TORCH,
                "entropy_from_logits_with_chunking",
                constant(entropy_from_logits_with_chunking),
            ),
            Replacement(_TORCH, "masked_sum", constant(masked_sum)),
            Replacement(_TORCH, "masked_mean", constant(masked_mean)),
            Replacement(_TORCH, "masked_var", constant(masked_var)),
            Replacement(_TORCH, "masked_whiten", constant(masked_whiten)),
            Replacement(
                _CORE, "compute_gae_advantage_return", constant(compute_gae_advantage_return)
            ),
            Replacement(_CORE, "kl_penalty", constant(kl_penalty)),
            Replacement(
                _CORE, "compute_policy_loss_vanilla", constant(compute_policy_loss_vanilla)
            ),
            Replacement(_CORE, "compute_policy_loss_gspo", constant(compute_policy_loss_gspo)),
            Replacement(
                _CORE, "compute_policy_loss_clip_cov", constant(compute_policy_loss_clip_cov)
            ),
            Replacement(_CORE, "compute_value_loss", value_loss_or),
            Replacement(
                "verl.utils.experimental.torch_functional",
                "FusedLinearForPPO.forward",
                constant(_fused_linear_forward),
            ),
            Entry(_CORE, "POLICY_LOSS_REGISTRY", "rlhf_fast", compute_policy_loss_vanilla),
            Entry(
                "verl.workers.rollout.base",
                "_ROLLOUT_REGISTRY",
                ("rlhf_fast", "async"),
                "rlhf_fast.integrations.verl_replica.ServerRollout",
            ),
            Entry(
                "verl.workers.rollout.replica",
                "RolloutReplicaRegistry._registry",
                "rlhf_fast",
                _load_replica,
            ),
        )
    },
)


def install() -> Report:
    """Replace in this process for good. Raises EnvironmentFault, see `Patch.install`."""
    return _PATCH.install()


def patched() -> AbstractContextManager[Report]:
    """Replace inside a `with` block."""
    return _PATCH.scoped()


def uninstall() -> None:
    """Give verl its own functions back."""
    _PATCH.remove()


if __name__ in os.environ.get("VERL_USE_EXTERNAL_MODULES", "").split(","):
    install()
