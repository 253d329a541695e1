"""A rank's rows of a vocabulary head against the hidden rows of all ranks.

    partial numbers of a row, over the slice alone          whole, at the row's owner
    label's logit or 0, log-sum-exp, entropy         ->     log-prob, log-sum-exp, entropy
    KL, both log-sum-exps                            ->     KL, both log-sum-exps

What is partial goes to the row's owner, who merges the ranks' parts in their order, in fp64. What
the gradient of the slice's logits needs goes from the owners to all ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf_fast.distributed.vocab_rows import Chunk, Group, SharedRows, beside
from rlhf_fast_kernels.kl_rows import (
    KLRowStats,
    kl_row_stats,
    merge_kl_shards,
)
from rlhf_fast_kernels.linear_arguments import Tokens
from rlhf_fast_kernels.linear_chunks import Call
from rlhf_fast_kernels.linear_head import Head, most_chunk_rows
from rlhf_fast_kernels.linear_kl import kl_settings
from rlhf_fast_kernels.logit_rows import (
    RowSettings,
    RowStats,
    merge_shards,
    row_stats,
)

Needs = tuple[bool, bool, bool]


def agree(group: Group, tokens: Tokens, call: Call, vocab: int) -> SharedRows:
    """The rows of all ranks, in chunks whose logits of a slice of ceil(vocab / ranks) fit."""
    ranks, device = group.size(), tokens.labels.device
    most = call.chunk_rows or most_chunk_rows(-(-vocab // ranks), device)
    return SharedRows.agree(group, tokens.labels.shape[0], device, max(1, most // ranks))


def head_of(weight: Tensor, bias: Tensor | None, call: Call) -> Head:
    """Weight and bias as a call uses them, without graph."""
    return Head(weight.detach(), None if bias is None else bias.detach(), call.compute)


def taking(hidden: Tensor, tokens: Tokens, call: Call) -> Callable[[int, int], Tensor]:
    """What `SharedRows.gathered` asks for this rank's rows: in the compute dtype."""
    return lambda start, stop: tokens.take(hidden, start, stop).to(call.compute)


@dataclass(frozen=True)
class RowFacts:
    """Labels and, if each row has its own, temperatures: [ranks, 1 or 2, m] fp64."""

    facts: Tensor

    @classmethod
    def told(cls, tokens: Tokens, rows: SharedRows) -> RowFacts:
        """Those of all ranks."""
        known = [tokens.labels, tokens.temperature]
        own = torch.stack([x.double() for x in known if x is not None])  # ids are below 2^53
        return cls(rows.everyone(own))

    def of(self, chunk: Chunk, settings: RowSettings) -> tuple[Tensor, RowSettings]:
        """(labels [total], settings) of a chunk."""
        here = self.facts[:, :, chunk.start : chunk.stop]
        labels, *temperature = beside(here, chunk, dim=1)
        if temperature:
            settings = settings._replace(temperature=temperature[0].float())
        return labels.long(), settings


class Slice:
    """This rank's rows of a head, and memory for the logits of one chunk.

    Args:
        head: the rows, as they are.
        call: how rows are read; `call.vocab_start` is the id of the first row.
        rows: those of all ranks.
        apart: whether gradients of logits need memory of their own, whatever their dtype.
    """

    def __init__(self, head: Head, call: Call, rows: SharedRows, *, apart: bool = False) -> None:
        self.call = call
        self.settings = call.settings(head, None)
        # A slice without a real token takes part in collectives only.
        self.empty = self.settings.columns(head.vocab) == 0
        self.head = head if self.empty else head.rounded()
        self._logits = self._memory(rows.largest, head.accumulate)
        self._apart = apart or head.gradient_apart
        self._largest = rows.largest
        self._d: Tensor | None = None

    def _memory(self, rows: int, dtype: torch.dtype) -> Tensor:
        columns = 0 if self.empty else self.head.vocab
        return torch.empty(rows, columns, dtype=dtype, device=self.head.weight.device)

    def logits(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """(hidden as it enters products, logits [n, V_r]) of rows in the compute dtype."""
        x, out = self.head.operand(hidden), self._logits[: hidden.shape[0]]
        if not self.empty:
            self.head.logits(x, out)
        return x, out

    def d(self, rows: int) -> Tensor:
        """Memory for the gradient of the logits of so many rows; perhaps the logits themselves."""
        if not self._apart:
            return self._logits[:rows]
        if self._d is None:
            self._d = self._memory(self._largest, self.head.gradient_dtype)
        return self._d[:rows]

    def hidden_gradient(self, d: Tensor) -> Tensor:
        """[n, H] fp32: this rank's share of the gradient of the hidden rows."""
        if self.empty:
            width = self.head.weight.shape[1]
            return d.new_zeros(len(d), width, dtype=self.head.accumulate)
        return self.head.hidden_gradient(d, wide=True)

    def stats(self, logits: Tensor, labels: Tensor, settings: RowSettings) -> Tensor:
        """[2 or 3, n] fp64: label's logit, log-sum-exp and, if wanted, entropy over the slice."""
        wanted = self.call.with_entropy
        if self.empty:
            return _without_token((0.0, -torch.inf, 0.0)[: 2 + wanted], logits)
        found = row_stats(self.call.impl, logits, labels, settings, with_entropy=wanted, shard=True)
        fields = (found.logprobs, found.lse, found.entropy)
        return torch.stack([x.double() for x in fields if x is not None])

    def kl_stats(self, logits: Tensor, ref_logits: Tensor, settings: RowSettings) -> Tensor:
        """[3, n] fp64: KL and both log-sum-exps over the slice."""
        if self.empty:
            return _without_token((0.0, -torch.inf, -torch.inf), logits)
        found = kl_row_stats(self.call.impl, logits, ref_logits, kl_settings(settings), shard=True)
        return torch.stack([x.double() for x in found])


def _without_token(numbers: tuple[float, ...], logits: Tensor) -> Tensor:
    """[F, n] fp64: what merging passes over."""
    column = torch.tensor(numbers, dtype=torch.float64, device=logits.device)
    return column[:, None].expand(-1, logits.shape[0])


def merged(parts: Tensor, labels: Tensor, settings: RowSettings, kind: torch.dtype) -> RowStats:
    """Statistics of n rows over the whole vocabulary from [ranks, 2 or 3, n] of `Slice.stats`."""
    stats = [
        RowStats(label.to(kind), entropy[0].to(kind) if entropy else None, lse)
        for label, lse, *entropy in parts
    ]
    return merge_shards(stats, labels, settings)


def merged_kl(parts: Tensor, kind: torch.dtype) -> KLRowStats:
    """Statistics of n rows over the whole vocabulary from [ranks, 3, n] of `Slice.kl_stats`."""
    found = merge_kl_shards([KLRowStats(*part) for part in parts])
    return found._replace(kl=found.kl.to(kind))
