"""The Triton kernels of the paged ops on a device: parity, bits, CUDA graphs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from rlhf_fast_kernels import PagedAttention, RopeAndStore, paged_attention, rope_and_store
from tests.kernels.paged_cases import Cache, assert_close, draw

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CONTEXTS = (1, 0, 16, 17, 130, 700)


def on_device(cache: Cache) -> Cache:
    offsets = None if cache.offsets is None else cache.offsets.cuda()
    indices = {"table": cache.table.cuda(), "contexts": cache.contexts.cuda(), "offsets": offsets}
    return replace(
        *(cache,),
        q=cache.q.cuda(),
        keys=cache.keys.cuda(),
        values=cache.values.cuda(),
        **indices,  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("queries", [None, [1, 0, 16, 5, 130, 90]])
@pytest.mark.parametrize("width", [32, 80, 128, 256])
@pytest.mark.parametrize("heads", [(2, 2), (8, 2), (32, 1)])
@pytest.mark.parametrize("options", [{}, {"softcap": 30.0, "window": 40}])
def test_attention_equals_fp64(
    dtype: torch.dtype,
    queries: list[int] | None,
    width: int,
    heads: tuple[int, int],
    options: dict[str, Any],
) -> None:
    cache = draw(CONTEXTS, queries, heads=heads, width=width, dtype=dtype)
    got = paged_attention(*on_device(cache).arguments(), **options, impl="triton")
    assert_close(got.cpu(), cache, **options)


@pytest.mark.parametrize("queries", [None, [1, 0, 16, 5, 130, 90]])
def test_bits_do_not_depend_on_the_batch(queries: list[int] | None) -> None:
    cache = on_device(draw(CONTEXTS, queries, heads=(8, 2), width=128, dtype=torch.bfloat16))
    whole = paged_attention(*cache.arguments(), impl="triton")
    parts = [on_device(cache.only(s)) for s in range(len(CONTEXTS))]
    alone = [paged_attention(*part.arguments(), impl="triton") for part in parts]
    assert torch.equal(whole, torch.cat(alone))
    assert torch.equal(whole, paged_attention(*cache.arguments(), impl="triton"))


def test_a_graph_follows_lengths_slots_and_positions() -> None:
    cache = on_device(draw([200, 77], width=64, dtype=torch.bfloat16))
    k, v = torch.randn(2, 2, 2, 64, device="cuda", dtype=torch.bfloat16)
    angles = torch.randn(256, 64, device="cuda")
    positions, slots = (cache.contexts - 1).long(), torch.full((2,), -1, device="cuda")
    tables = {"positions": positions, "cos": angles.cos(), "sin": angles.sin()}
    layer = (cache.keys, cache.values)
    q = cache.q.clone()
    store = RopeAndStore(q, k, v, *layer, slots, **tables, impl="triton")  # type: ignore[arg-type]
    arguments = (q, *cache.arguments()[1:])
    attend = PagedAttention(*arguments, impl="triton")
    out = torch.empty_like(q)

    def step() -> None:
        store(q, k, v, *layer)
        attend(q, *layer, out)

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for lengths in ([200, 77], [130, 5], [0, 64]):
        cache.contexts.copy_(torch.tensor(lengths, dtype=torch.int32))
        positions.copy_(torch.tensor(lengths).clamp(min=1) - 1)
        q.copy_(cache.q)
        graph.replay()
        want = cache.q.clone()
        rope_and_store(want, k, v, *layer, slots, **tables, impl="reference")  # type: ignore[arg-type]
        expected = paged_attention(want, *arguments[1:], impl="reference")
        torch.testing.assert_close(out, expected, rtol=2e-2, atol=2e-2)
