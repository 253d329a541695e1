"""The bookkeeping of a decoding step in plain PyTorch."""

from __future__ import annotations

from torch import Tensor

from rlhf_fast_kernels.decode_fields import (
    BROKEN,
    CONTEXT,
    LIMIT,
    LIVE,
    SAMPLE,
    STEP,
    TOKEN,
    Drawn,
    Places,
    Record,
)


def place_tokens(state: Tensor, page_table: Tensor, page_size: int, places: Places) -> None:
    """See `rlhf_fast_kernels.decode_state.place_tokens`."""
    live, context = state[LIVE], state[CONTEXT]
    context += live
    positions = places.positions.copy_(context - 1)
    page = page_table.gather(1, (positions // page_size)[:, None])[:, 0]
    slots = page * page_size + positions % page_size
    places.slots.copy_((slots + 1) * live - 1)
    places.contexts.copy_(context)
    places.ids.copy_(state[TOKEN].clamp(min=0))


def record_tokens(state: Tensor, stops: Tensor, drawn: Drawn, record: Record) -> None:
    """See `rlhf_fast_kernels.decode_state.record_tokens`."""
    live = state[LIVE] > 0
    index = state[SAMPLE]
    # A row that has ended writes its sample's last column again, with what is there: no branch on
    # data, and no two rows have the same sample.
    column = state[STEP] - (~live).to(state.dtype)
    for buffer, values in zip(record[:3], drawn, strict=True):
        buffer[index, column] = values.where(live, buffer[index, column])
    state[TOKEN] = drawn.tokens
    broken = live & (drawn.tokens < 0)
    state[BROKEN] |= broken
    state[STEP] += live
    ended = live & (drawn.tokens[:, None] == stops).any(1) & ~broken
    record.lengths[index] = state[STEP]
    record.ended[index] |= ended
    full = state[STEP] >= state[LIMIT]
    state[LIVE] = (live & ~ended & ~full & ~broken).to(state.dtype)
