"""Inputs of the tests of the paged ops, and the truth in fp64 written without pages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from rlhf_fast_kernels import native, triton_support

needs_cpu = pytest.mark.skipif(
    native.missing("PagedAttention", "RopeAndStore") is not None, reason="no compiled module"
)
needs_triton = pytest.mark.skipif(
    not triton_support.installed() or torch.cuda.is_available(), reason="needs the interpreter"
)
EVERY = (
    "reference",
    pytest.param("cpu", marks=needs_cpu),
    pytest.param("triton", marks=needs_triton),
)
FAST = EVERY[1:]
GARBAGE = -(2**30)


@dataclass(frozen=True)
class Cache:
    """Sequences in shuffled pages. Whatever no query may see is NaN, or an absurd page id."""

    q: Tensor
    keys: Tensor
    values: Tensor
    table: Tensor
    contexts: Tensor
    offsets: Tensor | None
    dense: tuple[tuple[Tensor, Tensor], ...]  # keys and values [context, Hkv, D] of each sequence

    def arguments(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        return self.q, self.keys, self.values, self.table, self.contexts, self.offsets

    def only(self, s: int) -> Cache:
        """Sequence s alone, with the same pages."""
        bounds = range(len(self.q) + 1) if self.offsets is None else self.offsets.tolist()
        q = self.q[bounds[s] : bounds[s + 1]]
        offsets = None if self.offsets is None else torch.tensor([0, len(q)], dtype=torch.int32)
        rows = slice(s, s + 1)
        dense = (self.dense[s],)
        return replace(
            self,
            q=q,
            table=self.table[rows],
            contexts=self.contexts[rows],
            offsets=offsets,
            dense=dense,
        )


def draw(
    contexts: Sequence[int],
    queries: Sequence[int] | None = None,
    *,
    heads: tuple[int, int] = (4, 2),
    width: int = 32,
    page_size: int = 16,
    dtype: torch.dtype = torch.float32,
    head_major: bool = False,
    seed: int = 0,
) -> Cache:
    """Sequences of these contexts, the last `queries` tokens of each asking (None: one each)."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    blocks = [-(-context // page_size) for context in contexts]
    columns, pages = max([1, *blocks]) + 1, sum(blocks) + 2
    shape = (
        (pages, heads[1], page_size, width) if head_major else (pages, page_size, heads[1], width)
    )
    keys, values = (torch.full(shape, torch.nan, dtype=dtype) for _ in range(2))
    if head_major:
        keys, values = keys.transpose(1, 2), values.transpose(1, 2)
    table = torch.full((len(contexts), columns), GARBAGE, dtype=torch.int32)
    free = torch.randperm(pages, generator=generator).tolist()
    dense = []
    for s, context in enumerate(contexts):
        k, v = normal(context, heads[1], width), normal(context, heads[1], width)
        for block in range(blocks[s]):
            page = free.pop()
            table[s, block] = page
            part = slice(block * page_size, min(context, (block + 1) * page_size))
            keys[page, : part.stop - part.start] = k[part]
            values[page, : part.stop - part.start] = v[part]
        dense.append((k, v))
    counts = [1] * len(contexts) if queries is None else list(queries)
    q = normal(sum(counts), heads[0] + 2 * heads[1], width)[:, : heads[0]]  # as in a fused product
    offsets = None
    if queries is not None:
        offsets = torch.tensor([0, *counts]).cumsum(0).int()
    return Cache(
        q, keys, values, table, torch.tensor(contexts, dtype=torch.int32), offsets, tuple(dense)
    )


def truth(
    cache: Cache,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    window: int | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """One query and head at a time, from the definition; sums in `dtype`."""
    bounds = range(len(cache.q) + 1) if cache.offsets is None else cache.offsets.tolist()
    out = torch.zeros(cache.q.shape, dtype=dtype)
    group = cache.q.shape[1] // cache.keys.shape[2]
    scale = cache.q.shape[2] ** -0.5 if scale is None else scale
    for s, (k, v) in enumerate(cache.dense):
        for n in range(bounds[s], bounds[s + 1]):
            position = len(k) - (bounds[s + 1] - n)
            low = 0 if window is None else max(0, position - window + 1)
            for h in range(cache.q.shape[1] if position >= 0 else 0):
                seen = k[low : position + 1, h // group].to(dtype)
                scores = seen @ cache.q[n, h].to(dtype) * scale
                if softcap is not None:
                    scores = softcap * torch.tanh(scores / softcap)
                weights = torch.softmax(scores, 0)
                out[n, h] = weights @ v[low : position + 1, h // group].to(dtype)
    return out


def assert_close(got: Tensor, cache: Cache, **settings: float | None) -> None:
    """No further from fp64 than the same sums in the input's dtype, plus a small epsilon."""
    exact = truth(cache, **settings)  # type: ignore[arg-type]
    eager = truth(cache, dtype=cache.q.dtype, **settings)  # type: ignore[arg-type]
    allowed = (eager.double() - exact).abs().max() if exact.numel() else torch.tensor(0.0)
    epsilon = 5e-6 if cache.q.dtype == torch.float32 else 4e-3
    assert got.dtype == cache.q.dtype
    assert got.shape == cache.q.shape
    torch.testing.assert_close(got.double(), exact, rtol=0, atol=float(allowed) + epsilon)
