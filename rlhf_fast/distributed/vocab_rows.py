"""Rows that the ranks of a group own, met by all of them chunk by chunk.

Rank r owns n_r rows, which may be none. A chunk is rows [start, stop) of what each rank owns, so
all ranks run the same collectives in the same order whatever they own; m = max n_r decides how
many. What is sent is padded to the chunk's width, what is worked on is not: the rows of a chunk lie
side by side, those of rank 0 first. Sums over ranks are the collective's, in its own fixed order;
all other merging is in rank order: results are deterministic.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rlhf_fast.distributed.collectives import ALL_GATHER as _gather
from rlhf_fast.distributed.collectives import REDUCE_SCATTER as _scatter
from rlhf_fast_kernels.linear_arguments import Tokens
from rlhf_fast_kernels.linear_head import chunk_bounds

Group = dist.ProcessGroup


@dataclass(frozen=True)
class Chunk:
    """Rows [start, stop) of what each rank owns.

    Attributes:
        start, stop: the same on all ranks.
        counts: rows that each rank has in it, at most stop - start.
        rank: this one.
    """

    start: int
    stop: int
    counts: tuple[int, ...]
    rank: int

    @property
    def width(self) -> int:
        """Rows that a rank sends, padding included."""
        return self.stop - self.start

    @property
    def total(self) -> int:
        """Rows of all ranks."""
        return sum(self.counts)

    @property
    def own(self) -> slice:
        """Which of them this rank owns, numbered among all that it owns."""
        return slice(self.start, self.start + self.counts[self.rank])


class SharedRows:
    """The rows of a group's ranks, and the collectives that move them.

    Args:
        group: the ranks.
        counts: n_r of each.
        most: rows of one rank that a chunk holds at most.
    """

    def __init__(self, group: Group, counts: Sequence[int], most: int) -> None:
        self.group, self.counts = group, tuple(counts)
        self.rank, self.ranks = dist.get_rank(group), len(counts)
        self.longest = max(counts)
        # The device decides nothing where `most` is given.
        bounds = chunk_bounds(self.longest, 1, torch.device("cpu"), most)
        self.chunks = [self._chunk(start, stop) for start, stop in pairwise(bounds)]
        self.whole = self._chunk(0, self.longest)

    @classmethod
    def agree(cls, group: Group, count: int, device: torch.device, most: int) -> SharedRows:
        """Tell each other how many rows there are; an accelerator is waited for."""
        own = torch.tensor([count], device=device)
        counts = own.new_empty(dist.get_world_size(group))
        all_gather(counts, own, group)
        return cls(group, counts.tolist(), most)

    def _chunk(self, start: int, stop: int) -> Chunk:
        counts = tuple(min(max(n - start, 0), stop - start) for n in self.counts)
        return Chunk(start, stop, counts, self.rank)

    @property
    def largest(self) -> int:
        """Rows of all ranks in the largest chunk."""
        return max(chunk.total for chunk in self.chunks)

    # ---- numbers, a few a row -----------------------------------------------------------------

    def everyone(self, own: Tensor, chunk: Chunk | None = None) -> Tensor:
        """[ranks, F, width] from the owners' [F, n] in a chunk; None: from all that they own."""
        width = (chunk or self.whole).width
        padded = own.new_zeros(own.shape[0], width)
        padded[:, : own.shape[1]] = own
        out = own.new_empty(self.ranks, own.shape[0], width)
        all_gather(out.flatten(0, 1), padded, self.group)
        return out

    def by_owner(self, numbers: int, width: int, device: torch.device) -> Tensor:
        """[ranks, F, width] fp64: memory for F numbers of rows, by owner."""
        return torch.zeros(self.ranks, numbers, width, dtype=torch.float64, device=device)

    def put(self, parts: Tensor, chunk: Chunk, found: Tensor, start: int) -> None:
        """Write numbers [F, total] of a chunk to `parts` [ranks, F, ...] from `start` on."""
        for block, part in zip(parts, found.split(chunk.counts, dim=1), strict=True):
            block[:, start : start + part.shape[1]] = part

    def to_owners(self, parts: Tensor) -> Tensor:
        """[ranks, F, width] of this rank's rows, one part by each rank, from parts by owner."""
        out = torch.empty_like(parts)
        if parts.numel() > 0:
            dist.all_to_all_single(out, parts, group=self.group)
        return out

    # ---- hidden states and their gradient -----------------------------------------------------

    def gathered(self, take: Callable[[int, int], Tensor]) -> Iterator[tuple[Chunk, Tensor]]:
        """(chunk, its rows [total, H] of all ranks); the next one is under way meanwhile.

        Args:
            take: this rank's rows between two indices, fewer where there are no more.
        """
        ahead = self._start(self.chunks[0], take)
        for following, chunk in zip([*self.chunks[1:], None], self.chunks, strict=True):
            work, padded = ahead
            if following is not None:
                ahead = self._start(following, take)
            if work is not None:
                work.wait()
            blocks = padded.view(self.ranks, chunk.width, padded.shape[1])
            yield chunk, beside(blocks, chunk, dim=0)

    def _start(self, chunk: Chunk, take: Callable[[int, int], Tensor]) -> tuple[Any, Tensor]:
        own = take(chunk.start, chunk.stop)
        padded = own
        if own.shape[0] < chunk.width:
            padded = own.new_zeros(chunk.width, own.shape[1])
            padded[: own.shape[0]] = own
        out = own.new_empty(self.ranks * chunk.width, own.shape[1])
        return all_gather(out, padded.contiguous(), self.group, wait=False), out

    def start_sum(self, chunk: Chunk, rows: Tensor) -> tuple[Any, Tensor]:
        """(work or None, [width, H] of the owner, filled once the work is done) from [total, H]."""
        padded = rows
        if chunk.total < self.ranks * chunk.width:
            padded = rows.new_zeros(self.ranks, chunk.width, rows.shape[1])
            for block, part in zip(padded, rows.split(chunk.counts), strict=True):
                block[: len(part)] = part
            padded = padded.flatten(0, 1)
        out = rows.new_empty(chunk.width, rows.shape[1])
        return reduce_scatter(out, padded.contiguous(), self.group), out


