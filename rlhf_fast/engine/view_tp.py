"""`tp`: generation from shards that are tensor-parallel slices already."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_fast.distributed.flat_shards import adjacent, groups
from rlhf_fast.distributed.placement import COLUMNS, ROWS
from rlhf_fast.distributed.world import World
from rlhf_fast.engine.fused_support import why_not_fused
from rlhf_fast.engine.module_forward import unwrapped
from rlhf_fast.engine.shard_gather import Gatherer, Part, named_parts, part_of
from rlhf_fast.engine.sharded_views import Weights
from rlhf_fast.engine.tensor_parallel import TensorParallel
from rlhf_fast.engine.twin import TwinBuffers, put, read_types
from rlhf_fast.errors import GenerationError

_VOCABULARY = frozenset({"embed_tokens", "lm_head"})


@dataclass(frozen=True)
class Slice:
    """What a rank's twin holds of a parameter.

    Args:
        dim: cut along it; None: the whole.
        drop: a bias of a sum, which the first rank alone adds.
    """

    dim: int | None = None
    drop: bool = False


def slice_of(name: str, rank: int) -> Slice:
    """Of a parameter of the families with a fused forward, by its name.

    A factor of LoRA is cut where it meets the cut side of its projection.
    """
    parts = name.split(".")
    if _VOCABULARY & set(parts):
        return Slice(0)
    layer = next((p for p in reversed(parts) if p in ROWS | COLUMNS), None)
    if layer is None:
        return Slice()
    rows = layer in ROWS
    if "lora_A" in parts:
        return Slice(None if rows else 1)
    if rows:
        return Slice(0)
    if "lora_B" in parts:
        return Slice()
    return Slice(drop=rank > 0) if parts[-1] == "bias" else Slice(1)


def why_not_tensor_parallel(module: nn.Module, twin: nn.Module, world: World) -> str | None:
    """None if each rank's shards are its tensor-parallel slices, otherwise why not.

    Args:
        module: sharded.
        twin: `twin_of` it before that.
        world: the ranks.
    """
    fault = why_not_fused(twin)
    if fault is not None:
        return fault
    config: Any = unwrapped(twin).config
    heads = config.num_attention_heads
    counts = {
        "attention heads": heads,
        "key/value heads": getattr(config, "num_key_value_heads", None) or heads,
        "columns of the MLP": config.intermediate_size,
    }
    for what, count in counts.items():
        if count % world.shards:
            return f"{count} {what} do not divide into {world.shards} shards"
    for name, part in named_parts(module).items():
        wanted = slice_of(name, 0).dim
        matrix = len(part.shape) > 1 and "lora_" not in name
        if matrix and wanted is not None and part.dim != wanted:
            found = "whole" if part.dim is None else f"cut along dim {part.dim}"
            return f"{name} is {found}, not cut along dim {wanted}"
    return None


class ShardAliases:
    """`Weights` over local shards where they lie, and over what was copied beside them.

    Args:
        places: name -> trained parameter and the address of its shard.
        copies: the rest.
    """

    def __init__(self, places: Mapping[str, tuple[nn.Parameter, int]], copies: TwinBuffers) -> None:
        self._places = places
        self._copies = copies

    def check(self) -> None:
        """See `Weights`."""
        moved = [n for n, (p, at) in self._places.items() if part_of(p).local.data_ptr() != at]
        if moved:
            raise GenerationError(
                "RF4031",
                f"{len(moved)} shards no longer lie where generation reads them",
                where=", ".join(moved[:3]),
                expected="a model that is not moved, cast or re-assigned after the engine was made",
                remedy="shard the model first, then make the engine",
            )
        self._copies.check()

    def concatenated(self, parameters: Sequence[Tensor]) -> Tensor | None:
        """See `Weights`."""
        return adjacent(parameters)

    def buffer(self, dtype: torch.dtype) -> Tensor:
        """See `TwinBuffers.buffer`."""
        return self._copies.buffer(dtype)

    @property
    def changes(self) -> int:
        """See `Weights`."""
        return self._copies.changes + sum(p._version for p, _ in self._places.values())


class TensorParallelView:
    """`WeightView` over slices.

    A shard is read where it lies if it has the type that generation reads and, of q|k|v and
    gate|up, lies beside the others. What does not (fp32 masters under bf16) is copied for each
    rollout, at the size of a slice and without a word between ranks. Vectors that are sharded all
    the same and the factors of LoRA, which are small, are gathered.

    Args:
        module: sharded, with `why_not_tensor_parallel` None.
        twin: of it; takes the slices.
        world: the ranks.
        reason: why this view.
    """

    name = "tp"
    lockstep = True

    def __init__(self, module: nn.Module, twin: nn.Module, world: World, reason: str) -> None:
        self.module, self.reason = twin, reason
        rank, shards = world.shard_rank, world.shards
        group = world.shard_mesh.get_group()
        vocabulary = unwrapped(twin).get_input_embeddings().weight.shape[0]
        self.parallel: TensorParallel | None = TensorParallel(group, rank, shards, vocabulary)
        self.gatherer = Gatherer(group, rank, shards)
        # (target, trained parameter) and, for what the ranks exchange, the dim of the slice.
        self._local: list[tuple[Tensor, nn.Parameter]] = []
        self._foreign: list[tuple[Tensor, nn.Parameter, int | None]] = []
        trained = dict(module.named_parameters(remove_duplicate=False))
        types = read_types(twin, trained)
        parts = {name: part_of(trained[name]) for name in types}
        where = {n for n, p in parts.items() if _lies_right(p, slice_of(n, rank), types[n])}
        where -= {n for g in groups(types) if not _side_by_side(g, parts) for n in g}
        places: dict[str, tuple[nn.Parameter, int]] = {}
        wanted: dict[str, tuple[Sequence[int], torch.dtype]] = {}
        for name, part in parts.items():
            piece = slice_of(name, rank)
            if piece.drop:
                owner, _, key = name.rpartition(".")
                twin.get_submodule(owner)._parameters[key] = None
            elif name in where:
                put(twin, name, part.local)
                places[name] = (trained[name], part.local.data_ptr())
            else:
                shape = list(part.shape)
                if piece.dim is not None:
                    shape[piece.dim] = part.span(piece.dim, rank, shards)[1]
                wanted[name] = (shape, types[name])
        self._copies = TwinBuffers(twin, wanted, world.device)
        self.weights: Weights = ShardAliases(places, self._copies)
        for name in wanted:
            target, piece = twin.get_parameter(name).data, slice_of(name, rank)
            if parts[name].dim == piece.dim:
                self._local.append((target, trained[name]))
            else:
                self._foreign.append((target, trained[name], piece.dim))
        _narrow(unwrapped(twin).config, shards)

    @property
    def nbytes(self) -> int:
        """See `WeightView`."""
        return self._copies.nbytes

    @contextmanager
    def reading(self) -> Iterator[None]:
        """See `WeightView`; shards that are read where they lie are not touched."""
        self._copies.restore()
        try:
            with torch.no_grad():
                for target, parameter in self._local:
                    target.copy_(part_of(parameter).local)
            self.gatherer.slices([(t, part_of(p), dim) for t, p, dim in self._foreign])
            yield
        finally:
            self._copies.release()

    def agreed(self, number: int) -> int:
        """See `WeightView`."""
        return self.gatherer.least(number)


def _lies_right(part: Part, piece: Slice, dtype: torch.dtype) -> bool:
    return part.dim == piece.dim and part.local.dtype is dtype


def _side_by_side(names: Sequence[str], parts: Mapping[str, Part]) -> bool:
    """Whether the shards of a fused projection are one piece of memory."""
    return adjacent([parts[name].local for name in names]) is not None


def _narrow(config: Any, shards: int) -> None:
    """Heads and columns of one slice; the width of a head stays."""
    heads = config.num_attention_heads
    config.head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    config.num_key_value_heads = (getattr(config, "num_key_value_heads", None) or heads) // shards
    config.num_attention_heads = heads // shards
    config.intermediate_size //= shards
