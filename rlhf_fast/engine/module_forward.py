"""The runner's forward through a Hugging Face model's own modules.

The model runs on the packed tokens of all sequences as one row. Only attention mixes tokens, and it
goes through the attention interface of transformers to the paged ops. Architectures in
`PAGED_MODEL_TYPES` are held against stock `generate` by a test.
"""

from __future__ import annotations

import inspect
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from rlhf_fast.engine.paged_batch import PagedBatch
from rlhf_fast.engine.paged_cache import CacheShape
from rlhf_fast.errors import GenerationError
from rlhf_fast.models.attention_mode import attention_configs, attention_mode, implementations
from rlhf_fast.models.forward import PACKED_MODEL_TYPES, compute_dtype, foreign_attention
from rlhf_fast_kernels import paged_attention, rope_and_store

PAGED_ATTENTION = "rlhf_fast_paged"

# As for packed training, those whose masks or softcap only the paged kernel has, and decoders that
# packed training has not been tried on.
PAGED_MODEL_TYPES = PACKED_MODEL_TYPES | {
    *("afmoe", "apertus", "arcee", "cohere", "cohere2", "cohere2_moe", "cwm", "ernie4_5"),
    *("ernie4_5_moe", "exaone4", "flex_olmo", "gemma2", "gemma3_text", "glm", "glm4", "glm4_moe"),
    *("gpt_bigcode", "granitemoe", "granitemoeshared", "helium", "hunyuan_v1_dense"),
    *("hunyuan_v1_moe", "internlm3", "jais2", "minimax_m2", "ministral", "ministral3", "nanochat"),
    *("olmo", "olmo3", "olmoe", "opt", "persimmon", "seed_oss", "solar_open", "vaultgemma"),
}

# Rotary tables that depend on the longest sequence of a batch make a sample depend on its company.
_BATCH_DEPENDENT_ROPE = ("dynamic", "longrope")


def uncompiled(module: nn.Module) -> nn.Module:
    """The module that `torch.compile` was called on, or the module itself.

    The wrapper computes the same, and hides which arguments the model's forward takes. Lengths that
    grow with every token would be compiled over and over.
    """
    original: nn.Module = getattr(module, "_orig_mod", module)
    return original


def unwrapped(module: nn.Module) -> Any:
    """The Hugging Face model under a peft wrapper."""
    get_base_model: Any = getattr(module, "get_base_model", None)
    return module if get_base_model is None else get_base_model()


def why_not_paged(module: nn.Module) -> str | None:
    """None if the model can run on pages, otherwise why not."""
    model = unwrapped(module)
    config = model.config
    if config.model_type not in PAGED_MODEL_TYPES:
        return f"architecture {config.model_type} is not known to run on pages"
    if batch_dependent_rope(config):
        return "its rotary embedding depends on the longest sequence of the batch"
    return foreign_attention(config)


def batch_dependent_rope(config: Any) -> bool:
    """Whether rotary tables change with the longest sequence of a batch."""
    parameters = getattr(config, "rope_parameters", None) or {}
    kinds = [parameters, *(v for v in parameters.values() if isinstance(v, dict))]
    return any(kind.get("rope_type") in _BATCH_DEPENDENT_ROPE for kind in kinds)


def cache_shape_of(module: nn.Module) -> CacheShape:
    """Keys and values of a model whose layers are all alike."""
    model = unwrapped(module)
    config = model.config.get_text_config(decoder=True)
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    bf16 = compute_dtype(module) == "bfloat16"
    dtype = torch.bfloat16 if bf16 else next(model.parameters()).dtype
    return CacheShape(config.num_hidden_layers, kv_heads, head_dim, dtype)


def require_same_type(module: nn.Module, shape: CacheShape) -> None:
    """Refuse a model that computes in another type than its pages were laid out for.

    Raises:
        GenerationError: RF4031.
    """
    if cache_shape_of(module) != shape:
        raise GenerationError(
            "RF4031",
            "the model computes in another type than when the engine was made",
            remedy="cast the model first, then make the engine",
        )


