"""Which models the fused forward knows, decided on the objects themselves.

Everything it does not name computes through the modules: a layer of another class, a hook, a
replaced forward, an adapter that is more than `x A^T B^T scale`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import peft
import torch
from peft.tuners import lora
from torch import nn
from transformers.activations import ACT2FN

from rlhf_fast.distributed.placement import ADJACENT
from rlhf_fast.engine.module_forward import batch_dependent_rope, unwrapped
from rlhf_fast.engine.weights import base_linear, why_not_aliased
from rlhf_fast.models.forward import compute_dtype

FUSED_MODEL_TYPES = frozenset({"llama", "mistral", "qwen2", "qwen3"})
# Projections whose products take an adapter's.
ADAPTED = frozenset({"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"})
_PLAIN_PARTS = (nn.Linear, nn.Embedding, nn.ModuleList)
_WRAPPERS = (peft.PeftModel, peft.PeftModelForCausalLM)
_LIBRARIES = frozenset({"transformers", "peft"})
_ASKING_HOOKS = frozenset({"make_inputs_require_grad", "make_inputs_require_grads"})
COMPUTE = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def why_not_fused(module: nn.Module) -> str | None:
    """None if the fused forward knows this model, otherwise why not."""
    model = unwrapped(module)
    config = model.config
    if config.model_type not in FUSED_MODEL_TYPES:
        return f"no fused forward for {config.model_type}"
    if config.hidden_act != "silu":
        return f"activation {config.hidden_act}"
    if batch_dependent_rope(config):
        return "its rotary embedding depends on the longest sequence of the batch"
    fault = _wrong_types(module, model) or _foreign_wrapper(module, model)
    if fault is not None:
        return fault
    for name, part in _parts(model):
        adapted = isinstance(part, lora.LoraLayer)
        fault = why_not_adapted(name, part) if adapted else _not_stock(part, config.model_type)
        if fault is not None:
            return f"{name or 'the model'} {fault}"
    if len({p.variance_epsilon for p in model.modules() if hasattr(p, "variance_epsilon")}) > 1:
        return "its norms have several epsilons"
    return why_not_aliased(module)


def active_adapters(layer: Any) -> list[str]:
    """Names of the adapters that take part in a peft layer's output."""
    if layer.disable_adapters:
        return []
    return [name for name in layer.active_adapters if name in layer.lora_A]


def _parts(part: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """All submodules but those of a peft layer, which is looked at as one."""
    yield name, part
    if not isinstance(part, lora.LoraLayer):
        for child, module in part.named_children():
            yield from _parts(module, f"{name}.{child}" if name else child)


def _wrong_types(module: nn.Module, model: Any) -> str | None:
    """What is computed in bf16 may be kept in fp32 or bf16, but the residual stream in one type."""
    compute = COMPUTE[compute_dtype(module)]
    kept = {torch.float32} if compute is torch.float32 else {torch.float32, torch.bfloat16}
    stream = model.get_input_embeddings().weight.dtype
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            continue
        if parameter.dtype not in kept:
            return "weights are kept in another type than they are computed in"
        # What is no matrix is a bias or a norm; those of heads act on what a product returned.
        norm = name.endswith("norm.weight") and not name.endswith(
            ("q_norm.weight", "k_norm.weight")
        )
        if norm and parameter.dtype is not stream:
            return f"{name} is kept in another type than the embedding"
    return None


def _foreign_wrapper(module: nn.Module, model: Any) -> str | None:
    """None if what surrounds the model does nothing to its forward."""
    if module is model:
        return None
    inner = getattr(module, "base_model", None)
    if type(module) not in _WRAPPERS or type(inner) is not peft.LoraModel:
        return f"a {type(module).__name__} runs through the modules"
    for part in (module, inner):
        fault = _hooked(part)
        if fault is not None:
            return f"its wrapper {fault}"
    return None


def _hooked(part: nn.Module) -> str | None:
    if "forward" in vars(part):
        return "has a forward of its own"
    hooks = [hook for hook in part._forward_hooks.values() if not _asks_for_gradients(hook)]
    if hooks or part._forward_pre_hooks:
        return "has forward hooks"
    return None


def _asks_for_gradients(hook: Any) -> bool:
    """What transformers and peft put on embeddings for gradient checkpointing: no value changes."""
    home, _, name = getattr(hook, "__qualname__", "").rpartition(".<locals>.")
    library = getattr(hook, "__module__", "").partition(".")[0]
    return bool(home) and library in _LIBRARIES and name in _ASKING_HOOKS


def _not_stock(part: nn.Module, model_type: str) -> str | None:
    """None if a submodule computes what its class in transformers computes, otherwise why not."""
    kind = type(part)
    stock = kind.__module__.startswith(f"transformers.models.{model_type}.")
    if not stock and kind not in (*_PLAIN_PARTS, type(ACT2FN["silu"])):
        return f"is a {kind.__name__}"
    fault = _hooked(part)
    if fault is not None:
        return fault
    if isinstance(part, nn.Embedding) and part.max_norm is not None:
        return "rescales its rows"
    for names in ADJACENT:
        layers = [base_linear(getattr(part, name, None)) for name in names]
        biases = {layer.bias is None for layer in layers if isinstance(layer, nn.Linear)}
        if len(biases) > 1:
            return f"has a bias on some of {', '.join(names)}"
    return None


def why_not_adapted(name: str, layer: Any) -> str | None:
    """None if a peft layer adds x A^T B^T scale for each active adapter, otherwise why not."""
    if type(layer) is not lora.Linear or type(layer.base_layer) is not nn.Linear:
        return f"is a {type(layer).__name__} of {type(layer.base_layer).__name__}"
    if name.rpartition(".")[2] not in ADAPTED:
        return "has an adapter, which only the projections of a block may"
    if layer.merged:
        return "has a merged adapter"
    faults = (_hooked(part) for part in layer.modules())
    fault = next((f for f in faults if f is not None), None)
    if fault is not None:
        return fault
    if getattr(layer, "fan_in_fan_out", False):
        return "has its weight transposed"
    for adapter in active_adapters(layer):
        fault = _not_low_rank(layer, adapter)
        if fault is not None:
            return f"has the adapter {adapter}, {fault}"
    return None


def _not_low_rank(layer: Any, adapter: str) -> str | None:
    if adapter in getattr(layer, "lora_variant", {}) or layer.use_dora.get(adapter):
        return "which is no plain LoRA"
    factors = (layer.lora_A[adapter], layer.lora_B[adapter])
    if any(type(factor) is not nn.Linear for factor in factors):
        return "whose factors are no plain linear layers"
    if any(factor.bias is not None for factor in factors):
        return "which has a bias"
    if type(layer.lora_dropout[adapter]) not in (nn.Identity, nn.Dropout):
        return "which changes its input"
    return None
