"""Examples to batches: ragged sequences packed back to back, or padded for models that need it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf_fast.data.examples import PreferenceExample, PromptExample, SFTExample
from rlhf_fast.data.packing import pack_best_fit, pack_by_tokens
from rlhf_fast.types import IGNORE_INDEX, PackedSequences, PromptBatch


@dataclass(frozen=True)
class PackedBatch:
    """Sequences of one forward with language-model targets, all [N].

    Args:
        sequences: ids, positions and cu_seqlens of K segments.
        targets: [N] int64; `targets[n]` is the token after position n of the same segment, or
            IGNORE_INDEX where it carries no loss.
        loss_mask: [N] bool, true where `targets` is a token.
    """

    sequences: PackedSequences
    targets: Tensor
    loss_mask: Tensor

    @property
    def num_loss_tokens(self) -> int:
        """Tokens that carry loss; 0 is legal."""
        return int(self.loss_mask.sum())

    def idle(self) -> PackedBatch:
        """The same sequences, none of whose tokens carries loss."""
        nothing = torch.full_like(self.targets, IGNORE_INDEX)
        return PackedBatch(self.sequences, nothing, torch.zeros_like(self.loss_mask))

    def to(self, device: torch.device) -> PackedBatch:
        """The same batch on another device."""
        return PackedBatch(
            self.sequences.to(device), self.targets.to(device), self.loss_mask.to(device)
        )


@dataclass(frozen=True)
class PreferenceBatch:
    """Every completion of every prompt as a segment of one forward.

    Args:
        sequences: prompt + completion segments, the completions of a prompt side by side, best
            first. A segment's score is read at its last token, `cu_seqlens[1:] - 1`.
        group_sizes: [B] int64 completions of each prompt; they sum to the number of segments.
        margins: [B] float32.
    """

    sequences: PackedSequences
    group_sizes: Tensor
    margins: Tensor

    def __len__(self) -> int:
        return self.group_sizes.numel()

    def to(self, device: torch.device) -> PreferenceBatch:
        """The same batch on another device."""
        return PreferenceBatch(
            self.sequences.to(device), self.group_sizes.to(device), self.margins.to(device)
        )


def collate_sft(examples: Sequence[SFTExample]) -> PackedBatch:
    """Pack examples, in order. No label crosses from one segment into the next."""
    sequences = PackedSequences.from_lists([e.ids for e in examples])
    targets = torch.full_like(sequences.ids, IGNORE_INDEX)
    start = 0
    for example in examples:
        end = start + len(example)
        label, learnt = example.ids[1:], example.loss_mask[1:]
        targets[start : end - 1] = torch.where(learnt, label, IGNORE_INDEX)
        start = end
    return PackedBatch(sequences, targets, targets != IGNORE_INDEX)


def pack_sft(examples: Sequence[SFTExample], budget: int) -> list[PackedBatch]:
    """Pack examples into as few batches of at most `budget` tokens as best fit finds.

    Raises:
        DataError: RF2060 if an example is longer than the budget.
    """
    bins = pack_best_fit([len(e) for e in examples], budget)
    return [collate_sft([examples[i] for i in b]) for b in bins]


def collate_preferences(examples: Sequence[PreferenceExample]) -> PreferenceBatch:
    """Pack all completions of all examples, in order."""
    return PreferenceBatch(
        PackedSequences.from_lists([s for e in examples for s in e.sequences()]),
        torch.tensor([len(e.completions) for e in examples], dtype=torch.int64),
        torch.tensor([e.margin for e in examples], dtype=torch.float32),
    )


def pack_preferences(examples: Sequence[PreferenceExample], budget: int) -> list[PreferenceBatch]:
    """Split examples, in order, into batches of at most `budget` tokens; a prompt stays whole.

    Raises:
        DataError: RF2060 if one example alone exceeds the budget.
    """
    bins = pack_by_tokens([len(e) for e in examples], budget)
    return [collate_preferences([examples[i] for i in b]) for b in bins]


def collate_prompts(examples: Sequence[PromptExample]) -> PromptBatch:
    """Pack prompts, in order."""
    return PromptBatch(
        PackedSequences.from_lists([e.ids for e in examples]),
        tuple(e.uid for e in examples),
        tuple(e.row for e in examples),
        tuple(e.text for e in examples),
    )


def pad_sequences(
    sequences: Sequence[Tensor], pad_id: int, *, side: str = "right"
) -> tuple[Tensor, Tensor]:
    """Pad ragged sequences to the longest.

    The mask is built from lengths: a pad id that also occurs as a token, EOS for one, is harmless.

    Args:
        sequences: B tensors [T_b] int64.
        pad_id: fills what is left.
        side: `right` pads after a sequence, `left` before it.

    Returns:
        (ids [B, T] int64, mask [B, T] bool, true on the tokens).
    """
    if side not in ("left", "right"):
        raise ValueError(f"side: got {side!r}, expected 'left' or 'right'")
    width = max((s.numel() for s in sequences), default=0)
    ids = torch.full((len(sequences), width), pad_id, dtype=torch.int64)
    mask = torch.zeros((len(sequences), width), dtype=torch.bool)
    for b, sequence in enumerate(sequences):
        start = width - sequence.numel() if side == "left" else 0
        ids[b, start : start + sequence.numel()] = sequence
        mask[b, start : start + sequence.numel()] = True
    return ids, mask
