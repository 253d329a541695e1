"""Module weights as named tensors, tied ones stored once.

Loading copies into the existing storages and never replaces a tensor: optimizers, weight views of
the generator and tied modules all hold references to them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

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
    first: dict[tuple[object, ...], str] = {}
    for name, value in module.state_dict().items():
        check_storable(name, value)
        place = _place(value)
        if value.numel() and place in first:
            aliases[name] = first[place]
        else:
            first[place] = name
            tensors[name] = value
    return tensors, aliases


def load_module_tensors(
    module: nn.Module, tensors: Mapping[str, Tensor], aliases: Mapping[str, str] | None = None
) -> None:
    """Copy saved weights into a module, in place.

    Args:
        module: a module with the same state dict names, shapes and dtypes.
        tensors: as returned by `module_tensors`, or a lazily read file of them.
        aliases: as returned by `module_tensors`.

    Raises:
        CheckpointError: names, shapes or dtypes differ, or weights that are tied here were saved
            with different values (RF8007); the module is unchanged then.
    """
    sources = {name: name for name in tensors} | dict(aliases or {})
    targets = module.state_dict()
    dangling = [name for name, source in sources.items() if source not in tensors]
    problems = [
        *_listed("missing in the checkpoint", sorted(set(targets) - set(sources))),
        *_listed("unexpected in the checkpoint", sorted(set(sources) - set(targets))),
        *_listed("stored as an alias of nothing", sorted(dangling)),
    ]
    if not problems:
        differing = [
            f"{name}: saved {_shape(tensors[source])}, model {_shape(targets[name])}"
            for name, source in sources.items()
            if _shape(tensors[source]) != _shape(targets[name])
        ]
        problems = [*_listed("of another shape or dtype", differing)]
    if not problems:
        broken = _broken_ties(targets, sources, tensors)
        problems = [*_listed("tied in the model but not equal", broken)]
    if problems:
        raise CheckpointError(
            "RF8007",
            "the saved weights do not fit the model: " + "; ".join(problems),
            where=type(module).__name__,
            expected="the architecture and dtype of the saved run",
            remedy="resume with the model that the checkpoint was saved from",
        )
    with torch.no_grad():
        for name, source in sources.items():
            targets[name].copy_(tensors[source])


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


def _place(tensor: Tensor) -> tuple[object, ...]:
    return (tensor.data_ptr(), tensor.device, tensor.dtype, tensor.shape, tensor.stride())


def _shape(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


def _listed(what: str, names: list[str]) -> list[str]:
    if not names:
        return []
    more = ", ..." if len(names) > _SHOWN else ""
    return [f"{len(names)} {what} ({', '.join(names[:_SHOWN])}{more})"]


def _broken_ties(
    targets: Mapping[str, Tensor], sources: Mapping[str, str], tensors: Mapping[str, Tensor]
) -> list[str]:
    first: dict[tuple[object, ...], str] = {}
    broken = []
    for name, target in targets.items():
        if not target.numel():
            continue
        other = first.setdefault(_place(target), name)
        same = sources[name] == sources[other]
        if not same and not torch.equal(tensors[sources[name]], tensors[sources[other]]):
            broken.append(f"{other} and {name}")
    return broken
