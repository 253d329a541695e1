"""The least time of a rollout in fp32 on this CPU, from what was measured in the same process.

An engine that generates these tokens with this arithmetic multiplies the shapes of its layers and
reads the keys and values of every context once a step; it may do all else in no time. `Floor` puts
each product at the best rate that its shape reached here (PyTorch's, ours with the threads on one
product, ours with each thread on rows of its own; weights in the caches), and the keys and values
at the best rate at which a plain reduction read as many bytes again and again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Protocol

import torch

from rlhf_fast_kernels import native
from rlhf_fast_kernels.linear_small import prepare
from rlhf_fast_kernels.row_ops import Steps

_SAMPLES = 7
_SECONDS = 2e-3  # of a sample: many calls of a small product


class Llama(Protocol):
    """Sizes of a model."""

    vocab: int
    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int


def _best_seconds(call: Callable[[], object]) -> float:
    """Of the fastest sample."""
    start = time.perf_counter()
    call()
    calls = max(1, int(_SECONDS / max(time.perf_counter() - start, 1e-7)))
    best = float("inf")
    for _ in range(_SAMPLES):
        start = time.perf_counter()
        for _ in range(calls):
            call()
        best = min(best, (time.perf_counter() - start) / calls)
    return best


@cache
def product_seconds(rows: int, inner: int, columns: int) -> float:
    """[rows, inner] times [inner, columns], the fastest way."""
    x, weight = torch.randn(rows, inner), torch.randn(columns, inner)
    out = torch.empty(rows, columns)
    ways: list[Callable[[], object]] = [partial(torch.mm, x, weight.t(), out=out)]
    if native.missing("linear_small", "BoundOps") is None:
        ours = prepare(x, weight, None, None, out)
        ways += [ours, partial(Steps([ours]).run, rows)]
    return min(map(_best_seconds, ways))


@cache
def read_gb_per_s(megabytes: int) -> float:
    """Of a buffer that is read again and again; small ones stay in the caches."""
    x = torch.ones(megabytes << 18)
    native.advise_huge_pages(x)
    reductions: tuple[Callable[[], object], ...] = (x.sum, x.amax, partial(torch.dot, x, x))
    return x.nbytes / min(map(_best_seconds, reductions)) / 1e9


class Floor:
    """The least seconds of a rollout, in parts.

    Args:
        shape: of the model.
        prompt: tokens of each prompt.
        lengths: tokens of each response.

    Attributes:
        products: of the decoding steps.
        reads: of keys and values, all steps.
        prefill: products of the prompts.
        products_gflop_per_s, read_gb_per_s: at which they were put.
    """

    def __init__(self, shape: Llama, prompt: int, lengths: Sequence[int]) -> None:
        batch, steps = len(lengths), max(lengths) - 1  # the first token is drawn after the prefill
        read = token_steps = 0
        per_token = 8 * shape.layers * shape.kv_heads * (shape.hidden // shape.heads)  # bytes
        for step in range(1, steps + 1):
            rows = sum(n > step for n in lengths)
            token_steps += rows
            read += rows * (prompt + step) * per_token
        layers = self._seconds(shape, batch)
        head = product_seconds(batch, shape.hidden, shape.vocab)
        # Steps of fewer rows at the rate of all rows, which is no slower.
        self.products = (layers + head) * token_steps / batch
        self.read_gb_per_s = read_gb_per_s(max(1, round(read / max(steps, 1) / (1 << 20))))
        self.reads = read / self.read_gb_per_s / 1e9
        self.prefill = self._seconds(shape, batch * prompt) + head
        self.products_gflop_per_s = self._flops(shape, batch) / (layers + head) / 1e9

    @staticmethod
    def _products(shape: Llama) -> tuple[tuple[int, int], ...]:
        kv = shape.hidden // shape.heads * shape.kv_heads
        return (
            (shape.hidden, shape.hidden + 2 * kv),
            (shape.hidden, shape.hidden),
            (shape.hidden, 2 * shape.inner),
            (shape.inner, shape.hidden),
        )

    def _seconds(self, shape: Llama, rows: int) -> float:
        return shape.layers * sum(product_seconds(rows, *sizes) for sizes in self._products(shape))

    def _flops(self, shape: Llama, rows: int) -> float:
        layer = sum(inner * columns for inner, columns in self._products(shape))
        return 2.0 * rows * (shape.layers * layer + shape.hidden * shape.vocab)

    @property
    def seconds(self) -> float:
        """All of it."""
        return self.products + self.reads + self.prefill
