"""The order of examples: deterministic, resumable, independent of world size."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_fast.data.loader import (
    EpochSampler,
    epoch_permutation,
    rank_slice,
    sequential_batches,
)
from rlhf_fast.errors import DataError


def take(sampler: EpochSampler, batches: int) -> list[list[int]]:
    return [sampler.next_batch() for _ in range(batches)]


@given(n=st.integers(1, 200), seed=st.integers(0, 2**63), epoch=st.integers(0, 1000))
@settings(deadline=None)
def test_permutation_is_one(n: int, seed: int, epoch: int) -> None:
    order = epoch_permutation(n, seed, epoch)
    assert sorted(order) == list(range(n))
    assert order == epoch_permutation(n, seed, epoch)


def test_permutation_is_the_same_on_every_machine() -> None:
    # Golden: a change here changes the data order of every run that resumes.
    assert epoch_permutation(10, 1, 0) == [1, 5, 8, 4, 7, 6, 2, 9, 3, 0]
    assert epoch_permutation(10, 1, 1) == [2, 4, 6, 8, 5, 1, 7, 0, 9, 3]


def test_permutations_differ_and_mix() -> None:
    orders = [epoch_permutation(1000, seed, epoch) for seed in range(3) for epoch in range(3)]
    assert len({tuple(o) for o in orders}) == 9
    for a in range(9):
        for b in range(a):
            same = sum(x == y for x, y in zip(orders[a], orders[b], strict=True))
            assert same < 12  # one fixed point is expected; 12 has a chance below 1e-8
    # Each value is in each half equally often over many epochs: 400 draws, 5 sigma.
    low = sum(epoch_permutation(20, 5, e).index(3) < 10 for e in range(400))
    assert abs(low - 200) < 50


def test_an_epoch_uses_every_example_at_most_once() -> None:
    sampler = EpochSampler(10, 3, seed=1)
    assert sampler.batches(1) == 3
    assert sampler.batches(4) == 12
    first = [i for b in take(sampler, 3) for i in b]
    assert len(set(first)) == 9
    assert sampler.epoch == 0
    sampler.next_batch()
    assert sampler.epoch == 1


def test_without_drop_last_every_batch_is_full_and_every_example_is_used() -> None:
    sampler = EpochSampler(10, 4, seed=1, drop_last=False)
    assert [sampler.batches(epochs) for epochs in (1, 2, 3, 4)] == [3, 5, 8, 10]
    flat = [i for b in take(sampler, 5) for i in b]
    assert flat == epoch_permutation(10, 1, 0) + epoch_permutation(10, 1, 1)


def test_dataset_smaller_than_a_batch() -> None:
    with pytest.raises(DataError) as caught:
        EpochSampler(3, 8, seed=1)
    assert caught.value.code == "RF2061"
    assert "3 examples are fewer than one batch of 8" in caught.value.what
    assert "batch size" in caught.value.remedy
    wrapped = EpochSampler(3, 8, seed=1, drop_last=False).next_batch()
    assert len(wrapped) == 8
    assert sorted(wrapped[:3]) == sorted(wrapped[3:6]) == [0, 1, 2]
    with pytest.raises(DataError):
        EpochSampler(0, 1, seed=1, drop_last=False)


@given(
    n=st.integers(1, 40),
    batch=st.integers(1, 12),
    seed=st.integers(0, 99),
    drop_last=st.booleans(),
    stop=st.integers(0, 30),
)
@settings(deadline=None)
def test_resume_continues_bit_exactly(
    n: int, batch: int, seed: int, drop_last: bool, stop: int
) -> None:
    if drop_last and n < batch:
        return
    sampler = EpochSampler(n, batch, seed, drop_last=drop_last)
    take(sampler, stop)
    state = json.loads(json.dumps(sampler.state_dict()))
    rest = take(sampler, 10)
    resumed = EpochSampler(n, batch, seed, drop_last=drop_last)
    resumed.load_state_dict(state)
    assert take(resumed, 10) == rest


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"n": 11}, "10 examples then, 11 now"),
        ({"seed": 2}, "seed 1 then, 2 now"),
        ({"fingerprint": "b"}, "content"),
    ],
)
def test_changed_data_is_refused_and_may_be_allowed(change: dict[str, Any], word: str) -> None:
    base = {"n": 10, "seed": 1, "fingerprint": "a"}
    old = EpochSampler(batch_size=3, **base)
    take(old, 5)
    new = EpochSampler(batch_size=3, **(base | change))
    with pytest.raises(DataError) as caught:
        new.load_state_dict(old.state_dict())
    assert caught.value.code == "RF2062"
    assert word in caught.value.what
    assert "allow_data_change" in caught.value.remedy
    new.load_state_dict(old.state_dict(), allow_data_change=True)
    assert (new.epoch, new.cursor) == (1, 0)
    assert new.next_batch() == epoch_permutation(new.n, new.seed, 1)[:3]


def test_another_batch_size_continues_at_the_same_example() -> None:
    old = EpochSampler(12, 3, seed=1)
    take(old, 2)
    new = EpochSampler(12, 2, seed=1)
    new.load_state_dict(old.state_dict())
    assert new.next_batch() == epoch_permutation(12, 1, 0)[6:8]


@pytest.mark.parametrize("key", ["epoch", "cursor", "seed", "n"])
@pytest.mark.parametrize("value", [None, -1, "3", 1.5, True])
def test_unusable_state(key: str, value: Any) -> None:
    sampler = EpochSampler(10, 3, seed=1)
    with pytest.raises(DataError) as caught:
        sampler.load_state_dict(sampler.state_dict() | {key: value})
    assert caught.value.code == "RF2063"
    assert key in caught.value.what
    assert "run.resume_step" in caught.value.remedy


def test_cursor_beyond_the_data() -> None:
    sampler = EpochSampler(10, 3, seed=1)
    with pytest.raises(DataError) as caught:
        sampler.load_state_dict(sampler.state_dict() | {"cursor": 11})
    assert caught.value.code == "RF2063"


def test_no_shuffle_and_iteration() -> None:
    batches = iter(EpochSampler(4, 2, seed=9, shuffle=False))
    assert [next(batches) for _ in range(3)] == [[0, 1], [2, 3], [0, 1]]


@given(size=st.integers(0, 40), world=st.integers(1, 9))
def test_rank_slices_make_up_the_batch(size: int, world: int) -> None:
    parts = [rank_slice(range(size), rank, world) for rank in range(world)]
    assert [i for p in parts for i in p] == list(range(size))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_sequential_batches() -> None:
    assert list(sequential_batches(5, 2)) == [[0, 1], [2, 3], [4]]
    assert list(sequential_batches(0, 2)) == []
