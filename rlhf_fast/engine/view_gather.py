"""`gather` and `layerwise`: whole weights from the shards of all ranks, and back to shards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from rlhf_fast.distributed.world import World
from rlhf_fast.engine.fused_support import COMPUTE
from rlhf_fast.engine.module_forward import unwrapped
from rlhf_fast.engine.shard_gather import Gatherer, named_parts, part_of
from rlhf_fast.engine.sharded_views import Weights
from rlhf_fast.engine.tensor_parallel import TensorParallel
from rlhf_fast.engine.twin import put, room
from rlhf_fast.engine.weights import AliasedWeights
from rlhf_fast.models.forward import compute_dtype


def blocks_of(twin: nn.Module) -> list[tuple[str, nn.Module]]:
    """The decoder blocks by name: the longest list of modules of one class."""
    lists = [
        (name, part)
        for name, part in unwrapped(twin).named_modules(prefix=_prefix(twin))
        if isinstance(part, nn.ModuleList) and len({type(block) for block in part}) == 1
    ]
    if not lists:
        return []
    name, longest = max(lists, key=lambda entry: len(entry[1]))
    return [(f"{name}.{i}", block) for i, block in enumerate(longest)]


def _prefix(twin: nn.Module) -> str:
    inner = unwrapped(twin)
    return next(name for name, part in twin.named_modules() if part is inner)


class GatherView:
    """`WeightView`: the whole model in one buffer, for the length of a rollout.

    Every rank generates samples of its own, as many steps as they take: between the all-gathers at
    the start of a rollout and its end no rank waits for another.

    Args:
        module: sharded.
        twin: `twin_of` it before that; takes the whole weights.
        world: the ranks.
        reason: why this view.
    """

    name = "gather"
    lockstep = False
    parallel: TensorParallel | None = None

    def __init__(self, module: nn.Module, twin: nn.Module, world: World, reason: str) -> None:
        self.module, self.reason = twin, reason
        group = world.shard_mesh.get_group()
        self.gatherer = Gatherer(group, world.shard_rank, world.shards)
        dtype = COMPUTE[compute_dtype(twin)]
        for name, part in named_parts(module).items():
            put(twin, name, room(part.shape, dtype, part.local.device, now=False))
        self._owned = AliasedWeights(twin)
        self.weights: Weights = self._owned
        self._buckets = _buckets(module, twin)

    @property
    def nbytes(self) -> int:
        """See `WeightView`."""
        return self._owned.held

    @contextmanager
    def reading(self) -> Iterator[None]:
        """See `WeightView`."""
        self._owned.restore()
        try:
            for bucket in self._buckets:
                self.gatherer.whole([(target, part_of(p)) for target, p in bucket])
            yield
        finally:
            self._owned.release()

    def agreed(self, number: int) -> int:
        """See `WeightView`."""
        return number


class LayerwiseView:
    """`WeightView`: one block at a time, gathered again for every forward.

    Embedding, head and final norm are gathered once a rollout. Blocks share one buffer, so the
    ranks of a shard group take all steps together: they generate the same samples.

    Args:
        module, twin, world, reason: as for `GatherView`.
    """

    name = "layerwise"
    lockstep = True
    parallel: TensorParallel | None = None

    def __init__(self, module: nn.Module, twin: nn.Module, world: World, reason: str) -> None:
        self.module, self.reason = twin, reason
        group = world.shard_mesh.get_group()
        self.gatherer = Gatherer(group, world.shard_rank, world.shards)
        dtype = COMPUTE[compute_dtype(twin)]
        parts = named_parts(module)
        device = next(iter(parts.values())).local.device
        blocks = blocks_of(twin)
        inside = {
            name: block for name in parts for block, _ in blocks if name.startswith(f"{block}.")
        }
        sizes = dict.fromkeys((block for block, _ in blocks), 0)
        for name, block in inside.items():
            sizes[block] += parts[name].shape.numel()
        most = max(sizes.values(), default=0)
        self._buffer = room([most], dtype, device)
        used: dict[str, int] = {}
        for name, part in parts.items():
            if name not in inside:
                put(twin, name, room(part.shape, dtype, device))
                continue
            start = used.get(inside[name], 0)
            used[inside[name]] = stop = start + part.shape.numel()
            put(twin, name, self._buffer[start:stop].view(part.shape))
        self.weights: Weights = _NoFusedPath()
        *each, self._rest = _buckets(module, twin)
        for bucket, (_, block_module) in zip(each, blocks, strict=True):
            block_module.register_forward_pre_hook(self._fetching(bucket))

    def _fetching(self, bucket: list[tuple[Tensor, nn.Parameter]]) -> Any:
        def fetch(*_: Any) -> None:
            self.gatherer.whole([(target, part_of(p)) for target, p in bucket])

        return fetch

    @property
    def nbytes(self) -> int:
        """See `WeightView`."""
        rest = sum(target.untyped_storage().nbytes() for target, _ in self._rest)
        return self._buffer.untyped_storage().nbytes() + rest

    @contextmanager
    def reading(self) -> Iterator[None]:
        """See `WeightView`."""
        self.gatherer.whole([(target, part_of(p)) for target, p in self._rest])
        yield

    def agreed(self, number: int) -> int:
        """See `WeightView`."""
        return self.gatherer.least(number)


class _NoFusedPath:
    """`Weights` of a twin whose hooks keep it off the fused path."""

    def __getattr__(self, name: str) -> Any:
        raise AssertionError("blocks that share a buffer are read through the modules")


def _buckets(module: nn.Module, twin: nn.Module) -> list[list[tuple[Tensor, nn.Parameter]]]:
    """(target in the twin, trained parameter), a block a bucket, then all the rest."""
    names = [f"{name}." for name, _ in blocks_of(twin)]
    buckets: list[list[tuple[Tensor, nn.Parameter]]] = [[] for _ in (*names, "")]
    for name, parameter in module.named_parameters():
        place = next((i for i, block in enumerate(names) if name.startswith(block)), -1)
        buckets[place].append((twin.get_parameter(name).data, parameter))
    return buckets
