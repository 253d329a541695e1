"""Optimizer and learning-rate scheduler state as named tensors and JSON.

`torch.optim` numbers its parameters; here they go by name, so that a checkpoint does not depend on
the order in which a model happens to register them. Loading writes the state into the optimizer
directly: `Optimizer.load_state_dict` would cast every state tensor to its parameter's dtype, which
rounds the fp32 moments of bf16 weights.

The state of a sharded parameter is sharded as the parameter is, whether the optimizer steps
DTensors or a rank's shards as ordinary tensors: each rank stores and reads its shard. 8-bit moments
of shards are stored in fp32, because their blocks are those of one number of ranks; the ranks that
load make blocks of their own, to the bit if they are as many. Whole ones are stored as they are.
Other state in the layout of one rank could not be dealt anew, and is refused.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from rlhf_fast.adamw8bit import AdamW8bit, narrowed, widened
from rlhf_fast.distributed.dcp import fill
from rlhf_fast.distributed.eight_bit_state import without_blocks
from rlhf_fast.distributed.json_state import checked
from rlhf_fast.distributed.stored import Stored, StoredTensors
from rlhf_fast.errors import CheckpointError

_GROUPS = "param_groups"
# Bookkeeping that belongs to the live optimizer, not to its state.
_NOT_STORED = frozenset({"params", "param_names"})
# How a step is carried out, which the run that loads decides: the numbers do not depend on it.
_NOT_LOADED = frozenset({"foreach", "fused"})


def optimizer_state(
    optimizer: Optimizer,
    named_parameters: Iterable[tuple[str, Tensor]],
    whole_parameters: Iterable[tuple[str, Tensor]] | None = None,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Take an optimizer's state apart.

    Args:
        optimizer: any `torch.optim` optimizer whose per-parameter state holds tensors and plain
            values.
        named_parameters: names for at least the parameters that it updates.
        whole_parameters: the parameters of these names as the module has them, where the optimizer
            steps a rank's shards of DTensors as ordinary tensors.

    Returns:
        tensors: `<parameter>/<slot>` (`.../exp_avg`, `.../step`) and, for options that are tensors,
            `param_groups/<index>/<option>`. They alias the live state, where that is not in 8 bits
            and sharded; save before the next step.
        state: groups with their options and parameter names, and per parameter its slots.

    Raises:
        CheckpointError: an unnamed parameter (RF8005) or a value that cannot be stored (RF8004).
    """
    named = list(named_parameters)
    names = _names_by_parameter(optimizer, named)
    sharded = _sharded(named if whole_parameters is None else whole_parameters)
    tensors: dict[str, Tensor] = {}
    groups = []
    for index, group in enumerate(optimizer.param_groups):
        options = {}
        for key, value in group.items():
            if key in _NOT_STORED:
                continue
            if isinstance(value, Tensor):
                _add(tensors, f"{_GROUPS}/{index}/{key}", value)
            else:
                options[key] = checked(value, f"{_GROUPS}[{index}].{key}")
        listed = [names[parameter] for parameter in group["params"]]
        groups.append({"params": listed, "options": options})
    parameters = {}
    for parameter, slots in optimizer.state.items():
        name = names[parameter]
        if isinstance(optimizer, AdamW8bit) and name in sharded:
            slots = widened(slots)
        entry: dict[str, Any] = {"tensors": [], "values": {}}
        for key, value in slots.items():
            if isinstance(value, Tensor):
                full = f"{name}/{key}"
                _add(tensors, full, _as_sharded(full, value.detach(), sharded.get(name)))
                entry["tensors"].append(key)
            else:
                entry["values"][key] = checked(value, f"{name}/{key}")
        parameters[name] = entry
    kind = type(optimizer).__name__
    return tensors, {"optimizer": kind, "groups": groups, "parameters": parameters}


