"""Between padded [S, R], where the algorithm is read, and packed [N], where models run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf_fast.data.packing import Share, pack_by_tokens, share_of
from rlhf_fast.protocols import Alone, WorkSplit
from rlhf_fast.types import IGNORE_INDEX, Experience, Microbatch, PackedSequences, Rollout


@dataclass(frozen=True)
class ResponseSlots:
    """Some samples of a rollout, packed, and where their response tokens lie.

    Slot j is response token `cols[j]` of sample `rows[j]`; its log-prob and the value of the state
    before it are read at packed position `positions[j]`, and the token itself is one further on.

    Args:
        sequences: the chosen samples, prompt and response, packed in the order chosen.
        rows, cols, positions: [M] int64.
        last: [K] int64 packed position of the last token of each chosen sample.
    """

    sequences: PackedSequences
    rows: Tensor
    cols: Tensor
    positions: Tensor
    last: Tensor

    def to_packed(self, padded: Tensor) -> Tensor:
        """[N] with `padded` [S, R] at the slots and 0 elsewhere."""
        packed = padded.new_zeros(self.sequences.ids.numel())
        packed[self.positions] = padded[self.rows, self.cols]
        return packed

    def targets(self, mask: Tensor) -> Tensor:
        """[N] the token after each slot where `mask` [S, R] is true, IGNORE_INDEX elsewhere."""
        return torch.where(self.to_packed(mask), self.sequences.ids.roll(-1), IGNORE_INDEX)

    def to_padded(self, packed: Tensor, out: Tensor) -> None:
        """Write `packed` [N], on any device, into `out` [S, R] at the slots."""
        out[self.rows, self.cols] = packed.to(out.device)[self.positions].to(out.dtype)


_ALONE = Alone()


def token_packs(
    rollout: Rollout, samples: Sequence[int], budget: int, split: WorkSplit = _ALONE
) -> Iterator[Share]:
    """This rank's forwards over samples of a rollout, of at most `budget` tokens, evened out.

    All ranks get equally many, and what they get at a time is about equally long. One for whom
    nothing is left reads the shortest sample of all.
    """
    lengths = (rollout.prompt_lengths.cpu() + rollout.lengths.cpu()).tolist()
    chosen = list(samples)
    if not chosen:
        return
    tokens = [lengths[s] for s in chosen]
    packs = pack_by_tokens(tokens, budget, balanced=True)
    if len(packs) % split.ranks:
        wanted = -(-len(packs) // split.ranks) * split.ranks
        packs = pack_by_tokens(tokens, budget, balanced=True, min_bins=wanted)
    for share in share_of(packs, tokens, split.rank, split.ranks):
        yield Share([chosen[i] for i in share.rows], share.idle)


def longest_sample(rollout: Rollout) -> int:
    """Tokens of the longest sample, prompt and response."""
    return int((rollout.prompt_lengths.cpu() + rollout.lengths.cpu()).max())


def response_slots(
    rollout: Rollout, indices: Sequence[int], *, idle: bool = False
) -> ResponseSlots:
    """Pack samples `indices` of a rollout and locate their response tokens; of idle ones, none."""
    device = rollout.responses.device
    chosen = torch.as_tensor(indices, dtype=torch.int64, device=device)
    lengths = rollout.lengths.to(device)[chosen]
    prompt_lengths = rollout.prompt_lengths.to(device)[chosen]
    totals = prompt_lengths + lengths
    starts = totals.cumsum(0) - totals
    count = int(lengths.sum())
    rows = torch.repeat_interleave(chosen, lengths, output_size=count)
    first_slot = lengths.cumsum(0) - lengths
    cols = torch.arange(count, device=device) - torch.repeat_interleave(
        first_slot, lengths, output_size=count
    )
    before = torch.repeat_interleave(starts + prompt_lengths - 1, lengths, output_size=count)
    positions = before + cols
    ids = torch.empty(int(totals.sum()), dtype=torch.int64, device=device)
    _copy_prompts(rollout, chosen, starts, prompt_lengths, ids)
    ids[positions + 1] = rollout.responses[rows, cols]
    sequences = PackedSequences.from_flat(ids, totals)
    if idle:
        rows, cols, positions = rows[:0], cols[:0], positions[:0]
    return ResponseSlots(sequences, rows, cols, positions, starts + totals - 1)


def _copy_prompts(
    rollout: Rollout, chosen: Tensor, starts: Tensor, prompt_lengths: Tensor, ids: Tensor
) -> None:
    """Gather each chosen sample's prompt into `ids` at its start, without a loop over samples."""
    packed = rollout.prompts.sequences
    sources = packed.cu_seqlens.to(ids.device, torch.int64)[chosen // rollout.samples_per_prompt]
    count = int(prompt_lengths.sum())
    first = prompt_lengths.cumsum(0) - prompt_lengths
    within = torch.arange(count, device=ids.device) - torch.repeat_interleave(
        first, prompt_lengths, output_size=count
    )
    target = torch.repeat_interleave(starts, prompt_lengths, output_size=count) + within
    source = torch.repeat_interleave(sources, prompt_lengths, output_size=count) + within
    ids[target] = packed.ids.to(ids.device)[source]


def build_microbatch(
    experience: Experience,
    indices: Sequence[int],
    *,
    advantages: Tensor,
    weights: Tensor,
    num_loss_tokens: int,
    ratio_cap: float = 0.0,
    idle: bool = False,
) -> Microbatch:
    """Pack samples `indices` with everything their update reads.

    Args:
        experience: the rollout batch.
        indices: samples of this microbatch.
        advantages: [S, R] float32, whitened as configured.
        weights: [S, R] float32 detached importance weights.
        num_loss_tokens: loss tokens of the whole optimizer step.
        ratio_cap: see `Microbatch`.
        idle: no token of them takes part in the losses.
    """
    scored = experience.scored
    slots = response_slots(scored.rollout, indices, idle=idle)
    targets = slots.targets(scored.loss_mask)
    return Microbatch(
        sequences=slots.sequences,
        targets=targets,
        loss_mask=targets != IGNORE_INDEX,
        old_logprobs=slots.to_packed(scored.old_logprobs),
        ref_logprobs=slots.to_packed(scored.ref_logprobs),
        old_values=slots.to_packed(scored.values),
        advantages=slots.to_packed(advantages),
        returns=slots.to_packed(experience.returns),
        weights=slots.to_packed(weights),
        num_loss_tokens=num_loss_tokens,
        ratio_cap=ratio_cap,
    )