def paged_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    paged_batch: PagedBatch,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Store the new keys and values, attend over the pages; the signature transformers calls.

    Args:
        module: the calling attention layer; its `layer_idx` names the layer of the cache.
        query: [1, heads, N, head dim].
        key, value: [1, key/value heads, N, head dim].
        attention_mask: always None, because no mask function is registered under this name.
        paged_batch: where sequences and pages lie.
        scaling: factor of the scores; None is 1/sqrt(head dim).
        dropout: must be 0.
        sliding_window: a token looks at itself and at the `sliding_window - 1` tokens before it.
        softcap: c of c * tanh(score / c).

    Returns:
        [1, N, heads, head dim] and None for the attention weights.
    """
    extra = [name for name in ("s_aux", "position_bias") if kwargs.get(name) is not None]
    if extra or attention_mask is not None or dropout:
        raise ValueError(
            f"{type(module).__name__}: paged attention has no {extra or 'mask or dropout'}"
        )
    keys, values = paged_batch.cache.layer(module.layer_idx)  # type: ignore[arg-type]
    q, k, v = (t[0].transpose(0, 1).to(keys.dtype) for t in (query, key, value))
    rope_and_store(q, k, v, keys, values, paged_batch.slots)
    out = paged_attention(
        q,
        keys,
        values,
        paged_batch.page_table,
        paged_batch.context_lengths,
        paged_batch.cu_queries,
        scale=scaling,
        softcap=softcap,
        window=sliding_window,
        max_query=paged_batch.max_query,
        max_context=paged_batch.max_context,
    )
    return out[None], None


def at_most_float32(logits: Tensor) -> Tensor:
    """What a float64 model draws from is rounded once, as its log-probs are."""
    return logits.float() if logits.dtype == torch.float64 else logits


AttentionInterface.register(PAGED_ATTENTION, paged_attention_forward)


class ModuleForward:
    """`PagedForward` through the modules of a Hugging Face causal LM.

    Args:
        module: the model, or a peft wrapper around it; adapters that are active take part.
    """

    parallel = None

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        model = unwrapped(module)
        self.cache_shape = cache_shape_of(module)
        accepted = inspect.signature(model.forward).parameters
        self._keeps_rows = "logits_to_keep" in accepted
        self._takes_positions = "position_ids" in accepted
        self._outside: tuple[str, ...] = ()

    @property
    def addresses(self) -> tuple[int, ...]:
        """See `PagedForward`."""
        return tuple(p.data_ptr() for p in self.module.parameters())

    def running(self, max_context: int) -> AbstractContextManager[None]:
        """See `PagedForward`; the modules read the parameters themselves."""
        require_same_type(self.module, self.cache_shape)
        configs = attention_configs(self.module)
        self._outside = implementations(configs)
        return attention_mode(configs, PAGED_ATTENTION)

    def paused(self) -> AbstractContextManager[None]:
        """See `PagedForward`: attention layers call what they call outside of generation."""
        return attention_mode(attention_configs(self.module), *self._outside)

    def decoding(self, batch: PagedBatch) -> None:
        """See `PagedForward`: modules are called, not laid out."""
        return

    def logits(self, batch: PagedBatch) -> Tensor:
        """See `PagedForward`."""
        arguments: dict[str, Any] = {"paged_batch": batch}
        if self._takes_positions:
            arguments["position_ids"] = batch.positions[None]
        if self._keeps_rows and batch.rows is not None:
            arguments["logits_to_keep"] = batch.rows
        out = self.module(input_ids=batch.ids[None], use_cache=False, **arguments)
        logits: Tensor = at_most_float32(out.logits[0])
        if batch.rows is not None and not self._keeps_rows:
            logits = logits[batch.rows]
        return logits
