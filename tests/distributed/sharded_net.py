"""A small module in one piece or sharded as the engine shards models, with everything that is odd.

On four ranks: uneven rows and a rank without any (embedding, norm), shards along dim 1, an empty
parameter, tied weights, a frozen one, a persistent buffer; on two replicas an embedding that lives
on a mesh of each replica's own.
"""

from __future__ import annotations

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
    fully_shard(
        net.block,
        mesh=world.fsdp_mesh,
        shard_placement_fn=lambda p: Shard(1) if p is narrow else Shard(0),
    )
    fully_shard(net, mesh=world.fsdp_mesh, ignored_params={shared})
    return net


def adamw(net: Net) -> torch.optim.AdamW:
    trained = [p for p in net.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr=1e-2, foreach=False)


def scheduler_of(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)


def step(net: Net, optimizer: torch.optim.Optimizer, seed: int) -> None:
    """A step with made-up gradients, the same whole ones however the module is sharded."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in net.parameters():
        if not parameter.requires_grad:
            continue
        grad = torch.randn(parameter.shape, generator=generator)
        if isinstance(parameter, DTensor):
            grad = distribute_tensor(grad, parameter.device_mesh, parameter.placements)
        parameter.grad = grad
    optimizer.step()


def groups_of(
    net: Net, optimizer: torch.optim.Optimizer, scheduler: Any
) -> tuple[dict[str, Any], dict[str, Any]]:
    """`tensors` and `state` for a save."""
    weights, aliases = module_tensors(net)
    moments, inner = optimizer_state(optimizer, net.named_parameters())
    generators, rng = rng_state()
    state = {
        "aliases": aliases,
        "optimizer": inner,
        "scheduler": scheduler_state(scheduler),
        "rng": rng,
    }
    return {"actor": weights, "moments": moments, "rng": generators}, state


def restore(net: Net, optimizer: torch.optim.Optimizer, scheduler: Any, checkpoint: Any) -> None:
    tensors, state = checkpoint.tensors, checkpoint.state
    load_module_tensors(net, tensors["actor"], state["aliases"])
    load_optimizer_state(optimizer, net.named_parameters(), tensors["moments"], state["optimizer"])
    load_scheduler_state(scheduler, state["scheduler"])
    load_rng_state(tensors["rng"], state["rng"])


def whole(groups: dict[str, Any]) -> dict[str, Tensor]:
    """All tensors in one piece, by `<group>/<name>`; collective."""
    return {
        f"{group}/{name}": (t.full_tensor() if isinstance(t, DTensor) else t).detach().clone()
        for group, named in groups.items()
        for name, t in named.items()
    }
