"""A small module in one piece or sharded as the engine shards models, with everything that is odd.

On four ranks: uneven rows and a rank without any (embedding, norm), shards along dim 1, an empty
parameter, tied weights, a frozen one, a persistent buffer; on two replicas an embedding that lives
on a mesh of each replica's own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from rlhf_fast.distributed import (
    load_module_tensors,
    load_optimizer_state,
    load_rng_state,
    load_scheduler_state,
    module_tensors,
    optimizer_state,
    rng_state,
    scheduler_state,
)
from rlhf_fast.distributed.world import World


class Net(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(5, 6)
        self.head = nn.Linear(6, 5, bias=False)
        self.head.weight = self.embed.weight
        self.block = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 6))
        self.norm = nn.LayerNorm(6)
        self.frozen = nn.Linear(6, 3).requires_grad_(False)
        self.empty = nn.Parameter(torch.zeros(0, 6))
        self.register_buffer("count", torch.tensor([seed, 7]))


def build(seed: int, world: World | None = None) -> Net:
    """The module, sharded if there are several ranks: the block by FSDP2, the embedding by hand."""
    net = Net(seed)
    if world is None or world.mesh is None:
        return net
    mesh = world.shard_mesh if seed % 2 else world.mesh
    placements = [Shard(0)] if mesh.ndim == 1 else [Replicate(), Shard(0)]
    shared = nn.Parameter(distribute_tensor(net.embed.weight.detach(), mesh, placements))
    net.embed.weight = net.head.weight = shared
    narrow = net.block[1].weight
    fsdp_mesh = world.shard_mesh if world.replicas == 1 else world.mesh
    fully_shard(
        net.block,
        mesh=fsdp_mesh,
        shard_placement_fn=lambda p: Shard(1) if p is narrow else Shard(0),
    )
    fully_shard(net, mesh=fsdp_mesh, ignored_params={shared})
    return net


@dataclass
class Training:
    """A module with what trains it; `shards` are what the optimizer steps, by name."""

    net: Net
    shards: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    scheduler: Any

    @property
    def whole(self) -> list[tuple[str, nn.Parameter]]:
        return [(n, p) for n, p in self.net.named_parameters() if n in self.shards]

    def step(self, seed: int) -> None:
        """Step with made-up gradients, the same whole ones however the module is sharded."""
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.whole:
            grad: Tensor = torch.randn(parameter.shape, generator=generator)
            shard = self.shards[name]
            if isinstance(parameter, DTensor):
                grad = distribute_tensor(grad, parameter.device_mesh, parameter.placements)
            shard.grad = grad if isinstance(shard, DTensor) else local(grad)
        self.optimizer.step()
        self.scheduler.step()

    def groups(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """`tensors` and `state` for a save."""
        weights, aliases = module_tensors(self.net)
        moments, inner = optimizer_state(self.optimizer, self.shards.items(), self.whole)
        generators, rng = rng_state()
        state = {
            "aliases": aliases,
            "optimizer": inner,
            "scheduler": scheduler_state(self.scheduler),
            "rng": rng,
        }
        return {"actor": weights, "moments": moments, "rng": generators}, state

    def restore(self, checkpoint: Any) -> None:
        tensors, state = checkpoint.tensors, checkpoint.state
        load_module_tensors(self.net, tensors["actor"], state["aliases"])
        load_optimizer_state(
            self.optimizer, self.shards.items(), tensors["moments"], state["optimizer"], self.whole
        )
        load_scheduler_state(self.scheduler, state["scheduler"])
        load_rng_state(tensors["rng"], state["rng"])


def training(net: Net, *, steps_shards: bool) -> Training:
    """AdamW over the DTensors, or over a rank's shards of them as ordinary parameters."""
    shards = {}
    for name, parameter in net.named_parameters():
        if parameter.requires_grad:
            cut = steps_shards and isinstance(parameter, DTensor)
            shards[name] = nn.Parameter(local(parameter.detach())) if cut else parameter
    optimizer = torch.optim.AdamW(shards.values(), lr=1e-2, foreach=False)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    return Training(net, shards, optimizer, scheduler)


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(groups: dict[str, Any]) -> dict[str, Tensor]:
    """All tensors in one piece, by `<group>/<name>`; collective."""
    return {
        f"{group}/{name}": (t.full_tensor() if isinstance(t, DTensor) else t).detach().clone()
        for group, named in groups.items()
        for name, t in named.items()
    }
