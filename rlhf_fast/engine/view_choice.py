"""Which view of sharded parameters generation takes, and why."""

from __future__ import annotations

import torch
from torch import nn

from rlhf_fast.distributed.world import World
from rlhf_fast.engine.host_memory import available_host_memory
from rlhf_fast.engine.settings import GPU_SHARE
from rlhf_fast.engine.sharded_views import WeightView
from rlhf_fast.engine.twin import read_types
from rlhf_fast.engine.view_gather import GatherView, LayerwiseView, blocks_of
from rlhf_fast.engine.view_tp import TensorParallelView, why_not_tensor_parallel
from rlhf_fast.errors import GenerationError

VIEWS = ("auto", "tp", "gather", "layerwise")
# Of the free memory, for the gathered weights: keys and values want the rest.
_GATHER_SHARE = 0.5


def choose_view(
    module: nn.Module, twin: nn.Module, world: World, wish: str = "auto", *, path: str = "auto"
) -> WeightView:
    """The view asked for, or the first of tp, gather and layerwise that can run.

    All ranks call it together and choose alike.

    Args:
        module: sharded over `world`.
        twin: `twin_of` it before that; taken over by the view.
        world: at least two ranks in a shard group.
        wish: one of VIEWS.
        path: `engine.path`; slices are for the fused one.

    Raises:
        GenerationError: RF4037, no such view, or the one asked for cannot run.
    """
    if wish not in VIEWS:
        raise GenerationError(
            "RF4037",
            f"no weight view {wish!r}",
            where="distributed.weights",
            expected=f"one of {', '.join(VIEWS)}",
        )
    not_parallel = why_not_tensor_parallel(module, twin, world)
    if path not in ("auto", "fused"):
        not_parallel = f"engine.path={path} does not sum slices"
    if wish == "tp" and not_parallel is not None:
        raise cannot_read(wish, not_parallel)
    if wish == "layerwise" and not blocks_of(twin):
        raise cannot_read(wish, "the model has no list of blocks")
    if wish == "tp" or (wish == "auto" and not_parallel is None):
        reason = "asked for" if wish == "tp" else "every rank's shard is its slice of the model"
        return TensorParallelView(module, twin, world, reason)
    if wish == "layerwise":
        return LayerwiseView(module, twin, world, "asked for")
    if wish == "gather":
        return GatherView(module, twin, world, "asked for")
    trained = dict(module.named_parameters(remove_duplicate=False))
    types = read_types(twin, trained)
    size = sum(trained[name].numel() * dtype.itemsize for name, dtype in types.items())
    room = int(_GATHER_SHARE * _free(world.device))
    # The rank with the least memory decides for all: a view is one for the group.
    fits = not world.any(size > room)
    if fits or not blocks_of(twin):
        return GatherView(module, twin, world, f"no tensor-parallel slices: {not_parallel}")
    return LayerwiseView(
        module,
        twin,
        world,
        f"no tensor-parallel slices: {not_parallel}; and the whole model, {size} bytes, does not "
        "fit into half of the memory that is free on every rank",
    )


def _free(device: torch.device) -> int:
    if device.type != "cuda":
        return available_host_memory()
    free, _ = torch.cuda.mem_get_info(device)
    held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(GPU_SHARE * (free + held))


def cannot_read(wish: str, why: str) -> GenerationError:
    """RF4037 of a view that was asked for."""
    return GenerationError(
        "RF4037",
        f"distributed.weights={wish} cannot run: {why}",
        where="distributed.weights",
        remedy="use distributed.weights=auto",
    )
