"""Forwards of the fused path, laid out: buffers, and calls without arguments.

A step of a small model is bounded by what surrounds its kernels. Here nothing is allocated, checked
or chosen while it runs: the rows of a batch keep their places until one of them ends, so every call
is bound to its buffers when their number changes, and a step is those calls in order. On a GPU the
same fixed addresses are what a CUDA graph needs; on a CPU each thread takes some rows through all
of them (`rlhf_fast_kernels.row_ops`), and likewise some prompts of a prefill.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rlhf_fast_kernels import (
    PagedAttention,
    RopeAndStore,
    dispatch,
    native,
    rms_norm,
    silu_mul,
)
from rlhf_fast_kernels.attention_backends import Decode, Decoding
from rlhf_fast_kernels.linear_head import Head
from rlhf_fast_kernels.linear_small import prepare as prepare_linear
from rlhf_fast_kernels.rms_norm import prepare as prepare_norm
from rlhf_fast_kernels.row_ops import are_bound, on_sequences, prepare_gather
from rlhf_fast_kernels.silu_mul import prepare as prepare_silu_mul

if TYPE_CHECKING:
    from rlhf_fast.engine.fused_adapters import LayerAdapters, LowRank
    from rlhf_fast.engine.fused_forward import FusedForward, Layer
    from rlhf_fast.engine.paged_batch import PagedBatch

Call = Callable[[], object]
# Where our product beats the library's on a CPU (docs/kernels/linear_small.md): where each
# thread takes rows of its own, or as long as the rows stay in a core's cache.
ROWS_OF_THREAD, FEW_ROWS, MANY_ROWS = 8, 8, 256
CACHED_BYTES = 1 << 19


class _Plan:
    """The layers of `batch.ids.numel()` tokens.

    Args:
        model: the parameters.
        batch: its tensors are read by the calls, so they have to stay where they are.

    Attributes:
        calls: to be made in this order.
        logits: fp32, which they write.
    """

    logits: Tensor

    def __init__(self, model: FusedForward, batch: PagedBatch) -> None:
        self.batch = batch
        self._model = model
        rows, shape = batch.ids.numel(), model.cache_shape
        first, width = model.layers[0], model.embedding.shape[1]
        self._new = new = partial(torch.empty, dtype=model.dtype, device=batch.ids.device)
        self._residual = new(rows, width, dtype=model.embedding.dtype)
        wide = first.gate_up.shape[0]
        widths = (width, width, first.qkv.shape[0], model.heads * shape.head_dim, wide, wide // 2)
        # One piece: with small pages, faults took a third of the prefill of a small model.
        room = new(rows * sum(widths))
        native.advise_huge_pages(room)
        parts = (x.view(rows, -1) for x in room.split([rows * w for w in widths]))
        self._hidden, self._update, self._qkv, attended, self._gate_up, self._activated = parts
        self._attended = attended.view(rows, model.heads, shape.head_dim)
        heads = self._qkv.view(rows, -1, shape.head_dim)
        self._q, self._k, self._v = heads.split((model.heads, shape.heads, shape.heads), 1)
        self._narrow: list[Tensor] = []
        self._attend: dict[tuple[float, int | None], Decode] = {}
        self._store = self._prepared_store(first)
        self.calls = [
            prepare_gather(model.embedding, batch.ids, self._residual)
            if model.parallel is None
            else partial(model.parallel.embed, batch.ids, model.embedding, self._residual),
            self._norm(self._residual, first.input_norm, None, self._hidden),
        ]
        for index, (layer, low) in enumerate(zip(model.layers, model.adapters, strict=True)):
            if index > 0:
                self.calls.append(
                    self._norm(self._update, layer.input_norm, self._residual, self._hidden)
                )
            self.calls += self._layer(index, layer, low)

    def _finish(self, update: Tensor, residual: Tensor, hidden: Tensor) -> list[Call]:
        """Final norm and head of some rows."""
        model = self._model
        self.logits = self._new(len(hidden), model.head.shape[0], dtype=torch.float32)
        return [
            self._norm(update, model.final_norm, residual, hidden),
            vocabulary_product(hidden, model.head, model.head_bias, self.logits),
        ]

    def _layer(self, index: int, layer: Layer, low: LayerAdapters) -> list[Call]:
        keys, values = self.batch.cache.layer(index)
        norms = (layer.q_norm, layer.k_norm)
        attend = self._prepared_attention(layer, keys, values)
        attended = self._attended.flatten(1)
        parallel = self._model.parallel
        summed = [] if parallel is None else [partial(parallel.sum, self._update)]
        return [
            *self._products(self._hidden, layer.qkv, layer.qkv_bias, low.qkv, self._qkv),
            self._store.bind(self._q, self._k, self._v, keys, values, *norms),
            attend.bind(self._q, keys, values, self._attended)
            if isinstance(attend, PagedAttention)
            else partial(attend, self._q, keys, values, self._attended),
            *self._products(attended, layer.out, layer.out_bias, low.out, self._update),
            *summed,
            self._norm(self._update, layer.post_norm, self._residual, self._hidden),
            *self._products(
                self._hidden, layer.gate_up, layer.gate_up_bias, low.gate_up, self._gate_up
            ),
            _silu_mul(self._gate_up, self._activated),
            *self._products(self._activated, layer.down, layer.down_bias, low.down, self._update),
            *summed,
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
        kind = layer.scale, layer.window
        if kind not in self._attend:
            self._attend[kind] = self._attention(*kind, keys, values)
        return self._attend[kind]

    def _attention(self, scale: float, window: int | None, keys: Tensor, values: Tensor) -> Decode:
        raise NotImplementedError

    def _norm(self, x: Tensor, weight: Tensor, residual: Tensor | None, out: Tensor) -> Call:
        eps = self._model.eps
        alike = x.dtype is weight.dtype is out.dtype
        if alike and dispatch.choose("rms_norm", None, x, weight).impl == "cpu":
            return prepare_norm(x, weight, eps, residual, 0.0, out)
        return partial(rms_norm, x, weight, eps, residual=residual, out=out)


class DecodePlan(_Plan):
    """A decoding step, one token a row; `logits` [rows, V] are overwritten by the next."""

    def __init__(self, model: FusedForward, batch: PagedBatch) -> None:
        super().__init__(model, batch)
        self.calls += self._finish(self._update, self._residual, self._hidden)

    def _attention(self, scale: float, window: int | None, keys: Tensor, values: Tensor) -> Decode:
        batch = self.batch
        call = Decoding(batch.page_table, batch.context_lengths, scale, window, batch.max_context)
        return self._model.attention.decode.decoding(self._q, keys, values, self._attended, call)


class PrefillPlan(_Plan):
    """A prefill of many short prompts on a CPU: threads take whole prompts through all layers.

    Attributes:
        logits: [S, V], after the last token of each sequence of the batch.
    """

    def __init__(self, model: FusedForward, batch: PagedBatch) -> None:
        super().__init__(model, batch)
        assert batch.cu_queries is not None
        ends = self._ends = batch.cu_queries[1:].long() - 1
        update, residual = (
            x.new_empty(len(ends), x.shape[1]) for x in (self._update, self._residual)
        )
        self._of_ends = update, residual, self._new(*update.shape)
        self._last = [
            prepare_gather(self._update, ends, update),
            prepare_gather(self._residual, ends, residual),
            *self._finish(*self._of_ends),
        ]

    def _attention(self, scale: float, window: int | None, keys: Tensor, values: Tensor) -> Decode:
        batch = self.batch
        return PagedAttention(
            *(self._q, keys, values, batch.page_table, batch.context_lengths, batch.cu_queries),
            scale=scale,
            window=window,
            out=self._attended,
            max_context=batch.max_context,
            max_query=batch.max_query,
            validate=False,
        )

    @staticmethod
    def pays(batch: PagedBatch) -> bool:
        """Whether there are enough prompts to keep all threads busy with whole ones."""
        if batch.cu_queries is None or batch.ids.device.type != "cpu":
            return False
        threads, prompts = torch.get_num_threads(), len(batch.cu_queries) - 1
        return prompts >= 2 * threads and batch.max_query * threads <= batch.ids.numel()

    def run(self) -> Tensor | None:
        """Logits of `batch.rows`; None, and nothing done, if an op has no C++ here."""
        batch = self.batch
        if batch.cu_queries is None or not are_bound([*self.calls, *self._last]):
            return None
        on_sequences(self.calls, self._last, batch.cu_queries, batch.ids.numel())()
        if batch.rows is None or len(batch.rows) == len(self._ends):
            return self.logits
        return self.logits[torch.searchsorted(self._ends, batch.rows)]


def _silu_mul(gate_up: Tensor, out: Tensor) -> Call:
    if dispatch.choose("silu_mul", None, gate_up).impl == "cpu":
        return prepare_silu_mul(gate_up, out)
    return partial(silu_mul, gate_up, out=out)


def _ours(x: Tensor, weight: Tensor) -> bool:
    rows = len(x)
    cached = rows <= MANY_ROWS and x.nbytes <= CACHED_BYTES
    many = rows >= ROWS_OF_THREAD * torch.get_num_threads()
    if not (cached or many or rows <= FEW_ROWS):
        return False
    return dispatch.choose("linear_small", None, x, weight).impl == "cpu"


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Call:
    if _ours(x, weight):
        return prepare_linear(x, weight, bias, None, out)
    if bias is None:
        return partial(torch.mm, x, weight.t(), out=out)
    return partial(torch.addmm, bias, x, weight.t(), out=out)


def _added_product(x: Tensor, weight: Tensor, out: Tensor) -> Call:
    """out += x weight^T."""
    if _ours(x, weight):
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
