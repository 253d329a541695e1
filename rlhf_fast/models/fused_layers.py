"""Layers of Llama, Mistral, Qwen2 and Qwen3 with our ops in place of their element-wise parts.

transformers computes RMSNorm, rotation and SwiGLU operation by operation, each of them a pass over
the activations and another in backward. On a CPU in fp32 those passes take a quarter of a packed
forward and backward; inside `packed_attention_mode` the modules' `forward` is ours, with the same
parameters, projections (adapters and hooks included) and numbers up to rounding. Outside it, and
for a class that is not transformers' own, the model is stock.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_fast_kernels import dispatch
from rlhf_fast_kernels.layer_ops import rotary, swiglu, trained_rms_norm

FUSED_FAMILIES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
OPS = ("swiglu", "rotary", "trained_rms_norm")

# An attention implementation as transformers calls it.
Attend = Callable[..., tuple[Tensor, Any]]
FusedLayers = tuple[tuple[nn.Module, Any], ...]


def fused_layers(module: nn.Module, attend: Attend) -> FusedLayers:
    """(layer, its forward of ours) of all layers that have one; empty where it does not pay.

    Args:
        module: a Hugging Face model.
        attend: the attention implementation that the layers' config names now.
    """
    config: Any = getattr(module, "config", None)
    family = FUSED_FAMILIES.get(getattr(config, "model_type", ""))
    parameter = next(module.parameters(), None)
    if family is None or parameter is None:
        return ()
    # Streamed weights lie on the host while a GPU computes: its autocast counts too.
    if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
        return ()
    if any(dispatch.choose(op, None, parameter).impl == "reference" for op in OPS):
        return ()
    found = []
    for child in module.modules():
        forward = _forward_of(child, family, attend)
        if forward is not None and "forward" not in vars(child):  # somebody else's otherwise
            found.append((child, forward))
    return tuple(found)


def _forward_of(child: nn.Module, family: str, attend: Attend) -> Any:
    kind = type(child)
    if kind.__module__ != f"transformers.models.{family.lower()}.modeling_{family.lower()}":
        return None
    if kind.__name__ == f"{family}RMSNorm":
        return functools.partial(_norm, child)
    if kind.__name__ == f"{family}MLP" and isinstance(child.act_fn, _silu_types()):
        return functools.partial(_mlp, child)
    if kind.__name__ == f"{family}Attention":
        return functools.partial(_attention, child, attend)
    return None


@functools.cache
def _silu_types() -> tuple[type, ...]:
    from transformers.activations import ACT2FN

    return (nn.SiLU, type(ACT2FN["silu"]))


def _norm(module: Any, hidden_states: Tensor) -> Tensor:
    return trained_rms_norm(hidden_states, module.weight, module.variance_epsilon)


def _mlp(module: Any, x: Tensor) -> Tensor:
    out: Tensor = module.down_proj(swiglu(module.gate_proj(x), module.up_proj(x)))
    return out


def _attention(
    module: Any,
    attend: Attend,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    attention_mask: Tensor | None = None,
    cache: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, Any]:
    """One packed row, [1, N, H]; without a cache."""
    if cache is not None or kwargs.get("past_key_values") is not None:
        raise ValueError(f"{type(module).__name__}: packed attention has no cache")
    rows, cos, sin = hidden_states, position_embeddings[0][0], position_embeddings[1][0]
    q, k, v = (  # squeeze and not [0]: the backward of an index copies into zeros
        project(rows).squeeze(0).unflatten(-1, (-1, module.head_dim))
        for project in (module.q_proj, module.k_proj, module.v_proj)
    )
    if hasattr(module, "q_norm"):
        q, k = module.q_norm(q), module.k_norm(k)
    q, k = rotary(q, cos, sin), rotary(k, cos, sin)
    window = getattr(module, "sliding_window", None)
    if module.config.model_type == "mistral":
        window = module.config.sliding_window
    out, weights = attend(
        module,
        *(x.transpose(0, 1)[None] for x in (q, k, v)),
        attention_mask,
        scaling=module.scaling,
        dropout=module.attention_dropout if module.training else 0.0,
        sliding_window=window,
        **kwargs,
    )
    return module.o_proj(out.flatten(2)), weights


@contextmanager
def replaced_forwards(layers: FusedLayers) -> Iterator[None]:
    """Give each layer its other forward until the block is left, however it is left."""
    try:
        for module, forward in layers:
            vars(module)["forward"] = forward
        yield
    finally:
        for module, _ in layers:
            vars(module).pop("forward", None)