def beside(padded: Tensor, chunk: Chunk, dim: int) -> Tensor:
    """The rows of a chunk side by side along `dim` of [ranks, ...], without padding."""
    if dim == 0 and chunk.total == len(padded) * chunk.width:
        return padded.flatten(0, 1)
    parts = [part.narrow(dim, 0, n) for part, n in zip(padded, chunk.counts, strict=True)]
    return torch.cat(parts, dim)


class HiddenGradient:
    """d hidden [N, H] of this rank's tokens, summed over ranks a chunk at a time.

    Args:
        hidden: [N, H]; the gradient has its shape and dtype.
        tokens: the rows among them that count.
        rows: those of all ranks.
    """

    def __init__(self, hidden: Tensor, tokens: Tokens, rows: SharedRows) -> None:
        self._rows, self._places = rows, tokens.places
        self._gradient = torch.zeros_like(hidden)
        self._pending: tuple[Chunk, Any, Tensor] | None = None

    def add(self, chunk: Chunk, part: Tensor) -> None:
        """Send this rank's share [total, H] of the chunk's gradient to the owners."""
        self._settle()
        self._pending = chunk, *self._rows.start_sum(chunk, part)

    def _settle(self) -> None:
        if self._pending is None:
            return
        chunk, work, found = self._pending
        if work is not None:
            work.wait()
        own = found[: chunk.counts[chunk.rank]].to(self._gradient.dtype)
        if self._places is None:
            self._gradient[chunk.own] = own
        else:
            self._gradient.index_copy_(0, self._places[chunk.own], own)
        self._pending = None

    def finish(self) -> Tensor:
        self._settle()
        return self._gradient


# ---- torch's collectives ------------------------------------------------------------------------


def all_gather(out: Tensor, own: Tensor, group: Group, *, wait: bool = True) -> Any:
    """Fill `out` with the ranks' `own`, along dim 0; without `wait` returns what to wait for."""
    if out.numel() == 0:
        return None
    return _gather(out, own, group=group, async_op=not wait)


def reduce_scatter(out: Tensor, parts: Tensor, group: Group) -> Any:
    """Fill `out` with this rank's block of dim 0 of the ranks' summed `parts`; to be waited for."""
    if out.numel() == 0:
        return None
    return _scatter(out, parts, group=group, async_op=True)
