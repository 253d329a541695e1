"""Gradients of all ranks: their sums, their one norm, and the part of each that a rank steps.

Backwards complete the gradient of a DTensor over the shard axis, its only one: FSDP does, and the
reading of vocabulary rows. What is missing is added once before the optimizer step, however many
backwards it had: over the replicas for shards, over all ranks for what is whole on every rank. All
gradients are sums over the ranks, never means: losses are normalised by the global token count
already.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from rlhf_fast.distributed.world import REPLICATE, World

# Elements of the copy that gradients of whole parameters are summed in: 256 MB in fp32.
BUCKET = 1 << 26
P = TypeVar("P", bound=Tensor)


class RankGradients:
    """Satisfies `rlhf_fast.optim.GradientExchange` for the ranks of a world.

    Args:
        world: more than one rank; all of them step the same parameters at the same time.
    """

    def __init__(self, world: World) -> None:
        self._world = world

    @classmethod
    def of(cls, world: World) -> RankGradients | None:
        """What a `GuardedOptimizer` of this world is given as `ranks`; None for one rank."""
        return None if world.mesh is None else cls(world)

    def shard(self, parameter: nn.Parameter) -> nn.Parameter:
        """The part of a parameter that this rank steps: the parameter, or its shard's memory."""
        if not isinstance(parameter, DTensor):
            return parameter
        return nn.Parameter(parameter.to_local().detach(), parameter.requires_grad)

    def gather(self, parameters: Sequence[nn.Parameter], shards: Sequence[nn.Parameter]) -> None:
        """Complete the gradients of the parameters and hand them to the shards.

        A parameter without a gradient on this rank counts as zeros if another rank has one for it,
        and is left out of the step if none has.

        Raises:
            RuntimeError: a parameter no longer lies where its shard was made.
        """
        self._sum_over_ranks([p for p in parameters if not isinstance(p, DTensor)])
        for parameter, shard in zip(parameters, shards, strict=True):
            if parameter is shard:
                continue
            assert isinstance(parameter, DTensor)
            if parameter.to_local().data_ptr() != shard.data_ptr():
                raise RuntimeError("a sharded parameter was moved after its optimizer was made")
            grad = parameter.grad
            if grad is None:
                shard.grad = None
                continue
            assert isinstance(grad, DTensor)
            shard.grad = grad.to_local()
        if self._world.replicas > 1:
            self._sum_over_replicas(
                [s for p, s in zip(parameters, shards, strict=True) if p is not s]
            )

    def total_norm(
        self, parameters: Sequence[nn.Parameter], shards: Sequence[nn.Parameter]
    ) -> Tensor:
        """[] float32: the 2-norm of all gradients, on all ranks the same bits.

        NaN or Inf on one rank is so on all.
        """
        square = torch.zeros((), dtype=torch.float64, device=self._world.device)
        pairs = list(zip(parameters, shards, strict=True))
        cut = [shard for parameter, shard in pairs if parameter is not shard]
        whole = [shard for parameter, shard in pairs if parameter is shard]
        for copies, chosen in ((self._world.replicas, cut), (self._world.size, whole)):
            grads = [s.grad for s in chosen if s.grad is not None and s.grad.numel()]
            if grads:
                norms = torch.stack(torch._foreach_norm(grads)).double()
                # Every copy adds its share, so that one which differs is not overlooked.
                square += norms.square().sum() / copies
        return self._world.sum(square).sqrt().float()

    def _sum_over_replicas(self, shards: Sequence[nn.Parameter]) -> None:
        """Add up the gradients of shards where they lie, all on their way at the same time."""
        mesh = self._world.mesh
        assert mesh is not None
        group = mesh.get_group(REPLICATE)
        grads = [s.grad for s in shards if s.grad is not None and s.grad.numel()]
        under_way = [dist.all_reduce(grad, group=group, async_op=True) for grad in grads]
        for work in under_way:
            assert work is not None
            work.wait()

    def _sum_over_ranks(self, parameters: Sequence[nn.Parameter]) -> None:
        """All-reduces of `BUCKET` elements for what is whole on every rank, larger ones alone.

        A copy takes the place of the gradients in it, so that one bucket is what is held twice.
        """
        for bucket in buckets_of(parameters):
            sizes = [p.numel() for p in bucket]
            flat = torch.zeros(
                sum(sizes) + len(bucket), dtype=bucket[0].dtype, device=self._world.device
            )
            *parts, present = flat.split([*sizes, len(bucket)])
            for index, (parameter, part) in enumerate(zip(bucket, parts, strict=True)):
                if parameter.grad is not None:
                    part.copy_(parameter.grad.reshape(-1))
                    present[index] = 1
            self._world.sum(flat)
            for parameter, part, ranks in zip(bucket, parts, present.tolist(), strict=True):
                parameter.grad = part.view(parameter.shape) if ranks else None


def buckets_of(parameters: Sequence[P]) -> Iterator[list[P]]:
    """The parameters in their order, a dtype at a time, at most `BUCKET` elements together."""
    for dtype in dict.fromkeys(p.dtype for p in parameters):
        bucket: list[P] = []
        held = 0
        for parameter in (p for p in parameters if p.dtype == dtype):
            if bucket and held + parameter.numel() > BUCKET:
                yield bucket
                bucket, held = [], 0
            bucket.append(parameter)
            held += parameter.numel()
        yield bucket
