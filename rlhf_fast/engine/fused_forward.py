"""The runner's fused forward for Llama, Mistral, Qwen2 and Qwen3.

A layer is eight calls: norm (with the residual added in place), q|k|v product, rotation and store,
attention, output product, norm, gate|up product, SwiGLU, down product. The products read the
parameters themselves: q|k|v and gate|up lie side by side (`AliasedWeights`), so their concatenation
is a view. Numbers follow the modules of transformers operation by operation; a test holds greedy
tokens of both against each other.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN

from rlhf_fast.engine.decode_plan import DecodePlan
from rlhf_fast.engine.module_forward import batch_dependent_rope, cache_shape_of, unwrapped
from rlhf_fast.engine.paged_batch import PagedBatch
from rlhf_fast.engine.weights import ADJACENT, AliasedWeights, why_not_aliased
from rlhf_fast.models.forward import compute_dtype
from rlhf_fast_kernels import paged_attention, rms_norm, rope_and_store, silu_mul

FUSED_MODEL_TYPES = frozenset({"llama", "mistral", "qwen2", "qwen3"})
_PLAIN_PARTS = (nn.Linear, nn.Embedding, nn.ModuleList)
_COMPUTE = {"float32": torch.float32, "bfloat16": torch.bfloat16}


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
    dtypes = {p.dtype for p in model.parameters()}
    if dtypes != {_COMPUTE[compute_dtype(module)]}:
        return "weights are kept in another type than they are computed in"
    if module is not model:
        return "adapters of peft run through the modules"
    for name, part in model.named_modules():
        fault = _not_stock(part, config.model_type)
        if fault is not None:
            return f"{name or 'the model'} {fault}"
    return why_not_aliased(module)


def _not_stock(part: nn.Module, model_type: str) -> str | None:
    """None if a submodule computes what its class in transformers computes, otherwise why not."""
    kind = type(part)
    stock = kind.__module__.startswith(f"transformers.models.{model_type}.")
    if not stock and kind not in (*_PLAIN_PARTS, type(ACT2FN["silu"])):
        return f"is a {kind.__name__}"
    if "forward" in vars(part):
        return "has a forward of its own"
    if part._forward_hooks or part._forward_pre_hooks:
        return "has forward hooks"
    for names in ADJACENT:
        layers = [getattr(part, name, None) for name in names]
        biases = {layer.bias is None for layer in layers if isinstance(layer, nn.Linear)}
        if len(biases) > 1:
            return f"has a bias on some of {', '.join(names)}"
    return None


@dataclass(frozen=True)
class Layer:
    """Parameters of a block; qkv and gate_up are views over adjacent ones."""

    input_norm: Tensor
    qkv: Tensor
    qkv_bias: Tensor | None
    q_norm: Tensor | None
    k_norm: Tensor | None
    out: Tensor
    out_bias: Tensor | None
    post_norm: Tensor
    gate_up: Tensor
    gate_up_bias: Tensor | None
    down: Tensor
    down_bias: Tensor | None
    scale: float
    window: int | None


class FusedForward:
    """`PagedForward` over the aliased parameters of one of `FUSED_MODEL_TYPES`.

    Args:
        module: the model, for which `why_not_fused` is None.
        weights: its parameters.
    """

    def __init__(self, module: nn.Module, weights: AliasedWeights) -> None:
        self.module = module
        self.weights = weights
        self.cache_shape = cache_shape_of(module)
        model = unwrapped(module)
        self._trunk = model.model
        config = model.config
        self.heads = config.num_attention_heads
        self.eps = config.rms_norm_eps
        self.embedding = self._trunk.embed_tokens.weight.detach()
        self.final_norm = self._trunk.norm.weight.detach()
        self.head = model.lm_head.weight.detach()
        self.head_bias = _detached(model.lm_head.bias)
        self.layers = [self._layer(block) for block in self._trunk.layers]
        self.cos = self.sin = torch.empty(0)
        self._plan: DecodePlan | None = None

    def _layer(self, block: Any) -> Layer:
        attention, mlp = block.self_attn, block.mlp
        qkv = (attention.q_proj, attention.k_proj, attention.v_proj)
        gate_up = (mlp.gate_proj, mlp.up_proj)
        window = getattr(attention, "sliding_window", None)
        if attention.config.model_type == "mistral":
            window = attention.config.sliding_window
        q_norm, k_norm = (getattr(attention, name, None) for name in ("q_norm", "k_norm"))
        return Layer(
            input_norm=block.input_layernorm.weight.detach(),
            qkv=self._joined([layer.weight for layer in qkv]),
            qkv_bias=self._joined_biases(qkv),
            q_norm=None if q_norm is None else q_norm.weight.detach(),
            k_norm=None if k_norm is None else k_norm.weight.detach(),
            out=attention.o_proj.weight.detach(),
            out_bias=_detached(attention.o_proj.bias),
            post_norm=block.post_attention_layernorm.weight.detach(),
            gate_up=self._joined([layer.weight for layer in gate_up]),
            gate_up_bias=self._joined_biases(gate_up),
            down=mlp.down_proj.weight.detach(),
            down_bias=_detached(mlp.down_proj.bias),
            scale=float(attention.scaling),
            window=window,
        )

    def _joined(self, parameters: list[Tensor]) -> Tensor:
        view = self.weights.concatenated(parameters)
        assert view is not None, "AliasedWeights lays these parameters side by side"
        return view

    def _joined_biases(self, layers: tuple[Any, ...]) -> Tensor | None:
        if layers[0].bias is None:
            return None
        return self._joined([layer.bias for layer in layers])

    def running(self, max_context: int) -> AbstractContextManager[None]:
        """See `PagedForward`: the views must be those that training updates."""
        self.weights.check()
        if len(self.cos) < max_context:
            positions = torch.arange(max_context, device=self.embedding.device)
            cos, sin = self._trunk.rotary_emb(self.embedding[:1], positions[None])
            # Rounded to the model's type as its modules do, then read as fp32 by the kernel.
            self.cos, self.sin = cos[0].float().contiguous(), sin[0].float().contiguous()
        return self._planned()

    @contextmanager
    def _planned(self) -> Iterator[None]:
        try:
            yield
        finally:
            self._plan = None  # with the pages it points at

    def paused(self) -> AbstractContextManager[None]:
        """See `PagedForward`; nothing of the module is changed while this runs."""
        return nullcontext()

    def logits(self, batch: PagedBatch) -> Tensor:
        """See `PagedForward`; those of a decoding step are overwritten by the next."""
        if batch.cu_queries is None:
            if self._plan is None or self._plan.batch is not batch:
                self._plan = DecodePlan(self, batch)
            return self._plan.run()
        residual = F.embedding(batch.ids, self.embedding)
        hidden = rms_norm(residual, self.layers[0].input_norm, self.eps)
        last = len(self.layers) - 1
        for index, layer in enumerate(self.layers):
            update = self._attention(layer, index, hidden, batch)
            hidden = rms_norm(update, layer.post_norm, self.eps, residual=residual)
            update = F.linear(
                silu_mul(F.linear(hidden, layer.gate_up, layer.gate_up_bias)),
                layer.down,
                layer.down_bias,
            )
            if index == last and batch.rows is not None:
                # Rows of no interest end here; the head is the largest product of a small model.
                update, residual = update[batch.rows], residual[batch.rows]
            following = self.final_norm if index == last else self.layers[index + 1].input_norm
            hidden = rms_norm(update, following, self.eps, residual=residual)
        return F.linear(hidden, self.head, self.head_bias)

    def _attention(self, layer: Layer, index: int, hidden: Tensor, batch: PagedBatch) -> Tensor:
        heads, kv_heads, width = self.heads, self.cache_shape.heads, self.cache_shape.head_dim
        qkv = F.linear(hidden, layer.qkv, layer.qkv_bias).view(-1, heads + 2 * kv_heads, width)
        q, k, v = qkv.split((heads, kv_heads, kv_heads), 1)
        keys, values = batch.cache.layer(index)
        rope_and_store(
            q,
            k,
            v,
            keys,
            values,
            batch.slots,
            positions=batch.positions,
            cos=self.cos,
            sin=self.sin,
            q_norm=layer.q_norm,
            k_norm=layer.k_norm,
            norm_eps=self.eps,
        )
        out = paged_attention(
            q,
            keys,
            values,
            batch.page_table,
            batch.context_lengths,
            batch.cu_queries,
            scale=layer.scale,
            window=layer.window,
            max_query=batch.max_query,
            max_context=batch.max_context,
        )
        return F.linear(out.flatten(1), layer.out, layer.out_bias)


def _detached(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else parameter.detach()
