"""Batches: no label crosses a segment, every token once, masks from lengths."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_fast.data.collate import (
    collate_preferences,
    collate_prompts,
    collate_sft,
    pack_preferences,
    pack_sft,
    pad_sequences,
)
from rlhf_fast.data.examples import PreferenceExample, PromptExample, SFTExample
from rlhf_fast.errors import DataError
from rlhf_fast.types import IGNORE_INDEX

masks = st.lists(st.lists(st.booleans(), min_size=1, max_size=9), max_size=12)


def sft(mask: list[bool], start: int) -> SFTExample:
    ids = torch.arange(start, start + len(mask), dtype=torch.int64)
    return SFTExample(ids, torch.tensor([False, *mask[1:]]), "row")


def preference(prompt: int, completions: list[int], margin: float = 0.0) -> PreferenceExample:
    return PreferenceExample(
        torch.arange(prompt),
        tuple(torch.arange(100 * k, 100 * k + n) for k, n in enumerate(completions, 1)),
        margin,
        "row",
    )


@given(masks=masks)
@settings(deadline=None)
def test_packed_labels_stay_inside_their_segment(masks: list[list[bool]]) -> None:
    examples = [sft(m, 100 * i) for i, m in enumerate(masks)]
    batch = collate_sft(examples)
    bounds = batch.sequences.cu_seqlens.tolist()
    assert len(bounds) == len(masks) + 1
    for example, lo, hi in zip(examples, bounds, bounds[1:], strict=False):
        assert torch.equal(batch.sequences.ids[lo:hi], example.ids)
        assert batch.sequences.positions[lo:hi].tolist() == list(range(hi - lo))
        assert batch.targets[hi - 1] == IGNORE_INDEX
        learnt = [int(t) for t in batch.targets[lo:hi] if t != IGNORE_INDEX]
        assert learnt == example.ids[example.loss_mask].tolist()
    assert batch.num_loss_tokens == sum(int(e.loss_mask.sum()) for e in examples)
    assert torch.equal(batch.loss_mask, batch.targets != IGNORE_INDEX)


@given(masks=masks)
@settings(deadline=None)
def test_packing_keeps_every_token_once_within_the_budget(masks: list[list[bool]]) -> None:
    examples = [sft(m, 100 * i) for i, m in enumerate(masks)]
    batches = pack_sft(examples, 12)
    got = sorted(i for b in batches for i in b.sequences.ids.tolist())
    assert got == sorted(i for e in examples for i in e.ids.tolist())
    assert all(b.sequences.ids.numel() <= 12 for b in batches)
    assert sum(b.num_loss_tokens for b in batches) == sum(int(e.loss_mask.sum()) for e in examples)


def test_all_masked_batch_is_legal() -> None:
    batch = collate_sft([sft([False] * 3, 0), sft([True], 7)])
    assert batch.num_loss_tokens == 0
    moved = batch.to(torch.device("cpu"))
    assert torch.equal(moved.targets, batch.targets)


def test_preference_groups() -> None:
    examples = [preference(2, [1, 3], 0.5), preference(1, [2, 2, 1])]
    batch = collate_preferences(examples).to(torch.device("cpu"))
    assert batch.sequences.lengths.tolist() == [3, 5, 3, 3, 2]
    assert batch.group_sizes.tolist() == [2, 3]
    assert batch.margins.tolist() == [0.5, 0.0]
    last = batch.sequences.ids[batch.sequences.cu_seqlens[1:].long() - 1]
    assert last.tolist() == [100, 202, 101, 201, 300]


def test_preferences_of_a_prompt_stay_together() -> None:
    examples = [preference(2, [2, 2]), preference(2, [2, 2]), preference(2, [1, 1])]
    batches = pack_preferences(examples, 14)
    assert [len(b) for b in batches] == [1, 2]
    with pytest.raises(DataError) as caught:
        pack_preferences(examples, 7)
    assert caught.value.code == "RF2060"


def test_prompts() -> None:
    a = PromptExample(torch.tensor([5, 6]), "a", {"x": 1}, 11, "row")
    b = PromptExample(torch.tensor([7]), "b", {}, 12, "row")
    batch = collate_prompts([a, b])
    assert batch.sequences.ids.tolist() == [5, 6, 7]
    assert batch.sequences.cu_seqlens.tolist() == [0, 2, 3]
    assert (batch.uid, batch.texts, batch.rows) == ((11, 12), ("a", "b"), ({"x": 1}, {}))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_masks_come_from_lengths(side: str) -> None:
    eos = 9
    sequences = [torch.tensor([1, eos]), torch.tensor([eos, eos, 3])]
    ids, mask = pad_sequences(sequences, eos, side=side)
    assert mask.sum(1).tolist() == [2, 3]
    assert [row[m].tolist() for row, m in zip(ids, mask, strict=True)] == [[1, eos], [eos, eos, 3]]
    assert ids[0].tolist() == ([eos, 1, eos] if side == "left" else [1, eos, eos])


def test_padding_of_nothing_and_a_wrong_side() -> None:
    ids, mask = pad_sequences([], 0)
    assert ids.shape == mask.shape == (0, 0)
    with pytest.raises(ValueError, match="side"):
        pad_sequences([], 0, side="both")
