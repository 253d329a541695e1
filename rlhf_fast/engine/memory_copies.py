"""Bytes of what the fused path copies for a rollout, from sizes alone.

    weights   2 bytes an fp32 parameter if products run in bf16, of the whole flat buffer
    adapters  A and B of each product of a block in the type of the products: R inputs and R outputs
              values, R the rank times the adapted projections of the product

See `compute_weights` and `fused_adapters`, which make them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from rlhf_fast.engine.fused_support import COMPUTE
from rlhf_fast.engine.memory_activations import DecoderShape
from rlhf_fast.engine.memory_models import RolePlan
from rlhf_fast.engine.weights import flat_numel
from rlhf_fast.models.forward import compute_dtype


def weight_copies(module: Any) -> int:
    """Of the parameters of a model that the fused forward knows; it may be on the meta device."""
    compute = COMPUTE[compute_dtype(module)]
    if compute is torch.float32:
        return 0
    products = (layer for layer in module.modules() if isinstance(layer, nn.Linear))
    if all(p.dtype is compute for layer in products for p in layer.parameters()):
        return 0
    return flat_numel(module, torch.float32) * compute.itemsize


def adapter_copies(actor: RolePlan, module: Any) -> int:
    """Of the adapter that the model generates with; 0 without one."""
    shape = DecoderShape.of(module.config)
    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    products = (
        (("q_proj", "k_proj", "v_proj"), shape.width, q + 2 * kv),
        (("o_proj",), q, shape.width),
        (("gate_proj", "up_proj"), shape.width, 2 * shape.inner),
        (("down_proj",), shape.inner, shape.width),
    )
    values = sum(
        actor.rank * sum(name in actor.adapted for name in names) * (inputs + outputs)
        for names, inputs, outputs in products
    )
    return shape.layers * values * COMPUTE[compute_dtype(module)].itemsize
