"""The ranking loss against its definition in fp64, its symmetries and its edges."""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlhf_fast.models.ranking_loss import (
    PairCounts,
    count_pairs,
    pair_accuracy,
    ranking_loss,
    wilson_interval,
)


def definition(groups: list[list[float]], margins: list[float]) -> float:
    """Mean over prompts of the mean over pairs of log(1 + exp(-(r_i - r_j - (j - i) margin)))."""
    total = 0.0
    for scores, margin in zip(groups, margins, strict=True):
        pairs = list(itertools.combinations(enumerate(scores), 2))
        if pairs:
            total += sum(
                math.log1p(math.exp(-(better - worse - (j - i) * margin)))
                for (i, better), (j, worse) in pairs
            ) / len(pairs)
    return total / len(groups)


def flat(groups: list[list[float]], dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    scores = torch.tensor([s for g in groups for s in g], dtype=dtype)
    return scores, torch.tensor([len(g) for g in groups])


ragged = st.lists(
    st.lists(st.floats(-8, 8, width=32), min_size=1, max_size=6), min_size=1, max_size=5
)


@given(ragged, st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None)
def test_equals_definition_in_fp64(groups: list[list[float]], rng: random.Random) -> None:
    margins = [rng.uniform(-1, 1) for _ in groups]
    scores, counts = flat(groups)
    got = ranking_loss(scores, counts, torch.tensor(margins, dtype=torch.float64)).loss
    assert float(got) == pytest.approx(definition(groups, margins), abs=1e-12)


@given(ragged)
@settings(max_examples=40, deadline=None)
def test_fp32_error_is_no_more_than_rounding(groups: list[list[float]]) -> None:
    scores, counts = flat(groups, torch.float32)
    got = float(ranking_loss(scores, counts).loss)
    want = definition(groups, [0.0] * len(groups))
    assert got == pytest.approx(want, rel=2e-6, abs=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("with_margin", [False, True])
def test_two_completions_are_the_pairwise_loss_to_the_bit(
    dtype: torch.dtype, with_margin: bool
) -> None:
    torch.manual_seed(0)
    chosen = (5 * torch.randn(64, dtype=dtype)).requires_grad_()
    rejected = (5 * torch.randn(64, dtype=dtype)).requires_grad_()
    margin = torch.rand(64, dtype=dtype) if with_margin else None
    shift = margin if margin is not None else 0.0
    plain = -torch.nn.functional.logsigmoid(chosen - rejected - shift)
    (plain.sum() / 64).backward()
    want_chosen, want_rejected = chosen.grad, rejected.grad

    scores = torch.stack((chosen, rejected), 1).detach().reshape(-1).requires_grad_()
    k_wise = ranking_loss(scores, torch.full((64,), 2), margin)
    k_wise.loss.backward()
    assert torch.equal(k_wise.loss, plain.sum() / 64)
    assert scores.grad is not None
    assert want_chosen is not None
    assert want_rejected is not None
    assert torch.equal(scores.grad[0::2], want_chosen)
    assert torch.equal(scores.grad[1::2], want_rejected)


def test_gradcheck_with_ragged_groups_and_margins() -> None:
    torch.manual_seed(1)
    counts = torch.tensor([4, 2, 1, 3])
    scores = torch.randn(10, dtype=torch.float64, requires_grad=True)
    margin = torch.randn(4, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda s: ranking_loss(s, counts, margin).loss, (scores,))


def test_adding_a_constant_to_a_prompt_changes_nothing_and_gradients_sum_to_zero() -> None:
    torch.manual_seed(2)
    counts = torch.tensor([5, 3])
    scores = torch.randn(8, dtype=torch.float64, requires_grad=True)
    loss = ranking_loss(scores, counts).loss
    loss.backward()
    shift = torch.tensor([7.0] * 5 + [-3.0] * 3, dtype=torch.float64)
    torch.testing.assert_close(ranking_loss(scores + shift, counts).loss, loss)
    assert scores.grad is not None
    assert scores.grad[:5].sum().abs() < 1e-12
    assert scores.grad[5:].sum().abs() < 1e-12


def test_order_of_prompts_does_not_matter() -> None:
    torch.manual_seed(3)
    groups = [torch.randn(k, dtype=torch.float64) for k in (4, 2, 6, 3)]
    orders = list(itertools.permutations(range(4)))
    losses = [
        float(
            ranking_loss(
                torch.cat([groups[i] for i in order]),
                torch.tensor([groups[i].numel() for i in order]),
            ).loss
        )
        for order in orders
    ]
    assert max(losses) - min(losses) < 1e-14


def test_swapping_two_ranks_raises_the_loss_of_an_ordered_list() -> None:
    ordered = torch.tensor([2.0, 1.0, 0.0], dtype=torch.float64)
    counts = torch.tensor([3])
    best = ranking_loss(ordered, counts).loss
    for order in list(itertools.permutations(range(3)))[1:]:
        assert ranking_loss(ordered[list(order)], counts).loss > best


def test_microbatches_of_prompts_add_up_to_the_step() -> None:
    torch.manual_seed(4)
    groups = [torch.randn(k, dtype=torch.float64) for k in (4, 2, 6, 3)]
    whole = ranking_loss(torch.cat(groups), torch.tensor([4, 2, 6, 3])).loss
    first = ranking_loss(torch.cat(groups[:1]), torch.tensor([4]), num_prompts=4).loss
    rest = ranking_loss(torch.cat(groups[1:]), torch.tensor([2, 6, 3]), num_prompts=4).loss
    torch.testing.assert_close(first + rest, whole, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("gap", [1e4, -1e4])
def test_extreme_gaps_stay_finite(gap: float) -> None:
    scores = torch.tensor([gap, 0.0], requires_grad=True)
    loss = ranking_loss(scores, torch.tensor([2])).loss
    loss.backward()
    assert float(loss.detach()) == pytest.approx(max(0.0, -gap))
    assert scores.grad is not None
    assert torch.isfinite(scores.grad).all()


def test_prompts_without_a_pair_contribute_exact_zero() -> None:
    scores = torch.randn(3, requires_grad=True)
    out = ranking_loss(scores, torch.tensor([1, 1, 1]))
    out.loss.backward()
    assert float(out.loss.detach()) == 0.0
    assert scores.grad is not None
    assert torch.equal(scores.grad, torch.zeros(3))
    empty = ranking_loss(torch.zeros(0), torch.zeros(0, dtype=torch.int64))
    assert float(empty.loss) == 0.0


def test_half_precision_scores_are_computed_in_fp32() -> None:
    scores = torch.tensor([3.0, 1.0, -2.0], dtype=torch.bfloat16)
    out = ranking_loss(scores, torch.tensor([3]))
    assert out.loss.dtype == torch.float32
    assert torch.equal(out.loss, ranking_loss(scores.float(), torch.tensor([3])).loss)


def test_counts_must_match_scores() -> None:
    with pytest.raises(ValueError, match="add up to 4"):
        ranking_loss(torch.zeros(3), torch.tensor([2, 2]))


def test_metrics_are_sums_over_prompts() -> None:
    out = ranking_loss(torch.tensor([2.0, 0.0, 1.0, 5.0, 5.0]), torch.tensor([3, 2]))
    # Prompt 1: pairs (2,0) right, (2,1) right, (0,1) wrong. Prompt 2: a tie.
    assert float(out.metrics["correct"]) == pytest.approx(2 / 3 + 0.5)
    assert float(out.metrics["margin"]) == pytest.approx((2 + 1 - 1) / 3)
    assert float(out.metrics["chosen"]) == pytest.approx((2 + 2 + 0) / 3 + 5)
    assert float(out.metrics["rejected"]) == pytest.approx((0 + 1 + 1) / 3 + 5)
    assert float(out.metrics["prompts"]) == 2


def test_pair_counts_per_prompt() -> None:
    counts = count_pairs(torch.tensor([2.0, 0.0, 1.0, 5.0, 5.0, 9.0]), torch.tensor([3, 2, 1]))
    assert counts == PairCounts([2.0, 0.5, 0.0], [3, 1, 0])


def test_wilson_interval_against_published_values() -> None:
    # Newcombe 1998, table I, method 3 (score interval): 81/263, 15/148, 0/20, 1/29.
    for successes, n, low, high in [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ]:
        got = wilson_interval(successes / n, n)
        assert got.low == pytest.approx(low, abs=5e-5)
        assert got.high == pytest.approx(high, abs=5e-5)


def test_interval_is_wilson_for_single_pairs_and_wider_for_correlated_ones() -> None:
    single = PairCounts([1.0] * 60 + [0.0] * 40, [1] * 100)
    assert pair_accuracy(single) == wilson_interval(0.6, 100)
    # Six pairs a prompt that are all right or all wrong carry the information of one.
    clustered = PairCounts([6.0] * 60 + [0.0] * 40, [6] * 100)
    assert pair_accuracy(clustered) == pytest.approx(wilson_interval(0.6, 100), abs=1e-3)
    rng = random.Random(0)
    independent = PairCounts(
        [float(sum(rng.random() < 0.6 for _ in range(6))) for _ in range(400)], [6] * 400
    )
    got = pair_accuracy(independent)
    naive = wilson_interval(got.value, 2400)
    assert (got.high - got.low) == pytest.approx(naive.high - naive.low, rel=0.15)


def test_interval_covers_the_truth() -> None:
    rng = random.Random(1)
    covered = 0
    for _ in range(1000):
        hits = [float(rng.random() < 0.7) for _ in range(80)]
        got = pair_accuracy(PairCounts(hits, [1] * 80))
        covered += got.low <= 0.7 <= got.high
    assert 930 <= covered <= 970


def test_no_pairs_say_nothing() -> None:
    assert pair_accuracy(PairCounts([0.0], [0])) == (0.5, 0.0, 1.0)
