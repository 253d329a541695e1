"""Tiny random models and a small tokenizer, built in the process: shared fixtures of the tests.

Import as `from tests.models.tiny import build, tokenizer`.
"""

from __future__ import annotations

import random
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerFast,
)

from rlhf_fast.types import PackedSequences

VOCAB = 37
POSITIONS = 64
PAD, BOS, EOS, UNK = range(4)
CHAT_TEMPLATE = "{% for m in messages %}{{ m['role'] }} : {{ m['content'] }} {% endfor %}"

_LLAMA_LIKE = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": POSITIONS,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "initializer_range": 0.3,
}
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
_OVERRIDES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {},
    "mixtral": {"num_local_experts": 4},
    "qwen2": {},
    "qwen2_moe": {**_MOE, "shared_expert_intermediate_size": 8},
    "qwen3": {"head_dim": 8},
    "qwen3_moe": {**_MOE, "head_dim": 8},
    "gemma": {"head_dim": 8},
    "gemma2": {"head_dim": 8, "sliding_window": 4, "query_pre_attn_scalar": 8},
    "granite": {"logits_scaling": 2.0, "attention_multiplier": 0.5, "residual_multiplier": 0.7},
    "olmo2": {},
    "phi": {"partial_rotary_factor": 0.5},
    "phi3": {},
    "smollm3": {},
    "starcoder2": {"attention_dropout": 0.1, "residual_dropout": 0.1, "embedding_dropout": 0.1},
}
_GPT_NEOX = {k: v for k, v in _LLAMA_LIKE.items() if k != "num_key_value_heads"}
_GPT2 = {
    "vocab_size": VOCAB,
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": POSITIONS,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "initializer_range": 0.3,
}
_OPT = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "word_embed_proj_dim": 16,
    "ffn_dim": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": POSITIONS,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "init_std": 0.3,
}


def tiny_config(model_type: str, **overrides: Any) -> Any:
    """A config of `model_type` with a vocabulary of 37, 64 positions, width 16 and 2 layers."""
    base = {"gpt2": _GPT2, "gpt_neox": _GPT_NEOX, "opt": _OPT}.get(
        model_type, {**_LLAMA_LIKE, **_OVERRIDES.get(model_type, {})}
    )
    return AutoConfig.for_model(model_type, **{**base, **overrides})


def build(model_type: str = "llama", *, seed: int = 0, **overrides: Any) -> Any:
    """A random fp32 causal LM in train mode; the global random state is left as it was."""
    config = tiny_config(model_type, **overrides)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config)


def build_classifier(model_type: str = "llama", *, seed: int = 0, **overrides: Any) -> Any:
    """A random fp32 sequence classifier with one label."""
    config = tiny_config(model_type, num_labels=1, **overrides)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AutoModelForSequenceClassification.from_config(config)


def tokenizer(size: int = VOCAB) -> Any:
    """Words w4, w5, ... by white space; ids 0 to 3 are <pad>, <bos>, <eos>, <unk>."""
    vocab = {"<pad>": PAD, "<bos>": BOS, "<eos>": EOS, "<unk>": UNK}
    vocab |= {f"w{i}": i for i in range(4, size)}
    model = Tokenizer(WordLevel(vocab, unk_token="<unk>"))
    model.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=model,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def random_sequences(lengths: list[int], *, seed: int = 0) -> PackedSequences:
    """Random token ids in segments of the given lengths."""
    draw = random.Random(seed)
    return PackedSequences.from_lists([[draw.randrange(VOCAB) for _ in range(n)] for n in lengths])


def next_token_targets(sequences: PackedSequences) -> torch.Tensor:
    """[N] the token after each position, IGNORE_INDEX at the end of each segment."""
    targets = torch.roll(sequences.ids, -1)
    ends = sequences.cu_seqlens[1:].long() - 1
    targets[ends[sequences.lengths > 0]] = -100
    return targets
