"""From raw scores to what the advantage estimators see."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rlhf_fast.config import RewardConfig


class RunningMoments:
    """Count, mean and sum of squared deviations of all scores seen, in float64.

    Batches are merged by Chan et al. 1979, so that the result does not suffer the cancellation of
    E[x^2] - E[x]^2.
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean = 0.0
        self.m2 = 0.0

    def update(self, values: Tensor) -> None:
        """Add a batch of values, any shape; an empty batch changes nothing."""
        n = values.numel()
        if n == 0:
            return
        x = values.detach().double()
        mean = float(x.mean())
        m2 = float((x - mean).square().sum())
        delta, total = mean - self.mean, self.count + n
        self.m2 += m2 + delta * delta * self.count * n / total
        self.mean += delta * n / total
        self.count = total

    @property
    def std(self) -> float:
        """Population standard deviation; 1 until two values differ, so that division is safe."""
        std = math.sqrt(self.m2 / self.count) if self.count else 0.0
        return std if std > 1e-8 else 1.0

    def state_dict(self) -> dict[str, float]:
        """What a checkpoint must hold."""
        return {"count": self.count, "mean": self.mean, "m2": self.m2}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Continue from a checkpoint."""
        self.count, self.mean, self.m2 = int(state["count"]), state["mean"], state["m2"]


def shape_scores(
    scores: Tensor,
    scored: Tensor,
    mask: Tensor,
    ended: Tensor,
    moments: RunningMoments,
    config: RewardConfig,
) -> Tensor:
    """Normalise, clip, then apply the missing-EOS rule; the KL term comes later and is not clipped.

    The statistics take in this batch first, so that the first batch is normalised by itself. The
    missing-EOS value is in the units after normalisation, and is not lost to the clip.

    Statistics are over scores of whole sequences, the sum of a row's per-token rewards, and the
    mean is subtracted at the last token alone: from every token it would pay or fine each token of
    a response for being there. So a score given as a number and the same score given at the last
    token are worth the same.

    Args:
        scores: [S], or [S, R] for per-token rewards, float32.
        scored: [S] bool, false where the reward abstained.
        mask: [S, R] bool, true for response tokens.
        ended: [S] bool, from the generator.
        moments: running statistics, updated in place when `config.normalize`.
        config: the rules.

    Returns:
        Tensor of the shape of `scores`, 0 where not scored.
    """
    per_token = scores.dim() == 2
    valid = mask & scored[:, None] if per_token else scored
    if config.normalize:
        whole = sequence_sum(scores, valid) if per_token else scores
        moments.update(whole[scored & mask.any(1) if per_token else scored])
        mean = moments.mean * last_true(mask) if per_token else moments.mean
        scores = (scores - mean) / moments.std
    if config.clip > 0:
        scores = scores.clamp(-config.clip, config.clip)
    truncated = scored & ~ended
    if config.missing_eos != "none":
        scores = _missing_eos(scores, mask, truncated, config)
    return torch.where(valid, scores, torch.zeros_like(scores))


def _missing_eos(scores: Tensor, mask: Tensor, truncated: Tensor, config: RewardConfig) -> Tensor:
    """Subtract the penalty at the last token, or replace the whole score by minus the value."""
    value = config.missing_eos_value
    if scores.dim() == 1:
        changed = scores - value if config.missing_eos == "penalty" else scores.new_tensor(-value)
        return torch.where(truncated, changed, scores)
    at_last = last_true(mask) & truncated[:, None]
    if config.missing_eos == "penalty":
        return torch.where(at_last, scores - value, scores)
    scores = torch.where(truncated[:, None], torch.zeros_like(scores), scores)
    return torch.where(at_last, scores.new_tensor(-value), scores)


def last_true(mask: Tensor) -> Tensor:
    """[S, R] bool: true at the last true column of each row of `mask` [S, R], if there is one."""
    later = mask.flip(1).cumsum(1).flip(1)
    return mask & (later == 1)


def sequence_sum(values: Tensor, mask: Tensor) -> Tensor:
    """[S]: the sum of `values` [S, R] where `mask` is true; masked slots are never read."""
    return torch.where(mask, values, torch.zeros_like(values)).sum(1)
