"""Key-value memory of a decoding batch: written in place, grown rarely, compacted in place.

transformers' `DynamicCache` concatenates, that is, copies every key and value of every layer at
every token. Here a layer owns [rows, heads, capacity, head_dim]; a step writes one column and
attention reads a view. Capacity runs at most an eighth ahead of the tokens. Allocating it all at
the start would avoid the rare copies, but CPU attention over a view of 36 of 50 columns takes twice
as long as over 36 of 40 (the gaps defeat the prefetcher): on a 0.36 M Llama with 256 rows a step
costs 10.6 ms of CPU time with everything allocated, 9.4 ms with concatenation, 8.5 ms like this.
When rows finish, surviving rows from the end of the batch move into the holes, so only as many rows
move as there are holes.

Architectures whose cache is not plain full attention (sliding windows, linear attention, hybrids)
keep transformers' own layers, through the same two operations `expand` and `keep`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

_LEAST_GROWTH = 4
_GROWTH_FRACTION = 8


class GrowingLayer(DynamicLayer):
    """One layer's keys and values; the first update (the prefill) is kept as it comes."""

    keys: Any
    values: Any

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
        rows = slice(self.rows)
        if self.length > self.keys.shape[2]:
            self.keys = _grown(self.keys[rows, :, :start], self.length)
            self.values = _grown(self.values[rows, :, :start], self.length)
        self.keys[rows, :, start : self.length] = key_states
        self.values[rows, :, start : self.length] = value_states
        return self.keys[rows, :, : self.length], self.values[rows, :, : self.length]

    def get_seq_length(self) -> int:
        """Tokens held for each row."""
        return self.length

    def expand(self, index: Tensor) -> None:
        """Decoding row i starts as prefill row index[i]."""
        self.keys = _grown(self.keys[index], self.length)
        self.values = _grown(self.values[index], self.length)
        self.rows = index.numel()

    def move(self, target: Tensor, source: Tensor, rows: int) -> None:
        """Copy rows `source` over rows `target`, then keep the first `rows` rows."""
        for buffer in (self.keys, self.values):
            buffer[target, :, : self.length] = buffer[source, :, : self.length]
        self.rows = rows


def _grown(states: Tensor, needed: int) -> Tensor:
    """The same states with room for `needed` columns and a fraction more, so copies are rare."""
    rows, heads, length, width = states.shape
    capacity = needed + max(_LEAST_GROWTH, needed // _GROWTH_FRACTION)
    buffer = states.new_empty(rows, heads, capacity, width)
    buffer[:, :, :length] = states
    return buffer


def keeps_keys_and_values(config: Any) -> bool:
    """False for models all of whose layers keep a recurrent state instead (Mamba)."""
    layers = DynamicCache(config=config).layers
    return not layers or any(isinstance(layer, DynamicLayer) for layer in layers)


class DecodeCache:
    """The cache of one decoding batch.

    Args:
        config: configuration of the model; decides which kind of layer each layer gets.

    Attributes:
        hf: what the model's forward receives as its cache.
    """

    def __init__(self, config: Any) -> None:
        dynamic = DynamicCache(config=config)
        layers = dynamic.layers
        self._plain = bool(layers) and all(type(layer) is DynamicLayer for layer in layers)
        self._layers = [GrowingLayer() for _ in layers] if self._plain else []
        self.hf: Any = Cache(layers=list(self._layers)) if self._plain else dynamic

    def expand(self, index: Tensor) -> None:
        """After the prefill: decoding row i continues prefill row index[i].

        Args:
            index: [rows] int64 prefill rows; a prompt shared by a group appears once a sample.
        """
        if not self._plain:
            self.hf.reorder_cache(index)
            return
        for layer in self._layers:
            layer.expand(index)

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
        for layer in self._layers:
            layer.move(target, source, index.numel())
