"""`gather` and `layerwise`: whole weights from the shards of all ranks, and back to shards."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_fast.distributed.placement import decoder_layers
from rlhf_fast.distributed.world import World
from rlhf_fast.engine.buffers import allocate_again, give_up, nbytes_of
from rlhf_fast.engine.shard_gather import Gatherer, part_of
from rlhf_fast.engine.sharded_views import Weights
from rlhf_fast.engine.tensor_parallel import TensorParallel
from rlhf_fast.engine.twin import TwinBuffers, put, read_types

_ALIGNMENT = 256  # bytes: parameters of one block begin where any kernel likes them to


def blocks_of(twin: nn.Module) -> list[tuple[str, nn.Module]]:
    """The decoder blocks by name."""
    layers = decoder_layers(twin)
    if layers is None:
        return []
    name = next(name for name, part in twin.named_modules() if part is layers)
    return [(f"{name}.{i}", block) for i, block in enumerate(layers)]


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
        trained = dict(module.named_parameters(remove_duplicate=False))
        wanted = {
            name: (trained[name].shape, dtype) for name, dtype in read_types(twin, trained).items()
        }
        self.weights = TwinBuffers(twin, wanted, world.device)
        self._buckets = _buckets(module, twin)

    @property
    def nbytes(self) -> int:
        """See `WeightView`."""
        return self.weights.nbytes

    @contextmanager
    def reading(self) -> Iterator[None]:
        """See `WeightView`."""
        try:
            _make_room(self.gatherer, self.weights.restore, self._buckets)
            for bucket in self._buckets:
                self.gatherer.whole([(target, part_of(p)) for target, p in bucket])
            yield
        finally:
            self.weights.release()

    def agreed(self, number: int) -> int:
        """See `WeightView`."""
        return number


class LayerwiseView:
    """`WeightView`: one block at a time, gathered again for every forward.

    Embedding, head and final norm are gathered once a rollout. Blocks share one buffer, so the
    ranks of a shard group take all steps together: they generate the same samples. Between
    rollouts nothing is held.

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
        trained = dict(module.named_parameters(remove_duplicate=False))
        types = read_types(twin, trained)
        blocks = blocks_of(twin)
        inside = {
            name: block for name in types for block, _ in blocks if name.startswith(f"{block}.")
        }
        self._buffer = room([_most_bytes(trained, types, inside)], torch.uint8, world.device)
        used: dict[str, int] = {}
        for name, dtype in types.items():
            shape = trained[name].shape
            if name not in inside:
                put(twin, name, room(shape, dtype, world.device))
                continue
            start = used.get(inside[name], 0)
            stop = start + shape.numel() * dtype.itemsize
            used[inside[name]] = -(-stop // _ALIGNMENT) * _ALIGNMENT
            put(twin, name, self._buffer[start:stop].view(dtype).view(shape))
        self.weights: Weights = _NoFusedPath()
        self._buckets = _buckets(module, twin)
        *each, self._rest = self._buckets
        for bucket, (_, block_module) in zip(each, blocks, strict=True):
            block_module.register_forward_pre_hook(self._fetching(bucket))
        self._held = [self._buffer, *(target for target, _ in self._rest)]
        give_up(self._held)

    def _fetching(self, bucket: list[tuple[Tensor, nn.Parameter]]) -> Any:
        def fetch(*_: Any) -> None:
            self.gatherer.whole([(target, part_of(p)) for target, p in bucket])

        return fetch

    @property
    def nbytes(self) -> int:
        """See `WeightView`."""
        return nbytes_of(self._held)

    @contextmanager
    def reading(self) -> Iterator[None]:
        """See `WeightView`."""
        try:
            _make_room(self.gatherer, partial(allocate_again, self._held), self._buckets)
            self.gatherer.whole([(target, part_of(p)) for target, p in self._rest])
            yield
        finally:
            give_up(self._held)

    def agreed(self, number: int) -> int:
        """See `WeightView`."""
        return self.gatherer.least(number)


def _make_room(
    gatherer: Gatherer,
    restore: Callable[[], None],
    buckets: list[list[tuple[Tensor, nn.Parameter]]],
) -> None:
    """Memory for the weights and for gathering each bucket, on all ranks or on none.

    A rank without it would leave the others in the first all-gather.
    """
    exhausted = False
    try:
        restore()
        for bucket in buckets:
            gatherer.take_room([(target, part_of(p)) for target, p in bucket])
    except torch.OutOfMemoryError:
        exhausted = True
    if gatherer.least(0 if exhausted else 1) == 0:
        raise torch.OutOfMemoryError("no room for the gathered weights on some rank")


def room(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor without values."""
    with torch.inference_mode(False):
        return torch.empty(tuple(shape), dtype=dtype, device=device)


def _most_bytes(
    trained: Mapping[str, Tensor], types: Mapping[str, torch.dtype], inside: Mapping[str, str]
) -> int:
    """Bytes of the largest block."""
    sizes: dict[str, int] = {}
    for name, block in inside.items():
        size = trained[name].numel() * types[name].itemsize
        sizes[block] = sizes.get(block, 0) + -(-size // _ALIGNMENT) * _ALIGNMENT
    return max(sizes.values(), default=0)


class _NoFusedPath:
    """`Weights` of a twin whose hooks keep it off the fused path."""

    def __getattr__(self, name: str) -> Any:
        raise AssertionError("blocks that share a buffer are read through the modules")


def _buckets(module: nn.Module, twin: nn.Module) -> list[list[tuple[Tensor, nn.Parameter]]]:
    """(target in the twin, trained parameter), a block a bucket, then all the rest."""
    trained = dict(module.named_parameters(remove_duplicate=False))
    names = [f"{name}." for name, _ in blocks_of(twin)]
    buckets: list[list[tuple[Tensor, nn.Parameter]]] = [[] for _ in (*names, "")]
    for name, target in twin.named_parameters():
        place = next((i for i, block in enumerate(names) if name.startswith(block)), -1)
        buckets[place].append((target.data, trained[name]))
    return buckets
