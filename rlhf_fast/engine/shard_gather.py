"""Whole parameters from the shards of all ranks: one all-gather for many of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from rlhf_fast.distributed.collectives import all_gather_rows


@dataclass(frozen=True)
class Part:
    """What a rank holds of a parameter.

    Args:
        local: its values, without a graph.
        shape: of the whole.
        dim: that is cut, in pieces of ceil(length / ranks) as far as there are any; None: every
            rank holds all of it.
    """

    local: Tensor
    shape: torch.Size
    dim: int | None

    def span(self, dim: int, rank: int, size: int) -> tuple[int, int]:
        """(start, length) of a rank's piece of the whole along `dim`."""
        length = self.shape[dim]
        piece = -(-length // size)
        start = min(rank * piece, length)
        return start, min(piece, length - start)

    def largest(self, size: int) -> int:
        """Elements of the largest piece."""
        if self.dim is None:
            return self.local.numel()
        return self.shape.numel() // max(1, self.shape[self.dim]) * self.span(self.dim, 0, size)[1]


def part_of(parameter: Tensor) -> Part:
    """The part of a parameter that lies here; the last axis of a DTensor's mesh is the shards'."""
    if not isinstance(parameter, DTensor):
        return Part(parameter.detach(), parameter.shape, None)
    placement: Any = parameter.placements[-1]
    dim = placement.dim if isinstance(placement, Shard) else None
    with torch.no_grad():
        local: Tensor = parameter.to_local()
    return Part(local.detach(), parameter.shape, dim)


class Gatherer:
    """All-gathers over the ranks of a shard group.

    Args:
        group: of the ranks.
        rank: this one's place in it.
        size: how many they are.

    Attributes:
        gathered_bytes: that this rank has received from others so far.
    """

    def __init__(self, group: dist.ProcessGroup, rank: int, size: int) -> None:
        self.group, self.rank, self.size = group, rank, size
        self.gathered_bytes = 0

    @torch.no_grad()
    def whole(self, pairs: Sequence[tuple[Tensor, Part]]) -> None:
        """Write whole parameters, in one all-gather a dtype of theirs.

        Args:
            pairs: targets of the parameters' shapes, and the parts here. Values are rounded to the
                target's type before they are sent.
        """
        for target, part in pairs:
            if part.dim is None:
                target.copy_(part.local)
        cut = [(target, part) for target, part in pairs if part.dim is not None]
        for dtype in dict.fromkeys(target.dtype for target, _ in cut):
            self._gather([(t, p) for t, p in cut if t.dtype is dtype], dtype)

    def _gather(self, pairs: Sequence[tuple[Tensor, Part]], dtype: torch.dtype) -> None:
        sizes = [part.largest(self.size) for _, part in pairs]
        total = sum(sizes)
        sent = torch.zeros(total, dtype=dtype, device=pairs[0][0].device)
        for (_, part), piece in zip(pairs, sent.split(sizes), strict=True):
            piece[: part.local.numel()].view(part.local.shape).copy_(part.local)
        received = torch.empty(self.size * total, dtype=dtype, device=sent.device)
        all_gather_rows(received, sent, self.group)
        self.gathered_bytes += (self.size - 1) * total * dtype.itemsize
        for rank, row in enumerate(received.view(self.size, total)):
            for (target, part), piece in zip(pairs, row.split(sizes), strict=True):
                assert part.dim is not None
                window = target.narrow(part.dim, *part.span(part.dim, rank, self.size))
                window.copy_(piece[: window.numel()].view(window.shape))

    def take_room(self, pairs: Sequence[tuple[Tensor, Part]]) -> None:
        """Take the memory that `whole` needs beside its targets, and give it back.

        Raises:
            torch.OutOfMemoryError: there is not so much.
        """
        cut = [(target, part) for target, part in pairs if part.dim is not None]
        for dtype in dict.fromkeys(target.dtype for target, _ in cut):
            total = sum(part.largest(self.size) for t, part in cut if t.dtype is dtype)
            torch.empty((self.size + 1) * total, dtype=dtype, device=cut[0][0].device)

    @torch.no_grad()
    def slices(self, targets: Sequence[tuple[Tensor, Part, int | None]]) -> None:
        """Write this rank's pieces along other dims than the parts are cut along.

        Args:
            targets: (target, part here, dim of the piece wanted; None: the whole).
        """
        if not targets:
            return
        wholes = [torch.empty(p.shape, dtype=t.dtype, device=t.device) for t, p, _ in targets]
        self.whole([(w, part) for w, (_, part, _) in zip(wholes, targets, strict=True)])
        for whole, (target, part, dim) in zip(wholes, targets, strict=True):
            if dim is not None:
                whole = whole.narrow(dim, *part.span(dim, self.rank, self.size))
            target.copy_(whole)

    def least(self, number: int) -> int:
        """The least of the ranks' numbers."""
        device = "cuda" if dist.get_backend(self.group) == "nccl" else "cpu"
        found = torch.tensor(number, device=device)
        dist.all_reduce(found, dist.ReduceOp.MIN, group=self.group)
        return int(found)


def named_parts(module: nn.Module) -> dict[str, Part]:
    """The parts of all parameters that lie here, tied ones under their first name."""
    return {name: part_of(parameter) for name, parameter in module.named_parameters()}
