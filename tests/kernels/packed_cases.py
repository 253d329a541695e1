"""Inputs of the tests of `packed_attention`, with the truth in fp64 and eager PyTorch beside it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf_fast_kernels import packed_attention

Results = tuple[Tensor, ...]


@dataclass(frozen=True)
class Batch:
    """Segments with what comes down on their output."""

    q: Tensor
    k: Tensor
    v: Tensor
    offsets: Tensor
    above: Tensor

    def to(self, dtype: torch.dtype) -> Batch:
        parts = (x.to(dtype) for x in (self.q, self.k, self.v))
        return Batch(*parts, self.offsets, self.above.to(dtype))


def draw(
    lengths: Sequence[int],
    heads: tuple[int, int] = (4, 2),
    width: int = 24,
    dtype: torch.dtype = torch.float32,
    layout: str = "fused",
    seed: int = 0,
) -> Batch:
    """fused: q, k and v are views of one product; heads: of `[heads, N, D]`."""
    generator = torch.Generator().manual_seed(seed)
    tokens, (query_heads, kv_heads) = sum(lengths), heads
    every = query_heads + 2 * kv_heads
    fused = torch.randn(tokens, every, width, generator=generator).to(dtype)
    if layout == "heads":
        fused = fused.transpose(0, 1).contiguous().transpose(0, 1)
    q, k, v = fused.split((query_heads, kv_heads, kv_heads), 1)
    above = torch.randn(tokens, query_heads, width, generator=generator).to(dtype)
    offsets = torch.tensor([0, *lengths]).cumsum(0).int()
    return Batch(q, k, v, offsets, above)


def eager(batch: Batch, scale: float, window: int | None) -> tuple[Tensor, Tensor]:
    """The plain operations, segment by segment, in the dtype of the inputs."""
    outs, masses = [], []
    group = batch.q.shape[1] // batch.k.shape[1]
    lengths = batch.offsets.diff().tolist()
    parts = (x.split(lengths) for x in (batch.q, batch.k, batch.v))
    for q, k, v in zip(*parts, strict=True):
        k, v = (x.repeat_interleave(group, 1).transpose(0, 1) for x in (k, v))
        index = torch.arange(len(q))
        distance = index[:, None] - index
        hidden = (distance < 0) | (distance >= (window or len(q) + 1))
        scores = (q.transpose(0, 1) @ k.transpose(1, 2) * scale).masked_fill(hidden, -torch.inf)
        masses.append(scores.float().logsumexp(-1).T)
        outs.append((scores.softmax(-1) @ v).transpose(0, 1))
    return torch.cat(outs), torch.cat(masses)


def with_gradients(batch: Batch, attend: Callable[[Batch], tuple[Tensor, Tensor]]) -> Results:
    """(out, gradients of q, k and v, lse)."""
    q, k, v = (x.detach().requires_grad_() for x in (batch.q, batch.k, batch.v))
    out, lse = attend(Batch(q, k, v, batch.offsets, batch.above))
    return out.detach(), *torch.autograd.grad(out, (q, k, v), batch.above), lse.detach()


def ours(batch: Batch, impl: str, **options: object) -> Results:
    def attend(inputs: Batch) -> tuple[Tensor, Tensor]:
        q, k, v = inputs.q, inputs.k, inputs.v
        return packed_attention(q, k, v, inputs.offsets, impl=impl, **options)  # type: ignore[arg-type]

    return with_gradients(batch, attend)


def assert_as_good(
    batch: Batch, impl: str, *, scale: float | None = None, window: int | None = None
) -> None:
    """Against fp64 no further off than eager PyTorch of the same dtype, plus a few roundings."""
    factor = batch.q.shape[-1] ** -0.5 if scale is None else scale
    got = ours(batch, impl, scale=scale, window=window)
    exact = with_gradients(batch.to(torch.float64), lambda x: eager(x, factor, window))
    peer = with_gradients(batch, lambda x: eager(x, factor, window))
    unit = torch.finfo(batch.q.dtype).eps
    # What is added up in a gradient is this large, also where it cancels: a token that sees itself
    # alone has the difference of two equal sums over the head's width.
    terms = 1.0
    if len(batch.v):
        above, v = (x.float().abs().flatten(0, 1) for x in (batch.above, batch.v))
        terms = max(1.0, abs(factor) * float((above @ v.t()).max()))
    for name, x, y, z in zip(("out", "q", "k", "v"), got, peer, exact, strict=False):
        assert x.dtype == batch.q.dtype
        assert x.shape == z.shape
        if z.numel() == 0:
            continue
        size = max(terms, float(z.abs().max()))
        error, allowed = (float((w.double() - z).abs().max()) for w in (x, y))
        assert error <= allowed + 8 * unit * size, (name, error, allowed, size)
    assert got[-1].dtype == torch.float32
    torch.testing.assert_close(got[-1].double(), exact[-1].double(), rtol=2e-6, atol=4e-6)
