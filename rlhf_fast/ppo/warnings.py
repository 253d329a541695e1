"""What a step warns of: anchors that were turned down, a ratio that does not begin at 1."""

from __future__ import annotations

from collections.abc import Mapping

from rlhf_fast.config import AlgorithmConfig
from rlhf_fast.types import ScoredRollout

# Rounding of a log-prob: forwards of other shapes sum in another order.
FIRST_RATIO_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.25}


def anchor_warnings(
    algorithm: AlgorithmConfig, metrics: Mapping[str, float], scored: ScoredRollout
) -> list[str]:
    """Whether the generator's log-probs were asked for as anchors and turned down."""
    if algorithm.old_logprobs == "recompute" or scored.anchor_gap is not None:
        return []
    return [
        "generator and trainer are further apart than algorithm.max_rollout_kl="
        f"{algorithm.max_rollout_kl:g} nats a token, so all old log-probs were recomputed "
        f"(KL over all of them: {metrics['rollout/logprob_k3']:.3g})"
    ]


def first_ratio_warnings(dtype: str, update: Mapping[str, float]) -> list[str]:
    """On the first minibatch nothing has moved yet: the ratio must be 1, to rounding."""
    gap = update["val/first_ratio_gap"]
    tolerance = FIRST_RATIO_TOLERANCE[dtype]
    if gap > tolerance:
        return [f"ratio differs from 1 by {gap:.3g} on the first minibatch (tolerance {tolerance})"]
    return []
