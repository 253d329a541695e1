"""The padded groups of the SDPA path cover every token once and cost at most double."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_fast.models.packed_attention import PackedLayout
from rlhf_fast.types import PackedSequences

CPU = torch.device("cpu")


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(any))
def test_groups_cover_every_token_once(lengths: list[int]) -> None:
    sequences = PackedSequences.from_lists([[0] * n for n in lengths])
    segment = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    layout = PackedLayout.build(sequences, CPU)
    padded, total = layout.padded, sum(lengths)
    slots = []
    for group in padded.groups:
        index = torch.arange(total) if group.gather is None else group.gather
        rows = index.view(group.count, group.width)
        # A row holds one segment from its start; padding repeats the segment's own last token.
        assert (segment[rows] == segment[rows[:, :1]]).all()
        assert (sequences.positions[rows[:, 0]] == 0).all()
        slots.append(index)
    flat = torch.cat(slots)
    unpacked = flat if padded.ungather is None else flat[padded.ungather]
    assert torch.equal(unpacked, torch.arange(total))
    assert len(flat) <= 2 * total
    assert layout.max_length == max(lengths)
