"""`rlhf_fast.protocols.WorkSplit` over the ranks of a `World`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rlhf_fast.distributed.world import World


class WorldSplit:
    """The ranks of a world as those that share the forwards of a batch.

    Args:
        world: all its ranks take part, on both axes of the mesh.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self.rank = world.rank
        self.ranks = world.size

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over ranks, in place, and returned; one that lies elsewhere comes back there."""
        here = tensor.to(self.world.device)
        total = self.world.sum(here)
        return tensor if total is tensor else tensor.copy_(total)

    def sum_numbers(self, numbers: Sequence[float]) -> list[float]:
        """Sum over ranks of equally many numbers, in float64."""
        values = torch.tensor(numbers, dtype=torch.float64, device=self.world.device)
        summed: list[float] = self.world.sum(values).tolist()
        return summed

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on some rank."""
        return self.world.any(flag)

    def exhausted(self, flag: bool) -> bool:
        """See `WorkSplit`; where every rank holds whole models, none waits for another."""
        return self.world.any_exhausted(flag) if self.world.shards > 1 else self.world.any(flag)
