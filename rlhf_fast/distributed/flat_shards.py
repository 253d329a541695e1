"""The shards of one block back to back in one buffer per dtype, where they stay.

FSDP allocates each shard by itself. Here they move once, before training, so that projections of
one input lie side by side: a fused product reads q|k|v of a rank as one view of the bytes that the
optimizer writes. Every other evenly cut parameter lies in the same buffer.

FSDP keeps the tensors it is handed by `load_state_dict(assign=True)`, as long as they need no
padding. What is cut unevenly therefore stays where FSDP put it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from rlhf_fast.distributed.placement import ADJACENT, projection

# Groups start on a cache line and on a vector of any width; GPU products want 16 bytes.
ALIGNMENT_BYTES = 256


@dataclass(frozen=True)
class FlatShards:
    """Where the shards of a block lie.

    Args:
        buffers: one a dtype, 1-D, on the rank's device.
        names: of the parameters in them, in their order, as the block calls them.
    """

    buffers: Mapping[torch.dtype, Tensor]
    names: tuple[str, ...]


def lay_flat(block: nn.Module) -> FlatShards:
    """Move the evenly cut shards of a block that `fully_shard` has cut, before its first forward.

    Parameters are new objects afterwards; optimizers come later.
    """
    even: dict[str, Any] = {n: p for n, p in block.named_parameters() if _is_even(p)}
    buffers: dict[torch.dtype, Tensor] = {}
    names: list[str] = []
    moved: dict[str, Any] = {}
    with torch.no_grad():
        for dtype in dict.fromkeys(p.dtype for p in even.values()):
            locals_ = {n: p.to_local() for n, p in even.items() if p.dtype == dtype}
            groups = list(_groups(locals_))
            sizes = [_padded_numel([locals_[name] for name in group]) for group in groups]
            buffer = next(iter(locals_.values())).new_zeros(sum(sizes))
            for group, part in zip(groups, buffer.split(sizes), strict=True):
                start = 0
                for name in group:
                    local = locals_[name]
                    view = part[start : start + local.numel()].view(local.shape).copy_(local)
                    moved[name] = around(view, even[name])
                    start += local.numel()
                names += group
            buffers[dtype] = buffer
    # In one call: FSDP looks at its parameters again after it.
    block.load_state_dict(moved, strict=False, assign=True)
    return FlatShards(buffers, tuple(names))


def adjacent(tensors: Sequence[Tensor]) -> Tensor | None:
    """[sum of rows, ...] view over tensors that lie side by side; None if they do not."""
    first = tensors[0]
    end = first.data_ptr()
    for tensor in tensors:
        alike = tensor.dtype == first.dtype and tensor.shape[1:] == first.shape[1:]
        if tensor.data_ptr() != end or not alike:
            return None
        end += tensor.numel() * tensor.itemsize
    shape = (sum(t.shape[0] for t in tensors), *first.shape[1:])
    return first.detach().as_strided(shape, first.stride(), first.storage_offset())


def _is_even(parameter: Tensor) -> bool:
    if not isinstance(parameter, DTensor):
        return False
    placement: Any = parameter.placements[-1]
    return parameter.shape[placement.dim] % parameter.device_mesh.size(-1) == 0


def _groups(tensors: Mapping[str, Tensor]) -> Iterator[list[str]]:
    """All names once: those that must lie side by side together, in the order of ADJACENT."""
    by_place = {_place(name): name for name in tensors}
    left = dict.fromkeys(tensors)
    for name in tensors:
        if name not in left:
            continue
        part, layer, kind = _place(name)
        together = next((names for names in ADJACENT if layer in names), ())
        found = [by_place.get((part, other, kind)) for other in together]
        group = [member for member in found if member is not None]
        if len(group) < 2 or len(group) < len(together):
            group = [name]
        for member in group:
            del left[member]
        yield group


def _place(name: str) -> tuple[str, str, str]:
    """(what the layer is part of, layer, weight or bias) of a parameter's name."""
    layer = projection(f".{name}")
    return name.partition(f"{layer}.")[0], layer, name.rpartition(".")[2]


def _padded_numel(tensors: Sequence[Tensor]) -> int:
    step = ALIGNMENT_BYTES // tensors[0].itemsize
    return -(-sum(t.numel() for t in tensors) // step) * step


def around(local: Tensor, like: DTensor) -> DTensor:
    """A DTensor cut as `like` is, with `local` as this rank's part; no copy, no communication."""
    return DTensor.from_local(
        local,
        like.device_mesh,
        like.placements,
        run_check=False,
        shape=like.shape,
        stride=like.stride(),
    )
