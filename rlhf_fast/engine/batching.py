"""Which samples decode side by side, and the left-padded input they start from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_fast.errors import GenerationError
from rlhf_fast.types import PackedSequences


def plan_batches(
    prompt_lengths: Sequence[int],
    samples_per_prompt: int,
    max_new_tokens: int,
    max_batch: int,
    max_batch_tokens: int | None = None,
) -> list[list[int]]:
    """Split all samples into decoding batches.

    Samples of similar prompt length, longest first, so padding is small and a batch that does not
    fit fails at the start. Samples of one prompt stay adjacent and share its prefill. Batches are
    of even size: 300 samples at `max_batch` 256 are twice 150, not 256 and 44.

    Args:
        prompt_lengths: B lengths.
        samples_per_prompt: G; sample s answers prompt s // G.
        max_new_tokens: room for each response.
        max_batch: sequences side by side at most.
        max_batch_tokens: padded key-value slots a batch may hold; None is no limit.

    Returns:
        Lists of sample indices; each sample appears once.

    Raises:
        GenerationError: RF4007, one sample alone exceeds `max_batch_tokens`.
    """
    total = len(prompt_lengths) * samples_per_prompt
    order = sorted(range(total), key=lambda s: -prompt_lengths[s // samples_per_prompt])
    size = -(-total // -(-total // max_batch)) if total else 0
    batches: list[list[int]] = []
    start = 0
    while start < total:
        slots = prompt_lengths[order[start] // samples_per_prompt] + max_new_tokens
        rows = size if max_batch_tokens is None else min(size, max_batch_tokens // slots)
        if rows < 1:
            raise GenerationError(
                "RF4007",
                f"one sample needs {slots} tokens of key-value memory, "
                f"more than the budget of {max_batch_tokens}",
                where=f"prompt {order[start] // samples_per_prompt}",
                remedy="raise max_batch_tokens, or lower max_new_tokens or the prompt length",
            )
        batches.append(order[start : start + rows])
        start += rows
    return batches


class PaddedPrompts(NamedTuple):
    """Left-padded prompts: ids, mask, positions all [U, W], int64, bool, int64.

    Padding reads token 0, a valid id whatever the vocabulary, at position 0, and is masked.
    """

    ids: Tensor
    mask: Tensor
    positions: Tensor


def pad_left(
    prompts: PackedSequences, indices: Sequence[int], device: torch.device
) -> PaddedPrompts:
    """Left-pad the named prompts to the longest of them.

    Positions are cumsum(mask) - mask: a prompt counts from 0 whatever padding precedes it.
    """
    chosen = prompts.select(list(indices))
    lengths = chosen.lengths
    width = int(lengths.max())
    columns = torch.arange(width, device=lengths.device)
    mask = columns >= (width - lengths).unsqueeze(-1)
    ids = torch.zeros(len(chosen), width, dtype=torch.int64, device=lengths.device)
    # Row-major order of the true slots is the packed order.
    ids[mask] = chosen.ids
    positions = mask.cumsum(-1) - mask.to(torch.int64)
    return PaddedPrompts(ids.to(device), mask.to(device), positions.to(device))
