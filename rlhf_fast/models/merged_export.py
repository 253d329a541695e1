"""An adapter merged into a sharded trunk, as files, without a merged model ever existing.

`SharedTrunk.merged` copies the whole trunk; here each merged weight is gathered, summed and written
before the next. The bytes are the same.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from rlhf_fast.distributed.world import World
from rlhf_fast.models.adapters import AdapterModule, SharedTrunk, base_tensors
from rlhf_fast.models.dropout import remember_dropout
from rlhf_fast.models.export import export_gathered
from rlhf_fast.models.heads import get_calibration, set_calibration
from rlhf_fast.models.loading import classifier_over
from rlhf_fast.models.sharded_export import (
    GatheredWeights,
    LazyTensor,
    lazily,
    own_weights,
    whole,
)

_HEAD = "score.weight"


def export_merged(
    module: AdapterModule, tokenizer: Any, directory: str | Path, world: World
) -> Path:
    """Write the full model that a role is: the trunk with its adapter merged, and its scalar head.

    Args:
        module: the role's parameters on its trunk, sharded or not.
        tokenizer: the trunk's; not changed.
        directory: where to; replaced if it is a model directory.
        world: the ranks that hold the module, each of which calls this; rank 0 writes.

    Returns:
        The directory.

    Raises:
        ModelError, EnvironmentFault: as `export_model`.
    """
    assert module.name is not None
    weights = _merged_weights(module.trunk, module.name)
    shell = _shell(module.trunk.model)
    score = getattr(module, "score", None)
    if score is not None:
        outputs, inputs = score.weight.shape
        head = nn.Linear(inputs, outputs, bias=False, device="meta")
        shell = classifier_over(shell, head)
        calibration = get_calibration(module)
        set_calibration(shell, calibration.gain, calibration.bias)
        weights[_HEAD] = lazily(score.weight)
    kept = {name: weights[name] for name in own_weights(shell)}
    return export_gathered(shell, GatheredWeights(shell, kept), tokenizer, directory, world)


def _shell(model: Any) -> Any:
    """The trunk's architecture in fp32 without weights, and without adapters."""
    with torch.device("meta"):
        shell = AutoModelForCausalLM.from_config(copy.deepcopy(model.config), dtype=torch.float32)
    shell.generation_config = copy.deepcopy(model.generation_config)
    remember_dropout(shell, model)
    return shell


def _merged_weights(trunk: SharedTrunk, name: str) -> dict[str, LazyTensor]:
    """fp32 weights of the base model by its own names, with the adapter `name` in them."""
    layers = dict(trunk.named_layers())
    found = {}
    for key, tensor in base_tensors(trunk.model).items():
        layer = layers.get(key.removesuffix(".weight"))
        adapted = layer is not None and key.endswith(".weight") and name in layer.lora_A

        def gather(tensor: Tensor = tensor, layer: Any = layer if adapted else None) -> Tensor:
            base = whole(tensor).to("cpu", torch.float32, copy=True)
            return base if layer is None else base.add_(_delta(layer, name))

        found[key] = LazyTensor(torch.float32, tuple(tensor.shape), gather)
    return found


def _delta(layer: Any, name: str) -> Tensor:
    """What peft's `get_delta_weight` returns, of matrices that may be sharded; fp32, on the CPU."""
    a, b = whole(layer.lora_A[name].weight), whole(layer.lora_B[name].weight)
    delta = b @ a
    if layer.fan_in_fan_out:
        delta = delta.T
    return (delta * layer.scaling[name]).float().cpu()
