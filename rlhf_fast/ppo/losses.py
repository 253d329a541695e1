"""The losses of a microbatch: fused ops with the trainer's settings filled in.

They are sums over the microbatch's loss tokens divided by the GLOBAL loss-token count of the
optimizer step, so gradients do not change with the microbatch split.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from rlhf_fast.config import AlgorithmConfig, KLConfig
from rlhf_fast.types import HeadRows, LossOutput, Microbatch
from rlhf_fast_kernels import ppo_loss


def linear_policy_loss(
    microbatch: Microbatch,
    rows: HeadRows,
    reference: HeadRows | None,
    *,
    temperature: float,
    algorithm: AlgorithmConfig,
    kl: KLConfig,
    kl_coef: float,
) -> LossOutput:
    """`policy_loss` from hidden states: log-probs and gradients are made a chunk at a time.

    Args:
        microbatch: what the update reads, all [N].
        rows: the actor's hidden states of its N tokens, with graph, and head.
        reference: those of the reference, for the exact KL in the loss; None otherwise.
        temperature: as in sampling.
        algorithm, kl: the rules.
        kl_coef: present coefficient of the KL penalty.
    """
    rules = _policy_rules(microbatch, algorithm, kl, kl_coef)
    if reference is not None:
        rules |= {
            "kl_estimator": "exact",
            "ref_logprobs": None,
            "ref_hidden": reference.hidden,
            "ref_weight": reference.head.weight,
            "ref_bias": reference.head.bias,
        }
    output = rows.head.ops.linear_ppo_loss(
        rows.hidden,
        rows.head.weight,
        microbatch.targets,
        mask=microbatch.loss_mask,
        **rules,
        **rows.head.settings(temperature),
    )
    return LossOutput(output.loss, output.metrics, output.extrema)


def policy_loss(
    microbatch: Microbatch,
    logprobs: Tensor,
    entropy: Tensor | None,
    *,
    algorithm: AlgorithmConfig,
    kl: KLConfig,
    kl_coef: float,
) -> LossOutput:
    """Clipped policy loss, entropy bonus and, if placed in the loss, the KL term.

    For heads that only their own module can evaluate; `linear_policy_loss` serves all others.

    Args:
        microbatch: what the update reads, all [N].
        logprobs: [N] float32 with graph, of `microbatch.targets`.
        entropy: [N] float32, or None.
        algorithm, kl: the rules.
        kl_coef: present coefficient of the KL penalty.
    """
    output = ppo_loss(
        logprobs=logprobs,
        entropy=entropy,
        mask=microbatch.loss_mask,
        **_policy_rules(microbatch, algorithm, kl, kl_coef),
    )
    return LossOutput(output.loss, output.metrics, output.extrema)


def _policy_rules(
    microbatch: Microbatch, algorithm: AlgorithmConfig, kl: KLConfig, kl_coef: float
) -> dict[str, Any]:
    """What both forms of the policy loss are told, under the names they share."""
    return {
        "old_logprobs": microbatch.old_logprobs,
        "advantages": microbatch.advantages,
        "normalizer": microbatch.num_loss_tokens,
        "clip_eps_low": algorithm.clip_eps_low,
        "clip_eps_high": algorithm.clip_eps_high,
        "dual_clip": min(filter(None, (algorithm.dual_clip, microbatch.ratio_cap)), default=None),
        "entropy_coef": algorithm.entropy_coef,
        "ref_logprobs": microbatch.ref_logprobs,
        "kl_coef": kl_coef if kl.placement == "loss" else 0.0,
        # Beside the exact KL in the reward, the loss reports an estimate and uses none.
        "kl_estimator": "k1" if kl.estimator == "exact" else kl.estimator,
        "weights": microbatch.weights,
    }


def value_loss(microbatch: Microbatch, values: Tensor, *, algorithm: AlgorithmConfig) -> LossOutput:
    """Clipped squared error of the critic; `values` [N] float32 with graph."""
    output = ppo_loss(
        mask=microbatch.loss_mask,
        normalizer=microbatch.num_loss_tokens,
        values=values,
        old_values=microbatch.old_values,
        returns=microbatch.returns,
        value_clip_eps=algorithm.value_clip_eps or None,
    )
    return LossOutput(output.loss, output.metrics, output.extrema)
