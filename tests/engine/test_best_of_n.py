"""Best-of-n estimators against enumeration of all subsets."""

from __future__ import annotations

import math
from itertools import combinations

import pytest
import torch

from rlhf_fast.engine.best_of_n import best_of_n_curve, best_of_n_kl, selection_weights
from rlhf_fast.errors import GenerationError


def _by_enumeration(scores: list[float], gold: list[float], n: int) -> tuple[float, float]:
    proxies, golds = [], []
    for subset in combinations(range(len(scores)), n):
        best = max(scores[i] for i in subset)
        tied = [gold[i] for i in subset if scores[i] == best]
        proxies.append(best)
        golds.append(sum(tied) / len(tied))
    return sum(proxies) / len(proxies), sum(golds) / len(golds)


@pytest.mark.parametrize("ties", [False, True])
def test_curve_equals_the_mean_over_all_subsets(ties: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    scores = torch.randn(3, 9, generator=generator)
    if ties:
        scores = scores.round()
    gold = torch.randn(3, 9, generator=generator)
    ns = [1, 2, 3, 5, 8, 9]
    curve = best_of_n_curve(scores, gold, ns)
    for k, n in enumerate(ns):
        rows = [
            _by_enumeration(s, g, n) for s, g in zip(scores.tolist(), gold.tolist(), strict=True)
        ]
        assert curve.proxy[k].item() == pytest.approx(sum(r[0] for r in rows) / 3, abs=1e-12)
        golds = torch.tensor([r[1] for r in rows], dtype=torch.float64)
        assert curve.gold[k].item() == pytest.approx(golds.mean().item(), abs=1e-12)
        assert curve.gold_stderr[k].item() == pytest.approx(
            golds.std().item() / math.sqrt(3), abs=1e-12
        )


def test_ends_of_the_curve_are_the_mean_and_the_best() -> None:
    scores = torch.randn(4, 300, generator=torch.Generator().manual_seed(0))
    curve = best_of_n_curve(scores, -scores, [1, 300])
    assert curve.proxy[0].item() == pytest.approx(scores.double().mean().item())
    assert curve.proxy[1].item() == pytest.approx(scores.double().amax(1).mean().item())
    torch.testing.assert_close(curve.gold, -curve.proxy)
    assert curve.kl[0] == 0


@pytest.mark.parametrize(("total", "n"), [(1, 1), (7, 3), (64, 64), (2000, 700)])
def test_weights_are_a_distribution_that_prefers_the_best(total: int, n: int) -> None:
    weights = selection_weights(total, n)
    assert weights.sum().item() == pytest.approx(1.0, abs=1e-12)
    assert weights[-1].item() == pytest.approx(n / total)
    assert bool((weights.diff() >= 0).all())


def test_the_estimator_is_unbiased() -> None:
    # Uniform scores: the best of n averages n / (n + 1).
    scores = torch.rand(4000, 16, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    curve = best_of_n_curve(scores, scores, [2, 4, 8])
    for n, gold, error in zip(curve.ns, curve.gold, curve.gold_stderr, strict=True):
        assert abs(gold - n / (n + 1)) < 4 * error


def test_kl_equals_the_divergence_of_the_order_statistic() -> None:
    # The best of n has density n F^(n-1) relative to the policy; integrate t log t by quadrature.
    for n in (2, 5, 64):
        f = (torch.arange(2_000_000, dtype=torch.float64) + 0.5) / 2_000_000
        ratio = n * f ** (n - 1)
        integral = torch.xlogy(ratio, ratio).mean().item()
        assert best_of_n_kl(n) == pytest.approx(integral, abs=1e-5)


def test_bad_input_names_what_is_wrong() -> None:
    with pytest.raises(GenerationError, match="between 1 and the 4 samples"):
        best_of_n_curve(torch.zeros(2, 4), torch.zeros(2, 4), [1, 5])
    with pytest.raises(GenerationError, match="NaN or Inf"):
        best_of_n_curve(torch.full((2, 4), math.nan), torch.zeros(2, 4), [1])
    with pytest.raises(GenerationError, match=r"both \[P, N\]"):
        best_of_n_curve(torch.zeros(2, 4), torch.zeros(2, 3), [1])
    with pytest.raises(GenerationError, match="best-of-0"):
        best_of_n_kl(0)
