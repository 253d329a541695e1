"""Layers of Llama, Mistral, Qwen2 and Qwen3 with our ops in place of transformers' operations.

transformers computes RMSNorm, rotation and SwiGLU operation by operation, each of them a pass over
the activations and another in backward. On a CPU in fp32 those passes take a quarter of a packed
forward and backward; inside `packed_attention_mode` the modules' `forward` is ours, with the same
parameters and numbers up to rounding: a whole layer is one op, `decoder_layer`, where its
projections are plain and nobody listens to its parts; elsewhere norm, MLP and attention each have a
forward of ours, around projections that are called as they are, adapters and hooks included, and
whose products, where they are `torch.nn.Linear`s, have the bits of that op's.
Outside the mode, and for a class that is not transformers' own, the model is stock.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_fast_kernels import LayerSettings, LayerWeights, decoder_layer, dispatch
from rlhf_fast_kernels.layer_ops import rotary, swiglu, trained_rms_norm
from rlhf_fast_kernels.matmul import linear, tiles

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
    found: list[tuple[nn.Module, Any]] = []
    _collect(module, family, attend, found)
    return tuple(found)


def _collect(
    module: nn.Module, family: str, attend: Attend, found: list[tuple[nn.Module, Any]]
) -> None:
    """Add (layer, forward) of the module and what is in it; of a whole layer, that alone."""
    forward, whole = _forward_of(module, family, attend)
    if forward is not None and "forward" not in vars(module):  # somebody else's otherwise
        found.append((module, forward))
        if whole:
            return
        # Elsewhere PyTorch's product is the one that a whole layer has.
        if tiles() and any(_is_stock(module, family, name) for name in ("MLP", "Attention")):
            _collect_linear(module, found)
    for child in module.children():
        _collect(child, family, attend, found)


def _forward_of(child: nn.Module, family: str, attend: Attend) -> tuple[Any, bool]:
    """(forward of ours or None, whether it does all that the module's children do)."""
    if _is_stock(child, family, "DecoderLayer") and _is_plain_layer(child, family):
        return functools.partial(_layer, child), True
    if _is_stock(child, family, "RMSNorm"):
        return functools.partial(_norm, child), False
    if _is_stock(child, family, "MLP") and isinstance(child.act_fn, _silu_types()):
        return functools.partial(_mlp, child), False
    if _is_stock(child, family, "Attention"):
        return functools.partial(_attention, child, attend), False
    return None, False


def _collect_linear(owner: nn.Module, found: list[tuple[nn.Module, Any]]) -> None:
    """The linear layers in a part, those in adapters around them included."""
    for module in owner.modules():
        if type(module) is nn.Linear and "forward" not in vars(module):
            found.append((module, functools.partial(_linear, module)))


def _is_stock(part: nn.Module, family: str, name: str) -> bool:
    """Whether the part is of transformers' own class of this name, not of one derived from it."""
    kind = type(part)
    home = f"transformers.models.{family.lower()}.modeling_{family.lower()}"
    return kind.__module__ == home and kind.__name__ == f"{family}{name}"


_PROJECTIONS = frozenset(
    {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
)


def _is_plain_layer(layer: Any, family: str) -> bool:
    """Whether `decoder_layer` computes what the parts of a layer would, and nobody would notice."""
    attention, mlp = layer.self_attn, layer.mlp
    norms = [layer.input_layernorm, layer.post_attention_layernorm]
    norms += [attention.q_norm, attention.k_norm] if hasattr(attention, "q_norm") else []
    projections = [
        part
        for owner in (attention, mlp)
        for name, part in owner.named_children()
        if name in _PROJECTIONS
    ]
    if len(projections) != len(_PROJECTIONS) or not all(type(p) is nn.Linear for p in projections):
        return False
    if dispatch.choose("decoder_layer", None, projections[0].weight).impl == "reference":
        return False
    parts = [(attention, "Attention"), (mlp, "MLP"), *((norm, "RMSNorm") for norm in norms)]
    if any(not _is_stock(part, family, name) for part, name in parts):
        return False
    if not all(p.is_contiguous() and p.dtype == torch.float32 for p in layer.parameters()):
        return False
    if any(part.bias is not None for part in mlp.children() if isinstance(part, nn.Linear)):
        return False
    if not isinstance(mlp.act_fn, _silu_types()) or len({n.variance_epsilon for n in norms}) > 1:
        return False
    return not (layer.training and attention.attention_dropout) and not any(
        _is_watched(part) for part in layer.modules() if part is not layer
    )


def _is_watched(part: nn.Module) -> bool:
    """Whether calling the part does more than its class's forward."""
    return bool(
        part._forward_hooks
        or part._forward_pre_hooks
        or part._backward_hooks
        or part._backward_pre_hooks
        or "forward" in vars(part)
    )


@functools.cache
def _silu_types() -> tuple[type, ...]:
    from transformers.activations import ACT2FN

    return (nn.SiLU, type(ACT2FN["silu"]))


def _norm(module: Any, hidden_states: Tensor) -> Tensor:
    return trained_rms_norm(hidden_states, module.weight, module.variance_epsilon)


def _linear(module: nn.Linear, x: Tensor) -> Tensor:
    return linear(x, module.weight, module.bias)


def _mlp(module: Any, x: Tensor) -> Tensor:
    out: Tensor = module.down_proj(swiglu(module.gate_proj(x), module.up_proj(x)))
    return out


def _layer(
    layer: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    *,
    position_embeddings: tuple[Tensor, Tensor],
    packed_layout: Any,
    cache: Any = None,
    **kwargs: Any,
) -> Tensor:
    """One packed row, [1, N, H]; without a cache."""
    if hidden_states.device.type != "cpu":  # weights lay on the host and were sent after
        where = {"position_embeddings": position_embeddings, "packed_layout": packed_layout}
        stock: Tensor = type(layer).forward(
            layer, hidden_states, attention_mask, cache=cache, **where, **kwargs
        )
        return stock
    _require_no_cache(layer, cache, kwargs)
    if attention_mask is not None:
        raise ValueError(f"{type(layer).__name__}: packed attention has no mask")
    run = functools.partial(_as_one_op, layer, position_embeddings, packed_layout)
    if _checkpoints_in_forward(layer) and torch.is_grad_enabled():
        out: Tensor = layer._gradient_checkpointing_func(run, hidden_states)
        return out
    return run(hidden_states)


def _checkpoints_in_forward(layer: Any) -> bool:
    """Whether the forward that ours stands for would recompute itself in backward.

    Versions of transformers differ: some do it around the call of the module, where it still is.
    """
    in_call = type(layer).__call__ is not nn.Module.__call__
    return not in_call and layer.gradient_checkpointing and layer.training


def _as_one_op(
    layer: Any, tables: tuple[Tensor, Tensor], packed_layout: Any, hidden_states: Tensor
) -> Tensor:
    attention, mlp = layer.self_attn, layer.mlp
    normed = hasattr(attention, "q_norm")
    weights = LayerWeights(
        layer.input_layernorm.weight,
        *(attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight),
        attention.o_proj.weight,
        layer.post_attention_layernorm.weight,
        *(mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight),
        *(attention.q_proj.bias, attention.k_proj.bias, attention.v_proj.bias),
        attention.o_proj.bias,
        *((attention.q_norm.weight, attention.k_norm.weight) if normed else (None, None)),
    )
    window = _window(attention)
    settings = LayerSettings(
        attention.head_dim,
        layer.input_layernorm.variance_epsilon,
        attention.scaling,
        window if (window or 0) < packed_layout.max_length else None,
    )
    (cos, sin), rows = (table[0] for table in tables), hidden_states.squeeze(0)
    return decoder_layer(rows, weights, cos, sin, packed_layout.cu_seqlens, settings)[None]


def _window(attention: Any) -> int | None:
    """Tokens that a token sees, as the attention class of its family reads it."""
    owner = attention.config if attention.config.model_type == "mistral" else attention
    window: int | None = getattr(owner, "sliding_window", None)
    return window


def _require_no_cache(module: nn.Module, cache: Any, further: dict[str, Any]) -> None:
    if cache is not None or further.get("past_key_values") is not None:
        raise ValueError(f"{type(module).__name__}: packed attention has no cache")


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
    _require_no_cache(module, cache, kwargs)
    rows, cos, sin = hidden_states, position_embeddings[0][0], position_embeddings[1][0]
    q, k, v = (  # squeeze and not [0]: the backward of an index copies into zeros
        project(rows).squeeze(0).unflatten(-1, (-1, module.head_dim))
        for project in (module.q_proj, module.k_proj, module.v_proj)
    )
    if hasattr(module, "q_norm"):
        q, k = module.q_norm(q), module.k_norm(k)
    q, k = rotary(q, cos, sin), rotary(k, cos, sin)
    out, weights = attend(
        module,
        *(x.transpose(0, 1)[None] for x in (q, k, v)),
        attention_mask,
        scaling=module.scaling,
        dropout=module.attention_dropout if module.training else 0.0,
        sliding_window=_window(module),
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
