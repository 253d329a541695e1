"""A decoding step of the fused forward, laid out once: buffers, and calls without arguments.

A step of a small model is bounded by what surrounds its kernels. Here nothing is allocated, checked
or chosen while it runs: the rows of a batch keep their places until one of them ends, so every call
is bound to its buffers when their number changes, and a step is one loop over those calls. On a GPU
the same fixed addresses are what a CUDA graph needs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rlhf_fast_kernels import PagedAttention, RopeAndStore, dispatch, rms_norm, silu_mul
from rlhf_fast_kernels.attention_backends import Decode, Decoding
from rlhf_fast_kernels.linear_head import Head
from rlhf_fast_kernels.linear_small import prepare as prepare_linear
from rlhf_fast_kernels.rms_norm import prepare as prepare_norm
from rlhf_fast_kernels.row_ops import prepare_gather
from rlhf_fast_kernels.silu_mul import prepare as prepare_silu_mul

if TYPE_CHECKING:
    from rlhf_fast.engine.fused_adapters import LayerAdapters, LowRank
    from rlhf_fast.engine.fused_forward import FusedForward, Layer
    from rlhf_fast.engine.paged_batch import PagedBatch

Call = Callable[[], object]
# Where our product beats the library's on a CPU (docs/kernels/linear_small.md): as long as the rows
# stay in a core's cache, and wide ones as long as reading the weights is the work.
FEW_ROWS, MANY_ROWS = 8, 256
WIDE = 1024
CACHED_BYTES = 1 << 19


class DecodePlan:
    """One decoding step of `batch.ids.numel()` rows.

    Args:
        model: the parameters.
        batch: its tensors are read at every step, so they have to stay where they are.

    Attributes:
        calls: the step, to be made in this order.
        logits: [rows, V] fp32, which each step overwrites.
    """

    def __init__(self, model: FusedForward, batch: PagedBatch) -> None:
        self.batch = batch
        self._model = model
        rows, shape = batch.ids.numel(), model.cache_shape
        first, width = model.layers[0], model.embedding.shape[1]
        new = partial(torch.empty, dtype=model.dtype, device=batch.ids.device)
        self._residual = new(rows, width, dtype=model.embedding.dtype)
        self._hidden, self._update = new(rows, width), new(rows, width)
        self._qkv = new(rows, first.qkv.shape[0])
        self._attended = new(rows, model.heads, shape.head_dim)
        self._gate_up = new(rows, first.gate_up.shape[0])
        self._activated = new(rows, first.gate_up.shape[0] // 2)
        self.logits = new(rows, model.head.shape[0], dtype=torch.float32)
        heads = self._qkv.view(rows, -1, shape.head_dim)
        self._q, self._k, self._v = heads.split((model.heads, shape.heads, shape.heads), 1)
        self._narrow: list[Tensor] = []
        self._attend: dict[tuple[float, int | None], Decode] = {}
        self._store = self._prepared_store(first)
        self.calls = [
            prepare_gather(model.embedding, batch.ids, self._residual),
            self._norm(self._residual, first.input_norm, None),
        ]
        for index, (layer, low) in enumerate(zip(model.layers, model.adapters, strict=True)):
            self.calls += self._layer(index, layer, low)
        self.calls.append(
            vocabulary_product(self._hidden, model.head, model.head_bias, self.logits)
        )

    def _layer(self, index: int, layer: Layer, low: LayerAdapters) -> list[Call]:
        model = self._model
        last = index + 1 == len(model.layers)
        following = model.final_norm if last else model.layers[index + 1].input_norm
        keys, values = self.batch.cache.layer(index)
        norms = (layer.q_norm, layer.k_norm)
        attend = self._prepared_attention(layer, keys, values)
        attended = self._attended.flatten(1)
        return [
            *self._products(self._hidden, layer.qkv, layer.qkv_bias, low.qkv, self._qkv),
            self._store.bind(self._q, self._k, self._v, keys, values, *norms),
            attend.bind(self._q, keys, values, self._attended)
            if isinstance(attend, PagedAttention)
            else partial(attend, self._q, keys, values, self._attended),
            *self._products(attended, layer.out, layer.out_bias, low.out, self._update),
            self._norm(self._update, layer.post_norm, self._residual),
            *self._products(
                self._hidden, layer.gate_up, layer.gate_up_bias, low.gate_up, self._gate_up
            ),
            _silu_mul(self._gate_up, self._activated),
            *self._products(self._activated, layer.down, layer.down_bias, low.down, self._update),
            self._norm(self._update, following, self._residual),
        ]

    def _products(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, low: LowRank | None, out: Tensor
    ) -> list[Call]:
        """out = x weight^T + bias, and what active adapters add to it."""
        calls = [_product(x, weight, bias, out)]
        if low is not None:
            narrow = out.new_empty(len(x), len(low.a))
            self._narrow.append(narrow)  # calls hold addresses, not tensors
            calls += [_product(x, low.a, None, narrow), _added_product(narrow, low.b, out)]
        return calls

    def _prepared_store(self, layer: Layer) -> RopeAndStore:
        """One for all layers: they differ in addresses alone."""
        batch, model = self.batch, self._model
        keys, values = batch.cache.layer(0)
        return RopeAndStore(
            *(self._q, self._k, self._v, keys, values, batch.slots),
            positions=batch.positions,
            cos=model.cos,
            sin=model.sin,
            q_norm=layer.q_norm,
            k_norm=layer.k_norm,
            norm_eps=model.eps,
            validate=False,
        )

    def _prepared_attention(self, layer: Layer, keys: Tensor, values: Tensor) -> Decode:
        """One for all layers of the same window."""
        kind, batch = (layer.scale, layer.window), self.batch
        if kind not in self._attend:
            call = Decoding(batch.page_table, batch.context_lengths, *kind, batch.max_context)
            self._attend[kind] = self._model.attention.decode.decoding(
                self._q, keys, values, self._attended, call
            )
        return self._attend[kind]

    def _norm(self, x: Tensor, weight: Tensor, residual: Tensor | None) -> Call:
        eps = self._model.eps
        alike = x.dtype is weight.dtype is self._hidden.dtype
        if alike and dispatch.choose("rms_norm", None, x, weight).impl == "cpu":
            return prepare_norm(x, weight, eps, residual, 0.0, self._hidden)
        return partial(rms_norm, x, weight, eps, residual=residual, out=self._hidden)


def _silu_mul(gate_up: Tensor, out: Tensor) -> Call:
    if dispatch.choose("silu_mul", None, gate_up).impl == "cpu":
        return prepare_silu_mul(gate_up, out)
    return partial(silu_mul, gate_up, out=out)


def _few(x: Tensor, weight: Tensor) -> bool:
    rows, width = x.shape
    narrow = width < WIDE and rows <= MANY_ROWS and x.nbytes <= CACHED_BYTES
    if not narrow and rows > FEW_ROWS:
        return False
    return dispatch.choose("linear_small", None, x, weight).impl == "cpu"


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Call:
    if _few(x, weight):
        return prepare_linear(x, weight, bias, None, out)
    if bias is None:
        return partial(torch.mm, x, weight.t(), out=out)
    return partial(torch.addmm, bias, x, weight.t(), out=out)


def _added_product(x: Tensor, weight: Tensor, out: Tensor) -> Call:
    """out += x weight^T."""
    if _few(x, weight):
        return prepare_linear(x, weight, None, out, out)
    return partial(torch.addmm, out, x, weight.t(), out=out)


def vocabulary_product(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Call:
    """Logits in fp32, of operands in the type of x, as the trainer's ops make them."""
    if x.dtype is torch.float32:
        return _product(x, weight, bias, out)
    head = Head(weight, bias, x.dtype)
    return partial(_logits, head, x, out)


def _logits(head: Head, x: Tensor, out: Tensor) -> None:
    head.logits(head.operand(x), out)
