"""Backbone forward over packed tokens: ids [N] to hidden states [N, H].

Architectures in `PACKED_MODEL_TYPES` run packed: a test holds each of them against the stock
forward of every sequence by itself. All others run the stock forward on right-padded sequences,
which is correct for any causal model and pays for the padding.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rlhf_fast.errors import ModelError
from rlhf_fast.models.longrope import tables_by_sequence
from rlhf_fast.models.packed_attention import (
    PackedLayout,
    packed_attention_mode,
    recompute_contexts,
)
from rlhf_fast.types import PackedSequences

ComputeDtype = Literal["float32", "bfloat16"]

# Position comes from `position_ids` alone, attention goes through the attention interface, and
# nothing else mixes tokens.
PACKED_MODEL_TYPES = frozenset(
    {
        "gemma",
        "gpt2",
        "gpt_neox",
        "granite",
        "llama",
        "mistral",
        "mixtral",
        "olmo2",
        "phi",
        "phi3",
        "qwen2",
        "qwen2_moe",
        "qwen3",
        "qwen3_moe",
        "smollm3",
        "starcoder2",
    }
)

_DTYPE_ATTRIBUTE = "rlhf_fast_compute_dtype"
_DEVICE_ATTRIBUTE = "rlhf_fast_device"


def set_compute_dtype(module: nn.Module, dtype: ComputeDtype) -> None:
    """Choose the type matrix products run in; parameters keep theirs.

    "bfloat16" is autocast over fp32 master weights: a pure bf16 weight near 1 has a spacing of
    2^-8 and never moves under a learning rate of 1e-6. "float32" is plain.
    """
    if dtype not in ("float32", "bfloat16"):
        raise ModelError(
            "RF3001",
            f"unknown compute dtype {dtype!r}",
            expected="float32 or bfloat16",
            remedy="choose one of the two; masters are fp32 in both",
        )
    setattr(module, _DTYPE_ATTRIBUTE, dtype)


def compute_dtype(module: nn.Module) -> ComputeDtype:
    """What `set_compute_dtype` chose; if it never did, "bfloat16" for weights kept in that."""
    chosen: ComputeDtype | None = getattr(module, _DTYPE_ATTRIBUTE, None)
    return ("bfloat16" if kept_in_bf16(module) else "float32") if chosen is None else chosen


def kept_in_bf16(module: nn.Module) -> bool:
    """Whether the weights are bf16; adapters over them may not be."""
    first = next(module.parameters(), None)
    return first is not None and first.dtype is torch.bfloat16


def autocast(module: nn.Module) -> AbstractContextManager[Any]:
    """The autocast region in which `module` computes."""
    if compute_dtype(module) == "float32":
        return nullcontext()
    return torch.autocast(device_of(module).type, dtype=torch.bfloat16)


def set_device(module: nn.Module, device: torch.device) -> None:
    """Say where a module computes whose weights lie elsewhere between forwards."""
    setattr(module, _DEVICE_ATTRIBUTE, device)


def device_of(module: nn.Module) -> torch.device:
    """Where the module computes: the device of its first parameter, but for `set_device`."""
    device: torch.device | None = getattr(module, _DEVICE_ATTRIBUTE, None)
    return next(module.parameters()).device if device is None else device


def runs_packed(module: nn.Module) -> bool:
    """True if the architecture runs on packed tokens, false if it needs right padding."""
    config: Any = module.config
    return config.model_type in PACKED_MODEL_TYPES and foreign_attention(config) is None


def foreign_attention(config: Any) -> str | None:
    """What in a config keeps attention out of our hands; None if it all goes through the interface.

    Packed training and generation over pages both stand on that.
    """
    others = set(getattr(config, "layer_types", None) or ()) - {
        "full_attention",
        "sliding_attention",
    }
    if others:
        return f"layers of type {', '.join(sorted(others))}"
    if getattr(config, "reorder_and_upcast_attn", False):
        return "reorder_and_upcast_attn does not go through the attention interface"
    return None


def packed_hidden(module: nn.Module, sequences: PackedSequences) -> Tensor:
    """Last hidden states of every packed token, before any head.

    Args:
        module: a Hugging Face causal LM or sequence classifier.
        sequences: N tokens in K segments, on any device; moved to the module's.

    Returns:
        [N, H] on the module's device, in the type the backbone computes. Gradients flow if grad
        mode is on. A segment's rows depend on that segment alone.

    Raises:
        ModelError: gradient checkpointing is on, but not through `enable_gradient_checkpointing`.
    """
    model: Any = module
    layout = PackedLayout.build(sequences, device_of(module))
    sequences = sequences.to(device_of(module))
    if sequences.ids.numel() == 0:
        width = model.get_input_embeddings().weight.shape[1]
        return torch.zeros(0, width, device=sequences.ids.device)
    with autocast(module):
        if not runs_packed(module):
            return _right_padded_hidden(module, sequences)
        _require_our_checkpointing(module)
        own_tables = tables_by_sequence(module, layout.lengths, packed=True)
        with packed_attention_mode(module), own_tables:
            output = model.base_model(
                input_ids=sequences.ids[None],
                position_ids=sequences.positions[None],
                use_cache=False,
                packed_layout=layout,
            )
    hidden: Tensor = output.last_hidden_state.squeeze(0)
    return hidden


def right_pad(sequences: PackedSequences) -> tuple[Tensor, Tensor]:
    """(ids [K, L] int64 with 0 in the padding, mask [K, L] bool, true on real tokens).

    Empty segments get no row: one without any key would give NaN, and NaN in its gradients.
    """
    lengths = sequences.lengths
    lengths = lengths[lengths > 0]
    mask = torch.arange(int(lengths.max()), device=lengths.device)[None] < lengths[:, None]
    # Id 0 is legal in every vocabulary; what it computes is masked and never read.
    ids = torch.zeros(mask.shape, dtype=torch.int64, device=mask.device)
    ids[mask] = sequences.ids
    return ids, mask


def _right_padded_hidden(module: nn.Module, sequences: PackedSequences) -> Tensor:
    model: Any = module
    ids, mask = right_pad(sequences)
    lengths = mask.sum(1).cpu()
    with tables_by_sequence(module, lengths, packed=False):
        output = model.base_model(input_ids=ids, attention_mask=mask.long(), use_cache=False)
    hidden: Tensor = output.last_hidden_state[mask]
    return hidden


def enable_gradient_checkpointing(module: nn.Module) -> None:
    """Recompute each layer in backward instead of keeping its activations.

    transformers' own switch is not enough: it would recompute packed layers with stock attention.
    Takes effect in train mode only, as in transformers.
    """
    model: Any = module
    settings = {"use_reentrant": False, "context_fn": recompute_contexts}
    # Later versions of transformers renamed the switch and warn about the older name.
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=settings)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)
    # It made the embedding's output ask for a gradient, which recomputing needs only in the
    # reentrant form; with frozen embeddings that would be one more gradient to compute.
    if hasattr(model, "disable_input_require_grads"):
        model.disable_input_require_grads()


def _checkpoint_functions(module: nn.Module) -> Iterator[Any]:
    for child in module.modules():
        if getattr(child, "gradient_checkpointing", False):
            yield getattr(child, "_gradient_checkpointing_func", None)


def _require_our_checkpointing(module: nn.Module) -> None:
    if not module.training:
        return
    for function in _checkpoint_functions(module):
        context = getattr(function, "keywords", {}).get("context_fn")
        if context is not recompute_contexts:
            raise ModelError(
                "RF3002",
                "gradient checkpointing was switched on outside rlhf_fast",
                where=type(module).__name__,
                expected="layers that recompute under packed attention",
                remedy="call rlhf_fast.models.forward.enable_gradient_checkpointing(module)",
            )
