"""Module weights as named tensors, tied ones stored once; sharded modules give DTensors.

Loading copies into the existing storages and never replaces a tensor: optimizers, weight views of
the generator and tied modules all hold references to them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from rlhf_fast.distributed.dcp import fill
from rlhf_fast.distributed.stored import Stored, StoredTensors
from rlhf_fast.distributed.tensor_file import check_storable
from rlhf_fast.errors import CheckpointError

_SHOWN = 5


def module_tensors(module: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Parameters and persistent buffers by name.

    Returns:
        tensors: one entry per distinct tensor, under the first of its names; they alias the live
            weights.
        aliases: further name -> the name its tensor is stored under.

    Raises:
        CheckpointError: an entry of the state dict that is not a dense tensor (RF8004).
    """
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[object, str] = {}
    for name, value in module.state_dict(keep_vars=True).items():
        check_storable(name, value)
        known = next((first[key] for key in _identities(value) if key in first), None)
        if known is not None:
            aliases[name] = known
            continue
        first.update(dict.fromkeys(_identities(value), name))
        tensors[name] = value.detach()
    return tensors, aliases


def load_module_tensors(
    module: nn.Module, tensors: Mapping[str, Tensor], aliases: Mapping[str, str] | None = None
) -> None:
    """Copy saved weights into a module, in place. Of a sharded tensor each rank reads its shard.

    Args:
        module: a module with the same state dict names, shapes (sharded: whole ones) and dtypes.
        tensors: as returned by `module_tensors`, or a lazily read file of them.
        aliases: as returned by `module_tensors`.

    Raises:
        CheckpointError: names, shapes or dtypes differ, or weights that are tied here were saved
            with different values (RF8007); the module is unchanged then.
    """
    saved = StoredTensors.of(tensors)
    sources = {name: name for name in saved} | dict(aliases or {})
    targets = module.state_dict(keep_vars=True)
    dangling = [name for name, source in sources.items() if source not in saved]
    problems = [
        *_listed("missing in the checkpoint", sorted(set(targets) - set(sources))),
        *_listed("unexpected in the checkpoint", sorted(set(sources) - set(targets))),
        *_listed("stored as an alias of nothing", sorted(dangling)),
    ]
    if not problems:
        differing = [
            f"{name}: saved {_shape(saved.entries[source])}, model {_shape(targets[name])}"
            for name, source in sources.items()
            if _shape(saved.entries[source]) != _shape(targets[name])
        ]
        problems = [*_listed("of another shape or dtype", differing)]
    if not problems:
        broken = _broken_ties(targets, sources, saved)
        problems = [*_listed("tied in the model but not equal", broken)]
    if problems:
        raise CheckpointError(
            "RF8007",
            "the saved weights do not fit the model: " + "; ".join(problems),
            where=type(module).__name__,
            expected="the architecture and dtype of the saved run",
            remedy="resume with the model that the checkpoint was saved from",
        )
    fill(targets, saved.renamed(sources))


def require_same_frozen(path: Path, saved: Mapping[str, str], here: Mapping[str, str]) -> None:
    """Check weights that no checkpoint holds, because nothing trains them, by their digests.

    Args:
        path: the checkpoint.
        saved: name -> SHA-256 as the checkpoint was written.
        here: the same of the run that wants to go on.

    Raises:
        CheckpointError: they differ (RF8008).
    """
    differing = sorted(n for n in saved.keys() | here.keys() if saved.get(n) != here.get(n))
    if differing:
        raise CheckpointError(
            "RF8008",
            f"the {', '.join(differing)} of this run is not the one the checkpoint belongs to",
            where=str(path),
            expected=", ".join(f"{n} with SHA-256 {saved.get(n, 'of nothing')}" for n in differing),
            remedy="resume with the model that the run was started from",
        )


def _identities(tensor: Tensor) -> list[object]:
    """What two names of one tensor have in common: the object, or the very same memory."""
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    if not local.numel():  # a rank whose shard is empty
        return [id(tensor)] if tensor.numel() else []
    place = (local.data_ptr(), local.device, local.dtype, local.shape, local.stride())
    return [id(tensor), (place, tensor.shape)]


def _shape(tensor: Tensor | Stored) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


def _listed(what: str, names: list[str]) -> list[str]:
    if not names:
        return []
    more = ", ..." if len(names) > _SHOWN else ""
    return [f"{len(names)} {what} ({', '.join(names[:_SHOWN])}{more})"]


def _broken_ties(
    targets: Mapping[str, Tensor], sources: Mapping[str, str], tensors: Mapping[str, Tensor]
) -> list[str]:
    first: dict[object, str] = {}
    broken = []
    for name, target in targets.items():
        keys = _identities(target)
        other = next((first[key] for key in keys if key in first), name)
        first.update({key: name for key in keys if key not in first})
        same = sources[name] == sources[other]
        if not same and not torch.equal(tensors[sources[name]], tensors[sources[other]]):
            broken.append(f"{other} and {name}")
    return broken
