"""A sharded model and its single-process twin, trained side by side on every rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from rlhf_fast.config import OptimConfig
from rlhf_fast.distributed.gradients import RankGradients
from rlhf_fast.distributed.sharding import ShardedModule
from rlhf_fast.distributed.world import World
from rlhf_fast.models.forward import packed_hidden
from rlhf_fast.models.heads import scalar_outputs
from rlhf_fast.models.vocabulary import target_logprobs
from rlhf_fast.optim import GuardedOptimizer
from tests.models.tiny import next_token_targets, random_sequences

OPTIM = OptimConfig(lr=1e-2, schedule="constant", weight_decay=0.1, max_grad_norm=0.5)
TOLERANCE = {"rtol": 2e-5, "atol": 2e-6}
# Adam divides by the root of v: a gradient of rounding alone (biases of keys) still moves a weight.
WEIGHTS = {"rtol": 2e-5, "atol": 2e-5}
Loss = Callable[[Any, int], Tensor]


def policy_loss(module: nn.Module, rank: int) -> Tensor:
    """Of the tokens of one rank, whose number differs from rank to rank."""
    sequences = random_sequences([6, 3 + rank, 1], seed=rank)
    logprobs, _ = target_logprobs(
        module, sequences, next_token_targets(sequences), temperature=0.8, with_entropy=False
    )
    return -logprobs.sum() / 20


def value_loss(module: nn.Module, rank: int) -> Tensor:
    """The same of a classifier."""
    sequences = random_sequences([6, 3 + rank, 1], seed=rank)
    values = scalar_outputs(module, packed_hidden(module, sequences))
    return (values - 1).square().sum() / 20


class Twins:
    """A sharded model beside its twin in one process, which sees the tokens of all ranks.

    Args:
        world: the ranks.
        handle: of the sharded model.
        single: the twin.
        loss: of a model and the tokens of a rank.
    """

    def __init__(
        self,
        world: World,
        handle: ShardedModule,
        single: nn.Module,
        loss: Loss,
        *,
        trained: tuple[nn.Module, nn.Module] | None = None,
        **settings: Any,
    ) -> None:
        self.world, self.handle, self.single, self.loss = world, handle, single, loss
        ours, theirs = trained or (handle.module, single)
        ranks = RankGradients(world)
        self.ours = GuardedOptimizer(ours, OPTIM, 10, ranks=ranks, **settings)
        self.theirs = GuardedOptimizer(theirs, OPTIM, 10, **settings)
        self.faults: list[str] = []

    def backward(self) -> None:
        """Losses and gradients of both, without a step."""
        loss = self.loss(self.handle.module, self.world.rank)
        loss.backward()
        expected = [self.loss(self.single, rank) for rank in range(self.world.size)]
        for term in expected:
            term.backward()
        total = self.world.sum(loss.detach().clone())
        self.compare("loss", total, torch.stack(expected).sum().detach())

    def compare_gradients(self) -> None:
        """Compare every gradient, gathered, then drop them."""
        shards = [shard for _, shard in self.ours.named_parameters]
        assert self.ours._ranks is not None
        self.ours._ranks.gather(self.ours._whole, shards)
        for (name, shard), (_, twin) in zip(
            self.ours.named_parameters, self.theirs.named_parameters, strict=True
        ):
            assert shard.grad is not None
            assert twin.grad is not None
            self.compare(f"gradient of {name}", self.whole(name, shard.grad), twin.grad)
        self.ours.zero_grad()
        self.theirs.zero_grad()

    def step(self) -> None:
        """One step of both."""
        ours, theirs = self.ours.step(), self.theirs.step()
        self.compare("norm", torch.tensor(ours.grad_norm), torch.tensor(theirs.grad_norm))

    def compare_weights(self) -> None:
        """Compare every weight, gathered."""
        for name, parameter in self.single.named_parameters():
            whole = self.handle.gather_full(name)
            self.compare(f"weight {name}", whole, parameter.detach(), WEIGHTS)

    def whole(self, name: str, local: Tensor) -> Tensor:
        """A gradient or moment of all ranks; what is no parameter of the model is whole already."""
        return self.handle.gather_full(name, local) if name in self.handle.cuts else local

    def compare(
        self, what: str, ours: Tensor, theirs: Tensor, tolerance: dict[str, float] = TOLERANCE
    ) -> None:
        """Note what differs; an entry far below the largest carries the rounding of that one."""
        atol = tolerance["atol"] * max(1.0, float(theirs.abs().max()) if theirs.numel() else 0.0)
        tolerance = tolerance | {"atol": atol}
        if ours.shape != theirs.shape or not torch.allclose(ours, theirs, **tolerance):
            self.faults.append(f"{what}: {(ours - theirs).abs().max():.2e}")


def addresses(module: nn.Module) -> dict[str, int]:
    """Where what this rank holds of each parameter begins."""
    return {
        name: (p.to_local() if isinstance(p, DTensor) else p).data_ptr()
        for name, p in module.named_parameters()
    }


def check_layout(handle: ShardedModule, single: nn.Module) -> list[str]:
    """Shards against slices of the full weights, memory against the formula."""
    faults = []
    rank, shards = handle.world.shard_rank, handle.world.shards
    expected = 0
    for name, parameter in single.named_parameters():
        cut, local = handle.cuts[name], handle.local(name)
        shape = cut.local_shape(parameter.shape, shards, rank)
        expected += local.itemsize * torch.Size(shape).numel()
        piece = parameter.detach()
        if cut.dim is not None:
            run = -(-piece.shape[cut.dim] // shards)
            start = min(rank * run, piece.shape[cut.dim])
            piece = piece.narrow(cut.dim, start, shape[cut.dim])
        if local.shape != shape or not torch.equal(local, piece):
            faults.append(f"{name} is not its slice")
    rows = handle.embedding
    name = next(n for n, cut in handle.cuts.items() if cut.holder == "vocabulary")
    if rows is None or rows.stop - rows.start != len(handle.local(name)):
        faults.append(f"{rows} are not the rows of the embedding")
    aligned = sum(256 * len(block.flat.names) for block in handle.blocks)
    uneven = sum(  # padding of the last shards to the length of the first
        4 * parameter.numel() // max(1, parameter.shape[0])
        for name, parameter in single.named_parameters()
        if handle.cuts[name].holder == "fsdp" and parameter.shape[0] % shards
    )
    if not expected <= handle.held_bytes <= expected + aligned + uneven * shards:
        faults.append(f"{handle.held_bytes} bytes held, {expected} expected")
    return faults
