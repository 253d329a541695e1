"""The loss of a reward model, and how well it ranks.

Bradley and Terry (1952): the probability that completion w beats completion l of one prompt is
sigmoid(r_w - r_l), so the loss of a pair is -log sigmoid(r_w - r_l - margin). InstructGPT (Ouyang
et al. 2022, equation 1) ranks K completions of a prompt: all C(K, 2) pairs enter, weighted by
1 / C(K, 2), so that every prompt weighs the same, and all completions of a prompt share one forward
pass, because pairs of one prompt in different steps over-fit. K = 2 is the pairwise loss itself.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from rlhf_fast.types import LossOutput


class Interval(NamedTuple):
    """A fraction and the ends of its confidence interval."""

    value: float
    low: float
    high: float


class PairCounts(NamedTuple):
    """Of each prompt: pairs ordered rightly (a tie counts one half) and pairs in all."""

    correct: list[float]
    pairs: list[int]


def ranking_loss(
    scores: Tensor, counts: Tensor, margin: Tensor | None = None, *, num_prompts: int | None = None
) -> LossOutput:
    """InstructGPT's loss over all pairs of each prompt's ranked completions.

    Args:
        scores: [C] scores, prompt by prompt, best completion first within a prompt.
        counts: [P] int64 completions of each prompt, sum C. A prompt with fewer than two has no
            pair and contributes exact 0.
        margin: [P] least difference wanted between neighbours in rank: (j - i) * margin is
            subtracted inside the sigmoid of the pair of ranks i and j; None is 0.
        num_prompts: divisor of the sum over prompts: prompts of the whole optimizer step, so that
            microbatches of one step add up to its mean; None is P.

    Returns:
        loss [] float32 (float64 for float64 scores) and sums over prompts of per-prompt means over
        pairs: `loss`, `margin` (r_w - r_l), `correct` (a tie counts one half), `chosen`,
        `rejected` (score of the better and the worse completion), and `prompts` with a pair.

    Raises:
        ValueError: counts do not add up to C.
    """
    if int(counts.sum()) != scores.numel():
        raise ValueError(f"counts add up to {int(counts.sum())}, scores have {scores.numel()}")
    wide = scores if scores.dtype == torch.float64 else scores.float()
    padded, valid = _pad(wide, counts.to(scores.device))
    is_pair = _pairs(valid)
    difference = padded[:, :, None] - padded[:, None, :]
    per_pair = -F.logsigmoid(difference - _wanted(margin, padded))
    weight = is_pair.sum((1, 2)).clamp(min=1).to(padded.dtype)

    def mean_over_pairs(values: Tensor) -> Tensor:
        return torch.where(is_pair, values, 0.0).sum((1, 2)) / weight

    loss = mean_over_pairs(per_pair).sum()
    divisor = num_prompts if num_prompts is not None else max(1, counts.numel())
    with torch.no_grad():
        right = (difference > 0).to(padded.dtype) + 0.5 * (difference == 0).to(padded.dtype)
        metrics = {
            "loss": loss.detach(),
            "margin": mean_over_pairs(difference).sum(),
            "correct": mean_over_pairs(right).sum(),
            "chosen": mean_over_pairs(padded[:, :, None].expand_as(difference)).sum(),
            "rejected": mean_over_pairs(padded[:, None, :].expand_as(difference)).sum(),
            "prompts": is_pair.any(2).any(1).sum().to(padded.dtype),
        }
    return LossOutput(loss / divisor, metrics)


def count_pairs(scores: Tensor, counts: Tensor) -> PairCounts:
    """Rightly ordered pairs and all pairs of each prompt; arguments as in `ranking_loss`."""
    padded, valid = _pad(scores.detach().double(), counts.to(scores.device))
    is_pair = _pairs(valid)
    difference = padded[:, :, None] - padded[:, None, :]
    right = (difference > 0).double() + 0.5 * (difference == 0).double()
    correct = torch.where(is_pair, right, 0.0).sum((1, 2))
    return PairCounts(correct.tolist(), is_pair.sum((1, 2)).tolist())


def pair_accuracy(counts: PairCounts, z: float = 1.959963984540054) -> Interval:
    """Fraction of pairs ordered rightly, with Wilson's interval (Wilson 1927).

    Pairs of one prompt share completions and are not independent draws: the interval uses the
    effective number of pairs, the variance of a plain fraction over the variance of the ratio
    estimate with prompts as clusters (Kish 1965), held between the number of prompts and that of
    pairs. With one pair a prompt this is Wilson's interval as it stands.

    Args:
        counts: from `count_pairs`; prompts without a pair are left out.
        z: normal quantile, 1.96 for 95 %.

    Returns:
        (accuracy, low, high); without any pair, (0.5, 0, 1).
    """
    rows = [(c, m) for c, m in zip(counts.correct, counts.pairs, strict=True) if m > 0]
    pairs = sum(m for _, m in rows)
    if pairs == 0:
        return Interval(0.5, 0.0, 1.0)
    p = sum(c for c, _ in rows) / pairs
    clusters = len(rows)
    effective = float(clusters)
    if clusters > 1:
        scatter = sum((c - p * m) ** 2 for c, m in rows)
        variance = clusters / (clusters - 1) * scatter / pairs**2
        if variance > 0:
            effective = min(max(p * (1 - p) / variance, clusters), pairs)
    return wilson_interval(p, effective, z)


def wilson_interval(fraction: float, trials: float, z: float = 1.959963984540054) -> Interval:
    """Wilson's score interval of a fraction of `trials` (a real number above 0 is allowed)."""
    spread = z * z / trials
    centre = (fraction + spread / 2) / (1 + spread)
    half = z * math.sqrt(fraction * (1 - fraction) / trials + spread / (4 * trials)) / (1 + spread)
    # The ends touch 0 and 1 exactly at fractions 0 and 1; rounding must not push them beyond.
    return Interval(fraction, max(0.0, centre - half), min(1.0, centre + half))


def _pad(scores: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Scores [P, K] with 0 beyond a prompt's own completions, and the mask of real ones."""
    widest = int(counts.max()) if counts.numel() else 0
    valid = torch.arange(widest, device=scores.device)[None, :] < counts[:, None]
    padded = scores.new_zeros(valid.shape).masked_scatter(valid, scores)
    return padded, valid


def _wanted(margin: Tensor | None, padded: Tensor) -> Tensor | float:
    """[P, K, K] difference asked for between ranks i and j, or 0."""
    if margin is None:
        return 0.0
    rank = torch.arange(padded.shape[1], device=padded.device, dtype=padded.dtype)
    return margin.to(padded)[:, None, None] * (rank[None, :] - rank[:, None])


def _pairs(valid: Tensor) -> Tensor:
    """[P, K, K] true at (i, j), i ranked before j, both real."""
    k = valid.shape[1]
    upper = torch.ones(k, k, dtype=torch.bool, device=valid.device).triu(1)
    return valid[:, :, None] & valid[:, None, :] & upper
