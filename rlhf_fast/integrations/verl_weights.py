"""Weights that verl's trainer writes where a server in another process reads them.

The server lays its module's parameters out in flat buffers that a second process can map: anonymous
shared memory on a CPU, CUDA's inter-process handles on a GPU. The trainer's worker maps them and
copies each tensor that its engine exports into its place: one copy, no buffer between.
"""

from __future__ import annotations

import importlib
import inspect
import os
from collections.abc import AsyncIterable, AsyncIterator, Collection, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_fast.engine.weights import AliasedWeights
from rlhf_fast.errors import EnvironmentFault
from rlhf_fast.integrations.verl_options import refuse


@dataclass(frozen=True)
class Place:
    """Where a parameter lies.

    Args:
        buffer: name of the type of its flat buffer.
        offset: elements before it.
        shape: its own.
    """

    buffer: str
    offset: int
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Places:
    """What another process on the same machine needs to write the weights.

    Args:
        buffers: name of a type -> handle of its flat buffer.
        parameters: name of a parameter -> its place; tied ones under all their names.
    """

    buffers: Mapping[str, Any]
    parameters: Mapping[str, Place]

    def mapped(self) -> dict[str, Tensor]:
        """Every parameter by its names, in the memory of the process that made this."""
        buffers = {name: _mapped(handle) for name, handle in self.buffers.items()}
        return {
            name: buffers[p.buffer][p.offset :][: torch.Size(p.shape).numel()].view(p.shape)
            for name, p in self.parameters.items()
        }


class SharedWeights:
    """The parameters of a module, in memory that another process can map.

    Args:
        module: on a CPU; its parameters and buffers move to `device`.
        device: where it generates.

    Raises:
        EnvironmentFault: RF7331, the module has weights that are no parameters.
    """

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        extra = sorted(set(module.state_dict()) - _names(module))
        if extra:
            refuse([f"a model whose buffers are weights ({', '.join(extra[:3])})"])
        self._device = device
        self._files: dict[torch.dtype, int] = {}
        self._views = AliasedWeights.of(module, allocate=self._allocate)
        module.to(device)  # buffers; parameters are there
        self._module = module

    def _allocate(self, count: int, dtype: torch.dtype) -> Tensor:
        if self._device.type != "cpu":
            return torch.empty(count, dtype=dtype, device=self._device)
        # Named by nothing but this process: it leaves nothing behind, however the process ends.
        file = self._files[dtype] = os.memfd_create("rlhf_fast_weights")
        return torch.from_file(f"/proc/self/fd/{file}", shared=True, size=count, dtype=dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of all parameters."""
        return self._views.nbytes

    def places(self) -> Places:
        """For the process that writes them; good until `give_up`."""
        buffers, parameters = {}, {}
        for dtype, buffer in self._views.buffers.items():
            if self._device.type == "cpu":
                buffers[str(dtype)] = (os.getpid(), self._files[dtype], len(buffer), dtype)
            else:
                reductions = importlib.import_module("torch.multiprocessing.reductions")
                buffers[str(dtype)] = reductions.reduce_tensor(buffer)
        for name, parameter in self._module.named_parameters(remove_duplicate=False):
            offset = int(parameter.storage_offset())
            parameters[name] = Place(str(parameter.dtype), offset, tuple(parameter.shape))
        return Places(buffers, parameters)

    def give_up(self) -> bool:
        """Give a device its memory back; false: the weights are kept, as on a CPU."""
        if self._device.type == "cpu":
            return False
        self._views.give_up()
        torch.cuda.ipc_collect()  # what the worker has mapped and left
        torch.cuda.empty_cache()
        return True

    def allocate_again(self) -> None:
        """After `give_up`: memory for weights that are still to come."""
        self._views.allocate_again()


def _names(module: nn.Module) -> set[str]:
    return {name for name, _ in module.named_parameters(remove_duplicate=False)}


def _mapped(handle: Any) -> Tensor:
    """A flat buffer of another process."""
    if len(handle) == 4:
        process, file, count, dtype = handle
        return torch.from_file(f"/proc/{process}/fd/{file}", shared=True, size=count, dtype=dtype)
    rebuild, arguments = handle
    bound = inspect.signature(rebuild).bind(*arguments)
    # The same device may have another number in the process that made it.
    bound.arguments["storage_device"] = torch.cuda.current_device()
    mapped: Tensor = rebuild(*bound.args)
    return mapped


def build_module(model_config: Any, dtype_name: str) -> nn.Module:
    """A module of an architecture that transformers has, on a CPU, its weights still to come.

    Args:
        model_config: verl's `HFModelConfig`.
        dtype_name: of the weights, as `rollout.dtype` has it.
    """
    from transformers import AutoModelForCausalLM

    dtype = importlib.import_module("verl.utils.torch_dtypes").PrecisionType.to_dtype(dtype_name)
    initialization = importlib.import_module("transformers.initialization")
    no_init: Any = getattr(initialization, "no_init_weights", nullcontext)
    with no_init():  # random numbers for billions of weights take minutes, and nobody reads them
        # Attention is ours; what the trainer's asks for may not be installed here.
        module = AutoModelForCausalLM.from_config(
            model_config.hf_config, dtype=dtype, attn_implementation="eager"
        )
    module.tie_weights()
    named = getattr(model_config, "generation_config", None)
    if named is not None:
        module.generation_config = named
    module.requires_grad_(False).eval()
    return module


async def copy_weights(
    targets: Mapping[str, Tensor], weights: Any, optional: Collection[str] = ()
) -> None:
    """Copy every named tensor into its target.

    Args:
        targets: tensors by name, tied ones under all their names.
        weights: (name, tensor) pairs, an iterable or an asynchronous one.
        optional: names that need not come.

    Raises:
        EnvironmentFault: RF7332, a name or a shape that is not among the targets, or a target that
            nothing came for; what was copied until then stays.
    """
    waiting = {_key(tensor) for name, tensor in targets.items() if name not in optional}
    with torch.no_grad():
        async for name, tensor in _each(weights):
            target = targets.get(name)
            if target is None or target.shape != tensor.shape:
                raise misfit(f"{name} of shape {list(tensor.shape)}")
            target.copy_(tensor)
            waiting.discard(_key(target))
    missing = {_key(tensor): name for name, tensor in targets.items() if _key(tensor) in waiting}
    if missing:
        raise misfit(f"nothing for {', '.join(missing.values())}")


def _key(tensor: Tensor) -> tuple[int, tuple[int, ...]]:
    return tensor.data_ptr(), tuple(tensor.shape)


async def _each(weights: Any) -> AsyncIterator[tuple[str, Tensor]]:
    if isinstance(weights, AsyncIterable):
        async for pair in weights:
            yield pair
    else:
        for pair in weights:
            yield pair


def misfit(what: str) -> EnvironmentFault:
    """Weights and module do not belong together."""
    return EnvironmentFault(
        "RF7332",
        f"weights that do not fit the rollout's module: {what}",
        expected="every parameter under its name in the model of transformers",
        remedy="check model.path and the names that the training engine exports",
    )


def require_full_weights(wire_format: str, options: Mapping[str, Any]) -> None:
    """Refuse updates that are not named tensors of the whole model.

    Raises:
        EnvironmentFault: RF7331.
    """
    faults = [] if wire_format == "named_tensors" else [f"wire_format={wire_format!r}"]
    if options.get("peft_config") is not None:
        faults.append("the weights of adapters alone; use model.lora.merge=True")
    refuse(faults)


def device_here() -> torch.device:
    """Where this process generates."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
