"""The runner's forward for Llama, Mistral, Qwen2 and Qwen3.

A layer is eight calls: norm (with the residual added in place), q|k|v product, rotation and store,
attention, output product, norm, gate|up product, SwiGLU, down product. The products read the
parameters themselves: q|k|v and gate|up lie side by side (`AliasedWeights`), so their concatenation
is a view. Active LoRA adapters add two small products each. Numbers follow the modules of
transformers operation by operation; a test holds greedy tokens of both against each other.

Under bf16 autocast they follow its rules: what a product reads and returns is bf16, embedding,
residual stream and norms have the type of the parameters, and logits come back in fp32 from bf16
operands, as the trainer's do (`linear_logprobs`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlhf_fast.engine.compute_weights import ComputeWeights
from rlhf_fast.engine.decode_plan import Call, DecodePlan, PrefillPlan, vocabulary_product
from rlhf_fast.engine.fused_adapters import LayerAdapters, LowRank, layer_adapters
from rlhf_fast.engine.fused_support import COMPUTE
from rlhf_fast.engine.module_forward import cache_shape_of, require_same_type, unwrapped
from rlhf_fast.engine.paged_batch import PagedBatch
from rlhf_fast.engine.sharded_views import Weights
from rlhf_fast.engine.tensor_parallel import TensorParallel
from rlhf_fast.engine.weights import base_linear
from rlhf_fast.models.forward import compute_dtype
from rlhf_fast_kernels import paged_attention, rms_norm, rope_and_store, silu_mul
from rlhf_fast_kernels.attention_backends import (
    AttentionChoice,
    OurAttention,
    Prefill,
    stored_keys,
)


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
        version: of the weights, see `ComputeWeights`.
        keep: hold a bf16 copy of fp32 parameters between rollouts.
        attention: what decodes and prefills; None: `paged_attention`.
        parallel: the ranks that hold the other slices of the model; None: it is whole.
    """

    def __init__(
        self,
        module: nn.Module,
        weights: Weights,
        *,
        version: Callable[[], int] | None = None,
        keep: bool = False,
        attention: AttentionChoice | None = None,
        parallel: TensorParallel | None = None,
    ) -> None:
        self.module = module
        self.parallel = parallel
        self.weights = weights
        self.dtype = COMPUTE[compute_dtype(module)]
        self.compute = ComputeWeights(weights, self.dtype, version=version, keep=keep)
        self.cache_shape = cache_shape_of(module)
        self.attention = attention or AttentionChoice(OurAttention(), None, "asked for")
        model = unwrapped(module)
        self._trunk = model.model
        config = model.config
        self.heads = config.num_attention_heads
        self.eps = float(self._trunk.norm.variance_epsilon)
        self.embedding = self._trunk.embed_tokens.weight.detach()
        self.final_norm = self._trunk.norm.weight.detach()
        self.head = self.compute.view(model.lm_head.weight.detach())
        self.head_bias = None if model.lm_head.bias is None else model.lm_head.bias.detach()
        self.layers = [self._layer(block) for block in self._trunk.layers]
        self.compute.free()
        self.adapters: list[LayerAdapters] = []
        self.cos = self.sin = torch.empty(0)
        self._plan: DecodePlan | None = None

    def _layer(self, block: Any) -> Layer:
        attention, mlp = block.self_attn, block.mlp
        qkv = [base_linear(p) for p in (attention.q_proj, attention.k_proj, attention.v_proj)]
        gate_up = [base_linear(p) for p in (mlp.gate_proj, mlp.up_proj)]
        out, down = base_linear(attention.o_proj), base_linear(mlp.down_proj)
        q_norm, k_norm = (getattr(attention, name, None) for name in ("q_norm", "k_norm"))
        return Layer(
            input_norm=block.input_layernorm.weight.detach(),
            qkv=self._joined([layer.weight for layer in qkv]),
            qkv_bias=self._joined_biases(qkv),
            q_norm=None if q_norm is None else self._joined([q_norm.weight]),
            k_norm=None if k_norm is None else self._joined([k_norm.weight]),
            out=self._joined([out.weight]),
            out_bias=self._joined_biases([out]),
            post_norm=block.post_attention_layernorm.weight.detach(),
            gate_up=self._joined([layer.weight for layer in gate_up]),
            gate_up_bias=self._joined_biases(gate_up),
            down=self._joined([down.weight]),
            down_bias=self._joined_biases([down]),
            scale=float(attention.scaling),
            window=_window(attention),
        )

    def _joined(self, parameters: list[Tensor]) -> Tensor:
        """Adjacent parameters as one, in the type that products run in."""
        view = self.weights.concatenated(parameters)
        assert view is not None, "AliasedWeights lays these parameters side by side"
        return self.compute.view(view)

    def _joined_biases(self, layers: list[Any]) -> Tensor | None:
        if layers[0].bias is None:
            return None
        return self._joined([layer.bias for layer in layers])

    def running(self, max_context: int) -> AbstractContextManager[None]:
        """See `PagedForward`: the views must be those that training updates."""
        self.weights.check()
        require_same_type(self.module, self.cache_shape)
        self._read_numbers(max_context)
        return self._prepared()

    def _read_numbers(self, max_context: int) -> None:
        """What the modules hold beside parameters, as it is now: nothing tells of its changes."""
        self.eps = float(self._trunk.norm.variance_epsilon)
        attentions = [block.self_attn for block in self._trunk.layers]
        self.layers = [
            replace(layer, scale=float(attention.scaling), window=_window(attention))
            for layer, attention in zip(self.layers, attentions, strict=True)
        ]
        positions = torch.arange(max_context, device=self.embedding.device)
        cos, sin = self._trunk.rotary_emb(self.embedding[:1], positions[None])
        # Rounded to the model's type as its modules do, then read as fp32 by the kernel.
        self.cos, self.sin = cos[0].float().contiguous(), sin[0].float().contiguous()

    @contextmanager
    def _prepared(self) -> Iterator[None]:
        """Weights and adapters as they are now; types are chosen here, so autocast is off."""
        try:
            self.compute.refresh()
            self.adapters = [layer_adapters(block, self.dtype) for block in self._trunk.layers]
            with torch.autocast(self.embedding.device.type, enabled=False):
                yield
        finally:
            self._plan = None  # with the pages it points at
            self.adapters = []
            self.compute.release()

    @property
    def addresses(self) -> tuple[int, ...]:
        """See `PagedForward`."""
        tensors = [self.embedding, self.final_norm, self.head, self.cos, self.sin]
        for layer, adapters in zip(self.layers, self.adapters, strict=True):
            tensors += [layer.input_norm, layer.qkv, layer.out, layer.gate_up, layer.down]
            tensors += [t for pair in adapters if pair is not None for t in pair]
        return tuple(t.data_ptr() for t in tensors)

    @property
    def copied_bytes(self) -> int:
        """Bytes that copies of parameters and adapters hold now."""
        pairs = (pair for adapters in self.adapters for pair in adapters if pair is not None)
        return self.compute.nbytes + sum(pair.nbytes for pair in pairs)

    def paused(self) -> AbstractContextManager[None]:
        """See `PagedForward`; nothing of the module is changed while this runs."""
        return nullcontext()

    def decoding(self, batch: PagedBatch) -> tuple[Sequence[Call], Tensor]:
        """See `PagedForward`."""
        if self._plan is None or self._plan.batch is not batch:
            self._plan = DecodePlan(self, batch)
        return self._plan.calls, self._plan.logits

    def logits(self, batch: PagedBatch) -> Tensor:
        """See `PagedForward`; those of a decoding step are overwritten by the next."""
        if batch.cu_queries is None:
            calls, logits = self.decoding(batch)
            for call in calls:
                call()
            return logits
        whole = self.parallel is None and self.attention.prefill is None
        if whole and PrefillPlan.pays(batch):
            filled = PrefillPlan(self, batch).run()
            if filled is not None:
                return filled
        residual = self.embedding.new_empty(len(batch.ids), self.embedding.shape[1])
        self.embed(batch.ids, residual)
        hidden = self._norm(residual, self.layers[0].input_norm, None)
        last = len(self.layers) - 1
        for index, (layer, low) in enumerate(zip(self.layers, self.adapters, strict=True)):
            update = self._attention(layer, low, index, hidden, batch)
            hidden = self._norm(update, layer.post_norm, residual)
            gate_up = _linear(hidden, layer.gate_up, layer.gate_up_bias, low.gate_up)
            update = _linear(silu_mul(gate_up), layer.down, layer.down_bias, low.down)
            update = self.summed(update)
            if index == last and batch.rows is not None:
                # Rows of no interest end here; the head is the largest product of a small model.
                update, residual = update[batch.rows], residual[batch.rows]
            following = self.final_norm if index == last else self.layers[index + 1].input_norm
            hidden = self._norm(update, following, residual)
        logits = torch.empty(
            (len(hidden), len(self.head)), dtype=torch.float32, device=hidden.device
        )
        vocabulary_product(hidden, self.head, self.head_bias, logits)()
        return logits

    def embed(self, ids: Tensor, out: Tensor) -> None:
        """Write the embeddings [N, H] of ids [N]."""
        if self.parallel is None:
            torch.index_select(self.embedding, 0, ids, out=out)
        else:
            self.parallel.embed(ids, self.embedding, out)

    def summed(self, x: Tensor) -> Tensor:
        """What the slices of a layer give together; in place."""
        return x if self.parallel is None else self.parallel.sum(x)

    def _norm(self, x: Tensor, weight: Tensor, residual: Tensor | None) -> Tensor:
        out = torch.empty(x.shape, dtype=self.dtype, device=x.device)
        return rms_norm(x, weight, self.eps, residual=residual, out=out)

    def _attention(
        self, layer: Layer, low: LayerAdapters, index: int, hidden: Tensor, batch: PagedBatch
    ) -> Tensor:
        heads, kv_heads, width = self.heads, self.cache_shape.heads, self.cache_shape.head_dim
        qkv = _linear(hidden, layer.qkv, layer.qkv_bias, low.qkv)
        q, k, v = qkv.view(-1, heads + 2 * kv_heads, width).split((heads, kv_heads, kv_heads), 1)
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
        prefill = self.attention.prefill
        if prefill is not None and batch.fresh and batch.cu_queries is not None:
            call = Prefill(
                *(batch.slots, batch.cu_queries, batch.max_query, layer.scale, layer.window)
            )
            out = prefill.prefill(q, stored_keys(keys, batch.slots), v, call)
            return self.summed(_linear(out.flatten(1), layer.out, layer.out_bias, low.out))
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
        return self.summed(_linear(out.flatten(1), layer.out, layer.out_bias, low.out))


def _window(attention: Any) -> int | None:
    owner = attention.config if attention.config.model_type == "mistral" else attention
    window: int | None = getattr(owner, "sliding_window", None)
    return window


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, low: LowRank | None) -> Tensor:
    y = F.linear(x, weight, bias)
    return y if low is None else y.addmm_(x @ low.a.t(), low.b.t())
