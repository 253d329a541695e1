"""The growing cache layer against concatenation, through growth, expansion and compaction."""

from __future__ import annotations

import torch
from transformers import LlamaConfig
from transformers.cache_utils import DynamicLayer

from rlhf_fast.engine.kv_cache import DecodeCache, GrowingLayer


def _config() -> LlamaConfig:
    return LlamaConfig(num_hidden_layers=1, hidden_size=8, num_attention_heads=2)


def test_holds_what_concatenation_holds_while_rows_leave() -> None:
    generator = torch.Generator().manual_seed(0)

    def states(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
        shape = (rows, 2, columns, 4)
        return torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)

    cache, oracle = DecodeCache(_config()), DynamicLayer()
    keys, values = states(3, 5)
    cache.hf.update(keys, values, 0)
    oracle.update(keys, values)
    index = torch.tensor([0, 0, 1, 2, 2, 2])
    cache.expand(index)
    oracle.batch_select_indices(index)
    # Row i keeps its place or takes one from the end, as after finished rows 1 and 2.
    leaving = {7: torch.tensor([0, 5, 4, 3]), 20: torch.tensor([0, 1]), 30: torch.tensor([1])}
    rows = 6
    for step in range(40):
        keys, values = states(rows, 3 if step == 12 else 1)
        got = cache.hf.update(keys, values, 0)
        expected = oracle.update(keys, values)
        assert torch.equal(got[0], expected[0])
        assert torch.equal(got[1], expected[1])
        assert cache.hf.get_seq_length() == oracle.get_seq_length()
        if step in leaving:
            cache.keep(leaving[step])
            oracle.batch_select_indices(leaving[step])
            rows = leaving[step].numel()


def test_capacity_stays_near_the_length_and_copies_stay_rare() -> None:
    layer, one = GrowingLayer(), torch.zeros(1, 1, 1, 2)
    layer.update(one, one)
    layer.expand(torch.tensor([0]))
    capacities = set()
    for _ in range(1000):
        layer.update(one, one)
        capacity = layer.keys.shape[2]
        capacities.add(capacity)
        assert layer.length <= capacity <= layer.length + max(4, layer.length // 8 + 1)
    assert len(capacities) < 50
