"""Key-value memory of a decoding batch: allocated once, written in place, compacted in place.

transformers' `DynamicCache` concatenates, that is, copies every key and value of every layer at
every token. Here a layer owns [rows, heads, capacity, head_dim] from the start of decoding; a step
writes one column and attention reads a view. When rows finish, surviving rows from the end of the
batch move into the holes, so only as many rows move as there are holes.

Architectures whose cache is not plain full attention (sliding windows, linear attention, hybrids)
keep transformers' own layers, through the same two operations `expand` and `keep`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer


class PreallocatedLayer(DynamicLayer):
    """One layer's keys and values; the first update (the prefill) is kept as it comes."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = 0
        self.length = 0

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append [rows, heads, q, head_dim]; returns views of everything so far."""
        if not self.is_initialized:
            self.dtype, self.device = key_states.dtype, key_states.device
            self.keys, self.values = key_states, value_states
            self.rows, self.length = key_states.shape[0], key_states.shape[2]
            self.is_initialized = True
            return key_states, value_states
        start, self.length = self.length, self.length + key_states.shape[2]
        self.keys[: self.rows, :, start : self.length] = key_states
        self.values[: self.rows, :, start : self.length] = value_states
        return (
            self.keys[: self.rows, :, : self.length],
            self.values[: self.rows, :, : self.length],
        )

    def get_seq_length(self) -> int:
        """Tokens held for each row."""
        return self.length

    def expand(self, index: Tensor, capacity: int) -> None:
        """Allocate `capacity` columns for len(index) rows; row i starts as prefill row index[i]."""
        self.keys = self._expanded(self.keys, index, capacity)
        self.values = self._expanded(self.values, index, capacity)
        self.rows = index.numel()

    def _expanded(self, prefill: Tensor, index: Tensor, capacity: int) -> Tensor:
        _, heads, _, width = prefill.shape
        buffer = prefill.new_empty(index.numel(), heads, capacity, width)
        buffer[:, :, : self.length] = prefill[index]
        return buffer

    def move(self, target: Tensor, source: Tensor, rows: int) -> None:
        """Copy rows `source` over rows `target`, then keep the first `rows` rows."""
        for buffer in (self.keys, self.values):
            buffer[target, :, : self.length] = buffer[source, :, : self.length]
        self.rows = rows


class DecodeCache:
    """The cache of one decoding batch.

    Args:
        config: configuration of the model; decides which kind of layer each layer gets.

    Attributes:
        hf: what the model's forward receives as `past_key_values`.
    """

    def __init__(self, config: Any) -> None:
        dynamic = DynamicCache(config=config)
        layers = dynamic.layers
        self._plain = bool(layers) and all(type(layer) is DynamicLayer for layer in layers)
        self.hf = Cache(layers=[PreallocatedLayer() for _ in layers]) if self._plain else dynamic

    def expand(self, index: Tensor, capacity: int) -> None:
        """After the prefill: decoding row i continues prefill row index[i].

        Args:
            index: [rows] int64 prefill rows; a prompt shared by a group appears once a sample.
            capacity: tokens a row may come to hold, prompt included.
        """
        if not self._plain:
            self.hf.reorder_cache(index)
            return
        for layer in self.hf.layers:
            layer.expand(index, capacity)

    def keep(self, index: Tensor) -> None:
        """Continue with rows `index` only: row i becomes what row index[i] is now.

        Args:
            index: [n] int64, with index[i] either i or one of the rows n and above.
        """
        if not self._plain:
            self.hf.reorder_cache(index)
            return
        target = (index != torch.arange(index.numel(), device=index.device)).nonzero().squeeze(-1)
        source = index[target]
        for layer in self.hf.layers:
            layer.move(target, source, index.numel())
