"""The ops, one size at a time; the others are small, and large enough that arithmetic counts."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rlhf_fast_kernels import (
    gae,
    kl_from_logits,
    linear_logprobs,
    linear_ppo_loss,
    logprobs_from_logits,
    packed_attention,
    paged_attention,
    ppo_loss,
    rewards_and_gae,
    rms_norm,
    sample,
    whiten,
)

from .subject import Run, Subject, powers

PAGE = 16


def _normal(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator)


def _labels(rows: int, vocab: int) -> Tensor:
    return torch.arange(rows) % vocab


def logprobs(rows: int = 64, vocab: int = 4096) -> Run:
    logits, labels = _normal(rows, vocab), _labels(rows, vocab)
    return lambda: logprobs_from_logits(logits, labels, with_entropy=True)


def kl(rows: int = 64, vocab: int = 4096) -> Run:
    logits, others = _normal(rows, vocab), _normal(rows, vocab).flip(0)
    return lambda: kl_from_logits(logits, others)


def draw(rows: int = 16, vocab: int = 4096, top_p: float = 1.0) -> Run:
    logits = _normal(rows, vocab)
    seeds = torch.arange(rows)
    return lambda: sample(logits, seeds=seeds, step=0, top_p=top_p)


def linear(tokens: int = 128, hidden: int = 128, vocab: int = 2048) -> Run:
    x, weight, labels = _normal(tokens, hidden), _normal(vocab, hidden), _labels(tokens, vocab)
    return lambda: linear_logprobs(x, weight, labels)


def linear_loss(tokens: int = 128, hidden: int = 128, vocab: int = 2048) -> Run:
    x = _normal(tokens, hidden).requires_grad_()
    weight = (_normal(vocab, hidden) / hidden**0.5).requires_grad_()
    labels, advantages = _labels(tokens, vocab), _normal(tokens)
    old = torch.full((tokens,), -8.0)

    def run() -> None:
        out = linear_ppo_loss(
            *(x, weight, labels),
            mask=torch.ones(tokens, dtype=torch.bool),
            normalizer=torch.tensor(tokens),
            old_logprobs=old,
            advantages=advantages,
        )
        torch.autograd.grad(out.loss, (x, weight))

    return run


def loss(tokens: int) -> Run:
    old, advantages = _normal(tokens) - 2.0, _normal(tokens)
    mask = torch.ones(tokens, dtype=torch.bool)

    def run() -> None:
        logprobs = old.clone().requires_grad_()
        out = ppo_loss(
            mask=mask,
            normalizer=torch.tensor(tokens),
            logprobs=logprobs,
            old_logprobs=old,
            advantages=advantages,
        )
        out.loss.backward()

    return run


def advantages(rows: int = 64, columns: int = 256, fused: bool = False) -> Run:
    old, ref, values = (_normal(rows, columns) for _ in range(3))
    mask = torch.ones(rows, columns, dtype=torch.bool)
    scores = _normal(rows)
    if not fused:
        return lambda: gae(old, values, mask, gamma=0.99, gae_lambda=0.95)

    def run() -> None:
        settings = {"kl_coef": 0.05, "gamma": 1.0, "gae_lambda": 0.95}
        out = rewards_and_gae(old, ref, values, scores, mask, **settings)
        whiten(out.advantages, mask, stats=out.moments)

    return run


def attention(segments: int = 8, length: int = 64) -> Run:
    """Forward and backward of 4 heads of 32."""
    heads, width = 4, 32
    q, k, v = (_normal(segments * length, heads, width).requires_grad_() for _ in range(3))
    offsets = torch.arange(0, segments * length + 1, length, dtype=torch.int32)

    def run() -> None:
        out, _ = packed_attention(q, k, v, offsets)
        torch.autograd.grad(out.sum(), (q, k, v))

    return run


def decoding(rows: int = 16, context: int = 256) -> Run:
    """One query a row over 4 heads of 32."""
    heads, width = 4, 32
    each = -(-context // PAGE)
    keys, values = (_normal(rows * each, PAGE, heads, width) for _ in range(2))
    table = torch.arange(rows * each, dtype=torch.int32).view(rows, each)
    lengths = torch.full((rows,), context, dtype=torch.int32)
    q = _normal(rows, heads, width)
    return lambda: paged_attention(q, keys, values, table, lengths)


def norm(rows: int = 64, columns: int = 256) -> Run:
    x, weight = _normal(rows, columns), _normal(columns)
    return lambda: rms_norm(x, weight, 1e-6)


def subjects() -> list[Subject]:
    """All of them."""

    def of(name: str, axis: str, make: Callable[[int], Run], first: int, count: int) -> Subject:
        return Subject(name, axis, make, powers(first, count))

    def chain(columns: int) -> Run:
        return advantages(columns=columns, fused=True)

    def by_length(length: int) -> Run:
        return attention(length=length)

    return [
        of("logprobs_from_logits", "rows", lambda n: logprobs(rows=n), 32, 6),
        of("logprobs_from_logits", "vocabulary", lambda n: logprobs(vocab=n), 2048, 6),
        of("kl_from_logits", "vocabulary", lambda n: kl(vocab=n), 2048, 6),
        of("sample", "rows", lambda n: draw(rows=n), 16, 6),
        of("sample", "vocabulary", lambda n: draw(vocab=n), 4096, 6),
        of("sample, top-p", "vocabulary", lambda n: draw(vocab=n, top_p=0.9), 4096, 6),
        of("linear_logprobs", "tokens", lambda n: linear(tokens=n), 64, 6),
        of("linear_logprobs", "width", lambda n: linear(hidden=n), 64, 6),
        of("linear_logprobs", "vocabulary", lambda n: linear(vocab=n), 1024, 6),
        of("linear_ppo_loss", "tokens", lambda n: linear_loss(tokens=n), 64, 6),
        of("linear_ppo_loss", "width", lambda n: linear_loss(hidden=n), 64, 6),
        of("linear_ppo_loss", "vocabulary", lambda n: linear_loss(vocab=n), 1024, 6),
        of("ppo_loss", "tokens", loss, 4096, 7),
        # All sizes beyond the second-level cache, or its end would be the slope.
        of("gae", "rows", lambda n: advantages(rows=n), 1024, 5),
        of("gae", "length", lambda n: advantages(columns=n), 4096, 5),
        of("rewards_and_gae + whiten", "length", chain, 2048, 5),
        of("packed_attention", "segments", lambda n: attention(segments=n), 4, 6),
        Subject("packed_attention", "length", by_length, powers(64, 6), {"": 2.0}),
        of("paged_attention", "rows", lambda n: decoding(rows=n), 8, 6),
        of("paged_attention", "context", lambda n: decoding(context=n), 128, 6),
        of("rms_norm", "rows", norm, 256, 6),
    ]
