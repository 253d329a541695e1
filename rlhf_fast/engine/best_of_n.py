"""Best-of-n curves from samples that were drawn and scored once.

Best-of-n draws n responses and keeps the one the proxy reward likes best. It is the yardstick of
PPO: what it gains at a given KL is what optimisation should gain at least (Stiennon et al. 2020,
Gao et al. 2023, "Scaling laws for reward model overoptimization").
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf_fast.errors import GenerationError


@dataclass(frozen=True)
class BestOfNCurve:
    """Expected scores of best-of-n, averaged over prompts.

    Args:
        ns: the K values of n.
        kl: [K] float64 nats, `best_of_n_kl(n)`.
        proxy: [K] float64 expected proxy score of the response kept.
        gold: [K] float64 expected gold score of the response kept.
        gold_stderr: [K] float64 standard error of `gold` over prompts; NaN for one prompt.
    """

    ns: tuple[int, ...]
    kl: Tensor
    proxy: Tensor
    gold: Tensor
    gold_stderr: Tensor


def best_of_n_kl(n: int) -> float:
    """KL(best-of-n || policy) in nats: log n - (n-1)/n.

    Exact if no two responses tie in proxy score, an upper bound otherwise (Beirami et al. 2024,
    "Theoretical guarantees on the best-of-n alignment policy").
    """
    if n < 1:
        raise GenerationError("RF4020", f"best-of-{n} does not exist", expected="n of 1 or more")
    return math.log(n) - (n - 1) / n


def selection_weights(total: int, n: int) -> Tensor:
    """[total] float64: probability that the sample of rank i, worst first, is the best of n.

    Of all n-subsets of `total` samples, those whose best is rank i (1-based) take their other n-1
    members from the i-1 worse ones: C(i-1, n-1) / C(total, n). Integer arithmetic up to the
    division, so no cancellation at any size.
    """
    subsets = math.comb(total, n)
    return torch.tensor([math.comb(i, n - 1) / subsets for i in range(total)], dtype=torch.float64)


def _average_over_ties(scores: Tensor, values: Tensor) -> Tensor:
    """Replace values [N] by their mean over samples of equal score; both sorted by score."""
    _, group, counts = torch.unique_consecutive(scores, return_inverse=True, return_counts=True)
    sums = torch.zeros(counts.numel(), dtype=values.dtype).index_add_(0, group, values)
    return (sums / counts)[group]


def _check(scores: Tensor, gold: Tensor, ns: Sequence[int]) -> None:
    faults = []
    if scores.dim() != 2 or scores.shape != gold.shape or scores.numel() == 0:
        faults.append(f"scores {list(scores.shape)} and gold {list(gold.shape)}: both [P, N]")
    elif bad := [n for n in ns if not 1 <= n <= scores.shape[1]]:
        faults.append(f"ns={bad}: between 1 and the {scores.shape[1]} samples of a prompt")
    if not (scores.isfinite().all() and gold.isfinite().all()):
        faults.append("NaN or Inf among the scores: drop those prompts first")
    if faults:
        raise GenerationError(
            "RF4021",
            "a best-of-n curve cannot be computed",
            expected="; ".join(faults),
            remedy="draw more samples per prompt, or ask for smaller n",
        )


def best_of_n_curve(scores: Tensor, gold: Tensor, ns: Sequence[int]) -> BestOfNCurve:
    """Unbiased expected proxy and gold score of best-of-n from N samples a prompt.

    Averages over all C(N, n) subsets in closed form instead of taking the first n samples: no bias,
    and the least variance the samples allow (a U-statistic). Proxy ties are broken uniformly at
    random, in expectation.

    Args:
        scores: [P, N] proxy scores that select.
        gold: [P, N] scores that judge what was selected.
        ns: values of n, each between 1 and N.

    Raises:
        GenerationError: RF4020, RF4021.
    """
    _check(scores, gold, ns)
    ranked, order = scores.detach().cpu().double().sort(dim=-1)
    judged = gold.detach().cpu().double().gather(-1, order)
    judged = torch.stack([_average_over_ties(s, v) for s, v in zip(ranked, judged, strict=True)])
    weights = torch.stack([selection_weights(scores.shape[1], n) for n in ns])
    proxy, best_gold = ranked @ weights.T, judged @ weights.T
    prompts = scores.shape[0]
    spread = best_gold.std(dim=0) if prompts > 1 else best_gold.new_full((len(ns),), math.nan)
    return BestOfNCurve(
        ns=tuple(ns),
        kl=torch.tensor([best_of_n_kl(n) for n in ns], dtype=torch.float64),
        proxy=proxy.mean(dim=0),
        gold=best_gold.mean(dim=0),
        gold_stderr=spread / math.sqrt(prompts),
    )
