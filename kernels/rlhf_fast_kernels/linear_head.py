"""The vocabulary head in chunks of rows: logits in fp32 and the two products of the gradient.

    logits = x W^T + b        dx = D W        dW = D^T x        db = sum over rows of D

What the linear ops share. Logits exist for one chunk only. On a GPU, bf16 and fp16 operands go to
cuBLAS as they are and come back in fp32: a product of bf16 numbers is exact in fp32, so only the
result's rounding to bf16, an error of up to 6 % in exp(logit), is saved, at no loss of speed. CPUs
have no such product, so there operands are widened to fp32, the weight tile by tile.

D is what the gradient kernel writes: fp32 over the logits themselves, or the operands' dtype in a
buffer of its own where cuBLAS multiplies that.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from rlhf_fast_kernels.matmul import matmul

# 2^24 logits are 64 MiB. Below 128 rows a CPU's product is bound by reading the weight, above 512
# it gains nothing; on a GPU 4096 rows keep reading and writing dW below a tenth of the product.
CPU_CHUNK_ELEMENTS = 1 << 24
CPU_CHUNK_ROWS = (128, 512)
GPU_CHUNK_ROWS = 4096
# A widened tile of the weight: small enough to stay in a last-level cache.
TILE_ELEMENTS = 1 << 22
_LOW_PRECISION = (torch.bfloat16, torch.float16)


def chunk_bounds(rows: int, vocab: int, device: torch.device, most: int | None) -> list[int]:
    """[0, ..., rows]: bounds of chunks of nearly equal size.

    Args:
        rows: rows in all.
        vocab: columns of the logits.
        device: decides the size where `most` is None.
        most: rows of the largest chunk.
    """
    most = most_chunk_rows(vocab, device) if most is None else most
    count = max(1, -(-rows // most))
    return [rows * i // count for i in range(count + 1)]


def most_chunk_rows(vocab: int, device: torch.device) -> int:
    """Rows of the largest chunk of logits with `vocab` columns, if nobody says otherwise."""
    if device.type != "cpu":
        return GPU_CHUNK_ROWS
    low, high = CPU_CHUNK_ROWS
    return min(max(CPU_CHUNK_ELEMENTS // max(vocab, 1), low), high)


@dataclass(frozen=True)
class Head:
    """Weight and bias of a vocabulary head, as one call uses them.

    Attributes:
        weight: [V, H] or, under tensor parallelism, this rank's rows of it.
        bias: [V] or None.
        compute: dtype whose values are multiplied; hidden states and weight are rounded to it.
    """

    weight: Tensor
    bias: Tensor | None
    compute: torch.dtype

    @property
    def vocab(self) -> int:
        return self.weight.shape[0]

    @property
    def accumulate(self) -> torch.dtype:
        """Dtype of logits and of weight gradients."""
        return torch.float64 if self.compute == torch.float64 else torch.float32

    @property
    def mixed(self) -> bool:
        """Whether the device multiplies the compute dtype into fp32."""
        return self.weight.is_cuda and self.compute in _LOW_PRECISION

    @property
    def gradient_dtype(self) -> torch.dtype:
        """Dtype of D."""
        return self.compute if self.mixed else self.accumulate

    @property
    def gradient_apart(self) -> bool:
        """Whether D needs memory of its own: it cannot lie over logits of another dtype."""
        return self.gradient_dtype != self.accumulate

    def rounded(self) -> Head:
        """The same with the weight in the compute dtype where the device multiplies that."""
        if not self.mixed:
            return self
        return Head(self.weight.to(self.compute), self.bias, self.compute)

    def operand(self, hidden: Tensor) -> Tensor:
        """Rows of hidden states as they enter the products."""
        rounded = hidden.to(self.compute)
        return rounded if self.mixed else rounded.to(self.accumulate)

    def _tiles(self) -> Iterator[tuple[slice, Tensor]]:
        """(rows of the weight, those rows as they enter the products)."""
        if self.mixed or self.weight.dtype == self.compute == self.accumulate:
            yield slice(0, self.vocab), self.weight
            return
        step = max(1, TILE_ELEMENTS // max(self.weight.shape[1], 1))
        for start in range(0, self.vocab, step):
            rows = slice(start, min(start + step, self.vocab))
            yield rows, self.weight[rows].to(self.compute).to(self.accumulate)

    def logits(self, x: Tensor, out: Tensor) -> None:
        """x W^T + b into `out` [n, V], fp32."""
        for rows, tile in self._tiles():
            if self.mixed:
                torch.ops.aten.mm.dtype_out(x, tile.t(), torch.float32, out=out)
            else:
                matmul(x, tile.t(), out=out[:, rows])
        if self.bias is not None:
            out += self.bias.to(out.dtype)

    def hidden_gradient(self, d: Tensor, *, wide: bool = False) -> Tensor:
        """D W, [n, H] in D's dtype, accumulated in fp32; `wide`: left in fp32, to be summed on."""
        if wide and self.mixed:
            return torch.ops.aten.mm.dtype(d, self.weight, torch.float32)
        result: Tensor | None = None
        for rows, tile in self._tiles():
            if result is None:
                result = matmul(d[:, rows], tile)
            else:
                matmul(d[:, rows], tile, result, out=result)
        assert result is not None
        return result

    def add_weight_gradient(self, d: Tensor, x: Tensor, into: Tensor, *, first: bool) -> None:
        """into (+)= D^T x; `first` overwrites what is there."""
        if self.mixed:
            _add_mixed(d, x, into, first)
        else:
            matmul(d.t(), x, None if first else into, out=into)


def _add_mixed(d: Tensor, x: Tensor, into: Tensor, first: bool) -> None:
    if first:
        torch.ops.aten.mm.dtype_out(d.t(), x, torch.float32, out=into)
    elif _accumulates_mixed(into.device, d.dtype):
        torch.ops.aten.addmm.dtype_out(into, d.t(), x, torch.float32, out=into)
    else:
        into += torch.ops.aten.mm.dtype(d.t(), x, torch.float32)


@cache
def _accumulates_mixed(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this torch adds a product of `dtype` onto fp32 in one call; tried once, no sync."""
    small = torch.zeros(16, 16, dtype=dtype, device=device)
    total = torch.zeros(16, 16, device=device)
    try:
        torch.ops.aten.addmm.dtype_out(total, small, small, torch.float32, out=total)
    except (AttributeError, RuntimeError):
        return False
    return True
