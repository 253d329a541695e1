"""The generator's log-probs as the anchor of the PPO ratio, behind a measured gate.

Samples come from the generator's distribution mu, which is the actor's pi_old computed by other
kernels. With `old = pi_old` the ratio of the loss is pi / pi_old, and what lies between pi_old and
mu is ignored, or made good by a weight min(pi_old / mu, cap). With `old = mu` the ratio is pi / mu:
the whole importance weight of the samples. Another weight would count the mismatch twice, and is
exactly 1 because `old` and `rollout_logprobs` are the same numbers. What the cap of the weight did
is left to do: the ratio of tokens with a positive advantage is bounded by `clip_eps_high`, that of
the others by nothing, so it is bounded by the cap, as `dual_clip` bounds it.

Whether mu is close enough is measured in each step on some of the responses.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_fast.config import AlgorithmConfig
from rlhf_fast.seeds import derive_seed
from rlhf_fast.types import LogprobGap, ScoredRollout

# One response in so many is recomputed to measure the gap, and never fewer than so many.
CHECKED_ONE_IN = 16
CHECKED_AT_LEAST = 8


def checked_samples(samples: int, *seed: int) -> list[int]:
    """Which of S responses are recomputed, ascending: drawn from `seed` alone."""
    wanted = min(samples, max(CHECKED_AT_LEAST, -(-samples // CHECKED_ONE_IN)))
    generator = torch.Generator().manual_seed(derive_seed(*seed))
    return sorted(torch.randperm(samples, generator=generator)[:wanted].tolist())


def logprob_gap(trainer: Tensor, generator: Tensor, mask: Tensor) -> LogprobGap:
    """How far two sets of log-probs of the same tokens are apart.

    Args:
        trainer, generator: [S, R] float32.
        mask: [S, R] bool; what is outside is never read. Nothing inside: a gap of 0.
    """
    difference = (trainer - generator)[mask].double()
    if difference.numel() == 0:
        return LogprobGap(len(mask), 0.0, 0.0)
    k3 = torch.expm1(difference) - difference
    absolute, mean = torch.stack([difference.abs().mean(), k3.mean()]).tolist()
    return LogprobGap(len(mask), absolute, mean)


def gap_of(scored: ScoredRollout) -> LogprobGap:
    """Between trainer and generator, on all responses whose log-probs were recomputed."""
    if scored.anchor_gap is not None:
        return scored.anchor_gap
    rollout = scored.rollout
    return logprob_gap(scored.old_logprobs, rollout.rollout_logprobs, rollout.response_mask)


def ratio_cap(scored: ScoredRollout, algorithm: AlgorithmConfig) -> float:
    """Bound of the ratio to the generator where advantages are negative; 0: none."""
    return 0.0 if scored.anchor_gap is None else algorithm.rollout_correction
