"""The Llamas that the runs of other trainers train, and how large they and their batch are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Sizes:
    """Of a model and of a batch."""

    vocab: int
    hidden: int
    layers: int
    rows: int
    prompt: int
    response: int
    loss_agg_mode: str = "token-mean"


def llama_config(sizes: Sizes, **options: Any) -> Any:
    """Configuration of a Llama; `options` are further fields of it."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=sizes.vocab,
        hidden_size=sizes.hidden,
        intermediate_size=2 * sizes.hidden,
        num_hidden_layers=sizes.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        **options,
    )


def causal_lm(sizes: Sizes, seed: int) -> nn.Module:
    """A Llama whose weights depend on the seed alone."""
    from transformers import LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(llama_config(sizes))