def load_optimizer_state(
    optimizer: Optimizer,
    named_parameters: Iterable[tuple[str, Tensor]],
    tensors: Mapping[str, Tensor],
    state: Mapping[str, Any],
    whole_parameters: Iterable[tuple[str, Tensor]] | None = None,
) -> None:
    """Put back what `optimizer_state` took out, bit for bit.

    Args:
        optimizer: same class, same parameter groups (each group the same names, in any order).
        named_parameters: as for `optimizer_state`.
        tensors: as saved; they are copied, `step` stays on the CPU unless the group is capturable
            or fused, everything else goes to its parameter's device, dtypes unchanged but for
            8-bit moments that shards had or get. Of a sharded parameter's moments a rank reads its
            shard.
        state: as saved.
        whole_parameters: as for `optimizer_state`.

    Raises:
        CheckpointError: another optimizer class, other groups or other shapes (RF8005); the
            optimizer is unchanged then.
    """
    saved_tensors = StoredTensors.of(tensors)
    named = list(named_parameters)
    names = _names_by_parameter(optimizer, named)
    sharded = _sharded(named if whole_parameters is None else whole_parameters)
    eight_bits = isinstance(optimizer, AdamW8bit)
    if eight_bits:
        saved_tensors, state = without_blocks(saved_tensors, state, sharded)
    _check_structure(optimizer, names, sharded, saved_tensors, state)
    fresh: dict[Tensor, dict[str, Any]] = {}
    room: dict[str, Tensor] = {}
    for group in optimizer.param_groups:
        on_device = bool(group.get("capturable")) or bool(group.get("fused"))
        for parameter in group["params"]:
            name = names[parameter]
            entry = state["parameters"].get(name)
            if entry is None:
                continue
            slots: dict[str, Any] = copy.deepcopy(entry["values"])
            on_host = eight_bits and "scale_m" not in entry["tensors"]
            for key in entry["tensors"]:
                full = f"{name}/{key}"
                away = on_host or (key == "step" and not on_device)
                device = torch.device("cpu") if away else parameter.device
                stored, like = saved_tensors.entries[full], sharded.get(name)
                room[full], slots[key] = _room(stored, like, device)
                if isinstance(parameter, DTensor):
                    slots[key] = room[full]
            fresh[parameter] = slots
    fill(room, StoredTensors({name: saved_tensors.entries[name] for name in room}))
    if eight_bits:
        fresh = {
            p: slots if "scale_m" in slots else narrowed(p, slots) for p, slots in fresh.items()
        }
    optimizer.state.clear()
    optimizer.state.update(fresh)
    for index, (group, saved) in enumerate(
        zip(optimizer.param_groups, state["groups"], strict=True)
    ):
        prefix = f"{_GROUPS}/{index}/"
        options = dict(saved["options"])
        options.update(
            {
                key.removeprefix(prefix): saved_tensors[key].clone()
                for key in saved_tensors
                if key.startswith(prefix)
            }
        )
        for key, value in options.items():
            if key not in _NOT_LOADED:
                group[key] = value


def _room(stored: Stored, like: DTensor | None, device: torch.device) -> tuple[Tensor, Tensor]:
    """What a stored tensor is read into, and what of it lies here: a shard, if `like` has one."""
    if like is None or not stored.shape:
        whole = torch.empty(stored.shape, dtype=stored.dtype, device=device)
        return whole, whole
    local = torch.empty(like.to_local().shape, dtype=stored.dtype, device=device)
    return _around(local, like), local


def _sharded(parameters: Iterable[tuple[str, Tensor]]) -> dict[str, DTensor]:
    return {name: p for name, p in parameters if isinstance(p, DTensor)}


def _around(local: Tensor, like: DTensor) -> DTensor:
    """A tensor sharded as `like` is, of which `local` is this rank's shard; no copy."""
    # `from_local` would bring moments that lie in host memory to the device.
    meta = TensorMeta(like.shape, like.stride(), local.dtype)
    spec = DTensorSpec(like.device_mesh, like.placements, tensor_meta=meta)
    return DTensor(local, spec, requires_grad=False)


