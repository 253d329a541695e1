"""Where the parameters of a loaded model go: one device, whole copies on all ranks, or shards."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from rlhf_fast.distributed.sharding import shard_module
from rlhf_fast.distributed.world import World
from rlhf_fast.engine.sharded_views import WeightView
from rlhf_fast.engine.twin import twin_of
from rlhf_fast.engine.view_choice import choose_view
from rlhf_fast.models.forward import compute_dtype


def place(module: nn.Module, world: World, *, offload: bool = False) -> None:
    """Put a loaded model on the devices of a run, before optimizers and generators are made.

    With one shard for each replica every rank holds it whole, with the weights of rank 0; with more
    it is cut over the ranks of a replica, to which it arrives a block at a time.

    Args:
        module: as loaded.
        world: the ranks.
        offload: keep the shards in host memory; of a whole model `StreamedModule` does that.

    Raises:
        ModelError: RF3080, an architecture that cannot be cut.
    """
    if world.shards > 1:
        shard_module(module, world, dtype=compute_dtype(module), offload=offload)
        return
    module.to(world.device)
    same_weights(world, module)


def place_generating(
    module: nn.Module,
    world: World,
    wish: str,
    *,
    path: str,
    put: Callable[[], None] | None = None,
) -> WeightView | None:
    """Place a model that is generated from, and say how generation sees it.

    Args:
        module: as loaded, with the adapters that generate active.
        world: the ranks.
        wish: `distributed.weights`.
        path: `engine.path`.
        put: places the module; None: `place` does.

    Returns:
        The view of sharded parameters; None of whole ones, which the engine reads themselves.

    Raises:
        ModelError: as `place`.
        GenerationError: RF4037, the view that was asked for cannot run.
    """
    # Before the model is cut: what FSDP puts around the layers is for training.
    twin = twin_of(module, world.device) if world.shards > 1 else None
    if put is None:
        place(module, world)
    else:
        put()
    return None if twin is None else choose_view(module, twin, world, wish, path=path)


def same_weights(world: World, module: nn.Module) -> None:
    """Overwrite parameters and buffers with those of rank 0; what is in host memory is left."""
    if world.size == 1:
        return
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.device != world.device:
                continue
            sent = tensor.detach().contiguous()
            world.broadcast([sent])
            if sent.data_ptr() != tensor.data_ptr():
                tensor.copy_(sent)
