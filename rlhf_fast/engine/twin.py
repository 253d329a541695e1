"""A second module of the same structure, whose parameters are others.

Sharded parameters cannot be generated from as they lie in the trained module: its forward would
gather every layer for every token, and all ranks would have to take the same steps. A twin is
the same tree of layers, adapters and settings, with parameters of its own (slices or gathered
weights) that training does not know of.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn


def twin_of(module: nn.Module) -> nn.Module:
    """A copy of a module's structure with every parameter on the meta device.

    Buffers (rotary frequencies) and settings are copied; tied parameters stay tied.

    Args:
        module: a causal LM, or a peft wrapper around one; before it is sharded, whose hooks are of
            no use here.
    """
    memo: dict[int, object] = {}
    for parameter in module.parameters():
        meta = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
        memo[id(parameter)] = meta
    twin = copy.deepcopy(module, memo)
    return twin.eval().requires_grad_(False)


def put(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Give the module another parameter of this name; under its other names too, where tied."""
    former = module.get_parameter(name)
    replaced = nn.Parameter(tensor, requires_grad=False)
    for part in module.modules():
        for key, parameter in part._parameters.items():
            if parameter is former:
                part._parameters[key] = replaced


def room(
    shape: Sequence[int], dtype: torch.dtype, device: torch.device, *, now: bool = True
) -> Tensor:
    """A tensor without values; `now` false: without memory as well, for `AliasedWeights`."""
    with torch.inference_mode(False):
        tensor = torch.empty(tuple(shape), dtype=dtype, device=device)
    if not now:
        tensor.untyped_storage().resize_(0)
    return tensor