def _as_sharded(name: str, value: Tensor, like: DTensor | None) -> Tensor:
    """A state tensor as a checkpoint stores it: sharded like its parameter, if that is."""
    if like is None or not value.dim():
        return value
    if isinstance(value, DTensor) and value.shape == like.shape:
        return value
    if not isinstance(value, DTensor) and value.shape == like.to_local().shape:
        return _around(value, like)
    raise CheckpointError(
        "RF8004",
        f"{name} cannot be stored: it is not sharded as its parameter is",
        where="optimizer state",
        expected="moments in the shape and placement of their parameter",
        remedy="use memory.optimizer=adamw",
    )


def scheduler_state(scheduler: LRScheduler) -> dict[str, Any]:
    """A scheduler's counters as plain values.

    Raises:
        CheckpointError: it carries something that is not a plain value (RF8004).
    """
    plain: dict[str, Any] = checked(dict(scheduler.state_dict()), "scheduler")
    return plain


def load_scheduler_state(scheduler: LRScheduler, state: Mapping[str, Any]) -> None:
    """Put back what `scheduler_state` returned.

    Raises:
        CheckpointError: it belongs to another kind of scheduler (RF8005).
    """
    current = set(scheduler.state_dict())
    if current != set(state):
        difference = ", ".join(sorted(current ^ set(state)))
        raise _mismatch(f"the saved scheduler has other fields: {difference}")
    scheduler.load_state_dict(copy.deepcopy(dict(state)))


def _names_by_parameter(
    optimizer: Optimizer, named_parameters: Iterable[tuple[str, Tensor]]
) -> dict[Tensor, str]:
    names = {parameter: name for name, parameter in named_parameters}
    if len(set(names.values())) != len(names):
        raise _mismatch("two parameters have the same name")
    updated = [p for group in optimizer.param_groups for p in group["params"]]
    unnamed = [tuple(p.shape) for p in updated if p not in names]
    if unnamed:
        raise _mismatch(f"{len(unnamed)} parameters of the optimizer have no name: {unnamed[:5]}")
    return names


def _add(tensors: dict[str, Tensor], key: str, value: Tensor) -> None:
    if key in tensors:
        raise _mismatch(f"two state tensors would be called {key!r}")
    tensors[key] = value.detach()


def _check_structure(
    optimizer: Optimizer,
    names: Mapping[Tensor, str],
    sharded: Mapping[str, DTensor],
    tensors: StoredTensors,
    state: Mapping[str, Any],
) -> None:
    kind = type(optimizer).__name__
    if state["optimizer"] != kind:
        raise _mismatch(f"the checkpoint holds {state['optimizer']} state, the run uses {kind}")
    live, saved = optimizer.param_groups, state["groups"]
    if len(live) != len(saved):
        raise _mismatch(f"{len(saved)} parameter groups were saved, the optimizer has {len(live)}")
    for index, (group, entry) in enumerate(zip(live, saved, strict=True)):
        here, there = {names[p] for p in group["params"]}, set(entry["params"])
        if here != there:
            missing, extra = sorted(here - there), sorted(there - here)
            raise _mismatch(
                f"group {index} differs: {len(missing)} not in the checkpoint {missing[:5]}, "
                f"{len(extra)} not in the optimizer {extra[:5]}"
            )
    parameters = {names[p]: p for group in live for p in group["params"]}
    for name, entry in state["parameters"].items():
        for key in entry["tensors"]:
            tensor = tensors.entries.get(f"{name}/{key}")
            if tensor is None:
                raise _mismatch(f"the checkpoint lacks {name}/{key}")
            shape = tuple(sharded.get(name, parameters[name]).shape)
            # Moments have the parameter's shape; scalars such as `step` have none.
            shaped = key.startswith("exp_avg") or name in sharded
            if tensor.shape and shaped and tensor.shape != shape:
                raise _mismatch(f"{name}/{key} has shape {tensor.shape}, the parameter {shape}")


def _mismatch(what: str) -> CheckpointError:
    return CheckpointError(
        "RF8005",
        what,
        where="optimizer state",
        expected="the optimizer that the checkpoint was saved from",
        remedy="resume with the configuration of the saved run",
    )
