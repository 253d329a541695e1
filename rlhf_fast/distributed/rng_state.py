"""Random number generators as tensors and JSON, without pickle.

Covers what a training process can draw from: torch's default CPU and CUDA generators, Python's and
NumPy's global ones, and any named generator of the three libraries.

Ranks draw alike: the state of rank 0 is what a checkpoint holds, and what every rank of a resumed
run begins with, however many there are. A run on GPUs has one CUDA generator, that of the device it
computes on: it goes on where more, fewer or none are visible.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlhf_fast.distributed.json_state import checked
from rlhf_fast.errors import CheckpointError

NamedGenerator = torch.Generator | random.Random | np.random.Generator

_ARRAY = "$array"


def rng_state(
    generators: Mapping[str, NamedGenerator] | None = None,
    *,
    device: torch.device | None = None,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Capture the global generators and the named ones.

    Args:
        generators: name -> generator that the caller owns.
        device: where the run computes; of a GPU its generator alone is captured. None, or the CPU:
            those of all visible devices, which something beside the run may draw from.

    Returns:
        tensors (`torch`, `cuda/<i>`, `python`, `numpy/...`, `named/<name>...`) and a JSON tree.

    Raises:
        CheckpointError: a generator of an unknown kind (RF8006).
    """
    tensors: dict[str, Tensor] = {"torch": torch.get_rng_state()}
    cuda: list[Tensor] = []
    gpu = device if device is not None and device.type == "cuda" else None
    if torch.cuda.is_initialized():
        cuda = torch.cuda.get_rng_state_all() if gpu is None else [torch.cuda.get_rng_state(gpu)]
    for index, value in enumerate(cuda):
        tensors[f"cuda/{index}"] = value
    state: dict[str, Any] = {
        "cuda_devices": len(cuda),
        **({} if gpu is None else {"one_device": True}),
        "python": _python_state(random.getstate(), "python", tensors),
        "numpy": _split_arrays(
            np.random.get_state(legacy=False),  # noqa: NPY002 - user code may draw from it
            "numpy",
            tensors,
        ),
        "named": {},
    }
    for name, generator in (generators or {}).items():
        state["named"][name] = _generator_state(name, generator, tensors)
    return tensors, state


def load_rng_state(
    tensors: Mapping[str, Tensor],
    state: Mapping[str, Any],
    generators: Mapping[str, NamedGenerator] | None = None,
    *,
    device: torch.device | None = None,
) -> None:
    """Put every generator back to where `rng_state` found it.

    Args:
        tensors, state: as saved.
        generators: as saved.
        device: where the run computes; a GPU gets what was saved of the run's, or the first of all.
            None asks for all that was saved.

    Raises:
        CheckpointError: other names or kinds of generators than were saved, or no CUDA devices for
            those that were (RF8006); nothing is changed then.
    """
    given = dict(generators or {})
    _check_same(given, state)
    targets = _cuda_targets(state, device)
    # Clone: the tensors may be views of a memory map.
    torch.set_rng_state(tensors["torch"].clone())
    for name, target in targets:
        torch.cuda.set_rng_state(tensors[name].clone(), target)
    random.setstate(_python_tuple(state["python"], "python", tensors))
    np.random.set_state(_join_arrays(state["numpy"], tensors))  # noqa: NPY002
    for name, generator in given.items():
        saved = state["named"][name]
        key = f"named/{name}"
        if isinstance(generator, torch.Generator):
            generator.set_state(tensors[key].clone())
        elif isinstance(generator, random.Random):
            generator.setstate(_python_tuple(saved["state"], key, tensors))
        else:
            generator.bit_generator.state = _join_arrays(saved["state"], tensors)


def _check_same(given: Mapping[str, NamedGenerator], state: Mapping[str, Any]) -> None:
    here = {name: _kind(name, generator) for name, generator in given.items()}
    there = {name: entry["kind"] for name, entry in state["named"].items()}
    if here != there:
        raise _mismatch(f"generators {there} were saved, the run has {here}")


def _cuda_targets(
    state: Mapping[str, Any], device: torch.device | None
) -> list[tuple[str, torch.device]]:
    """(name of a saved CUDA generator, device that gets it)."""
    saved, one = int(state["cuda_devices"]), "one_device" in state
    here = torch.cuda.device_count() if saved else 0
    if not one and saved == here:
        return [(f"cuda/{index}", torch.device("cuda", index)) for index in range(saved)]
    if here and device is not None and device.type == "cuda":
        return [("cuda/0", device)]
    if one and here:
        return [("cuda/0", torch.device("cuda"))]
    if one and device is not None:  # the run goes on without a GPU
        return []
    raise _mismatch(f"{saved} CUDA generators were saved, the machine has {here} devices")


def _kind(name: str, generator: Any) -> str:
    if isinstance(generator, torch.Generator):
        return f"torch {generator.device.type}"
    if isinstance(generator, random.Random):
        return "python"
    if isinstance(generator, np.random.Generator):
        return f"numpy {type(generator.bit_generator).__name__}"
    raise _mismatch(f"generator {name!r} is a {type(generator).__name__}")


def _generator_state(name: str, generator: Any, tensors: dict[str, Tensor]) -> dict[str, Any]:
    key = f"named/{name}"
    kind = _kind(name, generator)
    if isinstance(generator, torch.Generator):
        tensors[key] = generator.get_state()
        return {"kind": kind}
    if isinstance(generator, random.Random):
        return {"kind": kind, "state": _python_state(generator.getstate(), key, tensors)}
    return {"kind": kind, "state": _split_arrays(generator.bit_generator.state, key, tensors)}


def _python_state(value: Any, key: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    version, words, gauss = value
    tensors[key] = torch.tensor(words, dtype=torch.int64)
    return {"version": version, "gauss": gauss}


def _python_tuple(saved: Mapping[str, Any], key: str, tensors: Mapping[str, Tensor]) -> Any:
    return (saved["version"], tuple(tensors[key].tolist()), saved["gauss"])


def _split_arrays(value: Any, key: str, tensors: dict[str, Tensor]) -> Any:
    """Move the arrays of a NumPy state into `tensors`; leave their key and dtype in their place."""
    if isinstance(value, Mapping):
        return {name: _split_arrays(item, f"{key}/{name}", tensors) for name, item in value.items()}
    if isinstance(value, np.ndarray):
        # NumPy keeps its words unsigned; the same bits travel as bytes.
        tensors[key] = torch.from_numpy(np.frombuffer(value.tobytes(), dtype=np.uint8).copy())
        return {_ARRAY: key, "dtype": value.dtype.str}
    return checked(value, key)


def _join_arrays(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if not isinstance(value, Mapping):
        return value
    if _ARRAY in value:
        raw = tensors[value[_ARRAY]].numpy().tobytes()
        return np.frombuffer(raw, dtype=np.dtype(value["dtype"])).copy()
    return {name: _join_arrays(item, tensors) for name, item in value.items()}


def _mismatch(what: str) -> CheckpointError:
    return CheckpointError(
        "RF8006",
        what,
        where="random number generator state",
        expected="the generators of the saved run",
        remedy="resume on the same kind of machine with the same configuration",
    )
