"""Packing: every sequence once, the budget kept, the result a function of the lengths."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_fast.data.packing import pack_best_fit, pack_by_tokens
from rlhf_fast.errors import DataError

BUDGET = 64
lengths_of = st.lists(st.integers(0, BUDGET), max_size=60)


def loads(bins: list[list[int]], lengths: list[int]) -> list[int]:
    return [sum(lengths[i] for i in b) for b in bins]


@given(lengths=lengths_of)
@settings(deadline=None)
def test_best_fit_keeps_every_sequence_once_and_the_budget(lengths: list[int]) -> None:
    bins = pack_best_fit(lengths, BUDGET)
    assert sorted(i for b in bins for i in b) == list(range(len(lengths)))
    assert all(load <= BUDGET for load in loads(bins, lengths))
    assert all(b == sorted(b) for b in bins)
    assert bins == sorted(bins) == pack_best_fit(lengths, BUDGET)
    # No two bins could be one: a bin is opened only for what fits in none.
    emptiest = sorted(loads(bins, lengths))[:2]
    assert len(emptiest) < 2 or sum(emptiest) > BUDGET


def test_best_fit_fills_bins_that_greedy_leaves_open() -> None:
    lengths = [6, 6, 4, 4]
    assert pack_best_fit(lengths, 10) == [[0, 2], [1, 3]]
    assert pack_by_tokens(lengths, 10) == [[0], [1, 2], [3]]


def test_best_fit_takes_the_fullest_bin() -> None:
    # 7 and 5 open two bins; 3 belongs with the 7, which leaves the 5 room for another 5.
    assert pack_best_fit([7, 5, 5, 3], 10) == [[0, 3], [1, 2]]


@given(lengths=lengths_of, balanced=st.booleans(), min_bins=st.integers(1, 12))
@settings(deadline=None)
def test_microbatches_keep_every_sequence_once_and_the_budget(
    lengths: list[int], balanced: bool, min_bins: int
) -> None:
    bins = pack_by_tokens(lengths, BUDGET, balanced=balanced, min_bins=min_bins)
    assert sorted(i for b in bins for i in b) == list(range(len(lengths)))
    assert all(load <= BUDGET for load in loads(bins, lengths))
    assert len(bins) >= min_bins
    if len(lengths) >= min_bins:
        assert all(bins)
    if not balanced:
        assert [i for b in bins for i in b] == list(range(len(lengths)))


@given(lengths=lengths_of)
@settings(deadline=None)
def test_balanced_uses_no_more_bins_than_best_fit(lengths: list[int]) -> None:
    balanced = pack_by_tokens(lengths, BUDGET, balanced=True)
    assert len(balanced) <= max(len(pack_best_fit(lengths, BUDGET)), 1)


@given(lengths=st.lists(st.integers(1, 16), min_size=8, max_size=60))
@settings(deadline=None)
def test_balanced_spread_is_at_most_one_sequence(lengths: list[int]) -> None:
    got = loads(pack_by_tokens(lengths, sum(lengths), balanced=True, min_bins=4), lengths)
    assert len(got) == 4
    assert max(got) - min(got) <= max(lengths)


def test_order_preserving_splits_where_the_halves_are_most_even() -> None:
    assert pack_by_tokens([1, 1, 1, 9], 20, min_bins=2) == [[0, 1, 2], [3]]
    assert pack_by_tokens([5], 20, min_bins=3) == [[0], [], []]
    assert pack_by_tokens([], 20) == [[]]


def test_falls_back_to_best_fit_where_emptiest_first_overflows() -> None:
    # Emptiest-first puts 3, 2 / 3, 2, 2; best fit finds two full bins.
    assert loads(pack_by_tokens([3, 3, 2, 2, 2], 6, balanced=True), [3, 3, 2, 2, 2]) == [6, 6]


@pytest.mark.parametrize("pack", [pack_best_fit, pack_by_tokens])
@pytest.mark.parametrize("length", [11, -1])
def test_sequence_that_cannot_fit(pack: object, length: int) -> None:
    with pytest.raises(DataError) as caught:
        pack([3, length], 10)  # type: ignore[operator]
    assert caught.value.code == "RF2060"
    assert caught.value.where == "sequence 1"
    assert "microbatch_tokens" in caught.value.remedy
