"""The two losses of a microbatch: fused ops with the trainer's settings filled in.

Both are sums over the microbatch's loss tokens divided by the GLOBAL loss-token count of the
optimizer step, so gradients do not change with the microbatch split.
"""

from __future__ import annotations

from torch import Tensor

from rlhf_fast.config import AlgorithmConfig, KLConfig
from rlhf_fast.types import LossOutput, Microbatch
from rlhf_fast_kernels import ppo_loss


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

    Args:
        microbatch: what the update reads, all [N].
        logprobs: [N] float32 with graph, of `microbatch.targets`.
        entropy: [N] float32, or None.
        algorithm, kl: the rules.
        kl_coef: present coefficient of the KL penalty.
    """
    output = ppo_loss(
        logprobs=logprobs,
        old_logprobs=microbatch.old_logprobs,
        advantages=microbatch.advantages,
        mask=microbatch.loss_mask,
        normalizer=microbatch.num_loss_tokens,
        clip_eps_low=algorithm.clip_eps_low,
        clip_eps_high=algorithm.clip_eps_high,
        dual_clip=algorithm.dual_clip or None,
        entropy=entropy,
        entropy_coef=algorithm.entropy_coef,
        ref_logprobs=microbatch.ref_logprobs,
        kl_coef=kl_coef if kl.placement == "loss" else 0.0,
        kl_estimator=kl.estimator,
        weights=microbatch.weights,
    )
    return LossOutput(output.loss, output.metrics, output.extrema)


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
