"""Rows against a vocabulary head, chunk by chunk: sums forward, gradients backward.

What `linear_logprobs` is made of; `linear_ppo_loss` and `linear_kl` share its pieces.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from rlhf_fast_kernels import dispatch, native, triton_support
from rlhf_fast_kernels.linear_arguments import Tokens, is_distributed, vocabulary_of
from rlhf_fast_kernels.linear_fused import fused_stats
from rlhf_fast_kernels.linear_head import Head, chunk_bounds
from rlhf_fast_kernels.logit_rows import (
    RowSettings,
    RowStats,
    gather_shards,
    row_gradient,
    row_stats,
)

# No label: a token that counts and is labelled -100 is an error, or NaN, not a token left out.
IGNORE_NOTHING = -(1 << 62)


@dataclass(frozen=True)
class Call:
    """What is not a tensor: how the rows are read and cut.

    Attributes:
        impl: whose row kernels: "reference", "cpu" or "triton".
        compute: dtype the products round their operands to.
        scale: temperature, where it is one number.
        softcap, vocab_size: as in the public function.
        chunk_rows: rows of the largest chunk; None: by device and vocabulary.
        with_entropy: whether the entropy is wanted.
        group: process group of the vocabulary shards, or None.
        sum_hidden_gradient: whether the gradients of the hidden states are summed over the group.
        vocab_start: id of the first row of the weight; None: equal shards in rank order.
        fused: whether `chunked_stats` makes no logits at all.
    """

    impl: str
    compute: torch.dtype
    scale: float
    softcap: float | None
    vocab_size: int | None
    chunk_rows: int | None
    with_entropy: bool
    group: Any = None
    sum_hidden_gradient: bool = True
    vocab_start: int | None = None
    fused: bool = False

    def bounds(self, rows: int, head: Head, device: torch.device) -> list[int]:
        """`chunk_bounds`, the same on every rank of a group: collectives go with the chunks."""
        ranks = torch.distributed.get_world_size(self.group) if is_distributed(self.group) else 1
        shard = -(-vocabulary_of(head.weight, self.vocab_size, self.group) // ranks)
        return chunk_bounds(rows, shard if ranks > 1 else head.vocab, device, self.chunk_rows)

    def settings(self, head: Head, temperature: Tensor | None) -> RowSettings:
        """As the row kernels take them; of the tokens that are left, none is ignored."""
        start = self.vocab_start or 0
        if self.vocab_start is None and is_distributed(self.group):
            start = torch.distributed.get_rank(self.group) * head.vocab
        return RowSettings(
            temperature=temperature,
            scale=self.scale,
            softcap=self.softcap,
            ignore_index=IGNORE_NOTHING,
            vocab_start=start,
            vocab_size=vocabulary_of(head.weight, self.vocab_size, self.group),
        )


def part(settings: RowSettings, start: int, stop: int) -> RowSettings:
    """The settings of rows [start, stop)."""
    if settings.temperature is None:
        return settings
    return settings._replace(temperature=settings.temperature[start:stop])


def stats_part(stats: RowStats, start: int, stop: int) -> RowStats:
    """The statistics of rows [start, stop)."""
    entropy = None if stats.entropy is None else stats.entropy[start:stop]
    return RowStats(stats.logprobs[start:stop], entropy, stats.lse[start:stop])


def chunk_workspace(
    bounds: list[int], columns: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Memory for the largest chunk."""
    largest = max((stop - start for start, stop in pairwise(bounds)), default=0)
    return torch.empty(largest, columns, dtype=dtype, device=device)


# ---- forward ------------------------------------------------------------------------------------


def chunked_stats(hidden: Tensor, head: Head, tokens: Tokens, call: Call) -> RowStats:
    """Log-probs, entropy and log-sum-exp of n rows, each [n]; of the whole vocabulary."""
    settings = call.settings(head, tokens.temperature)
    sharded = is_distributed(call.group)
    wanted: dict[str, Any] = {"with_entropy": call.with_entropy or sharded, "shard": sharded}
    if call.fused:
        operands = (hidden.to(call.compute), head.weight.to(call.compute))
        more: dict[str, Any] = {"bias": head.bias, "rows": tokens.places, **wanted}
        stats = fused_stats(*operands, tokens.labels, settings, **more)
    else:
        stats = _stats_by_chunks(hidden, head, tokens, call, settings, wanted)
    return gather_shards(stats, tokens.labels, settings, call.group) if sharded else stats


def _stats_by_chunks(
    hidden: Tensor,
    head: Head,
    tokens: Tokens,
    call: Call,
    settings: RowSettings,
    wanted: dict[str, Any],
) -> RowStats:
    count = tokens.labels.shape[0]
    bounds = call.bounds(count, head, hidden.device)
    logits = chunk_workspace(bounds, head.vocab, head.accumulate, hidden.device)
    head = head.rounded()
    pieces = []
    for start, stop in pairwise(bounds):
        chunk = logits[: stop - start]
        head.logits(head.operand(tokens.take(hidden, start, stop)), chunk)
        pieces.append(
            row_stats(
                call.impl,
                chunk,
                tokens.labels[start:stop],
                part(settings, start, stop),
                **wanted,
            )
        )
    return joined(pieces)


def joined(pieces: list[RowStats]) -> RowStats:
    """The statistics of consecutive chunks as one."""
    if len(pieces) == 1:
        return pieces[0]
    logprobs, entropies, lses = zip(*pieces, strict=True)
    entropy = None if entropies[0] is None else torch.cat(entropies)
    return RowStats(torch.cat(logprobs), entropy, torch.cat(lses))


# ---- backward -----------------------------------------------------------------------------------


class GradientSink:
    """Collects d hidden, d weight and d bias over chunks.

    Args:
        hidden: [N, H]; d hidden has its shape and dtype.
        head: the head, rounded.
        tokens: the rows.
        needs: which of (hidden, weight, bias) want a gradient.
        weight_out: fp32 [V, H] to add d weight to, instead of a new tensor.
    """

    def __init__(
        self,
        hidden: Tensor,
        head: Head,
        tokens: Tokens,
        needs: tuple[bool, bool, bool],
        weight_out: Tensor | None = None,
    ) -> None:
        self.head, self.tokens = head, tokens
        self.hidden = self.weight = self.bias = None
        self._fresh = weight_out is None
        covered = tokens.places is None
        if needs[0]:
            self.hidden = torch.empty_like(hidden) if covered else torch.zeros_like(hidden)
        if needs[1]:
            shape = head.weight.shape
            self.weight = (
                torch.empty(shape, dtype=head.accumulate, device=hidden.device)
                if weight_out is None
                else weight_out
            )
        if needs[2]:
            self.bias = torch.zeros(head.vocab, dtype=head.accumulate, device=hidden.device)

    def add(self, d: Tensor, x: Tensor, start: int, stop: int) -> None:
        """Take in the gradient `d` [n, V] of the logits of rows [start, stop), with operand x."""
        if self.hidden is not None:
            gradient = self.head.hidden_gradient(d).to(self.hidden.dtype)
            if self.tokens.places is None:
                self.hidden[start:stop] = gradient
            else:
                self.hidden.index_copy_(0, self.tokens.places[start:stop], gradient)
        if self.weight is not None:
            self.head.add_weight_gradient(d, x, self.weight, first=self._fresh)
            self._fresh = False
        if self.bias is not None:
            self.bias += d.sum(0, dtype=self.bias.dtype)

    def finish(self, call: Call) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """(d hidden, d weight, d bias), the first summed over the ranks."""
        if self.weight is not None and self._fresh:
            self.weight.zero_()
        if self.hidden is not None and is_distributed(call.group) and call.sum_hidden_gradient:
            torch.distributed.all_reduce(self.hidden, group=call.group)
        return self.hidden, self.weight, self.bias


def chunked_gradients(
    hidden: Tensor,
    head: Head,
    tokens: Tokens,
    call: Call,
    stats: RowStats,
    upstream: tuple[Tensor | None, Tensor | None],
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of hidden [N, H], weight and bias from those of log-probs and entropy, [n] each."""
    settings = call.settings(head, tokens.temperature)
    bounds = call.bounds(tokens.labels.shape[0], head, hidden.device)
    logits = chunk_workspace(bounds, head.vocab, head.accumulate, hidden.device)
    grads = (
        chunk_workspace(bounds, head.vocab, head.gradient_dtype, hidden.device)
        if head.gradient_apart
        else logits
    )
    head = head.rounded()
    sink = GradientSink(hidden, head, tokens, needs)
    for start, stop in pairwise(bounds):
        x = head.operand(tokens.take(hidden, start, stop))
        chunk, d = logits[: stop - start], grads[: stop - start]
        head.logits(x, chunk)
        g, h = (None if x is None else x[start:stop] for x in upstream)
        row_gradient(
            call.impl,
            chunk,
            tokens.labels[start:stop],
            part(settings, start, stop),
            stats_part(stats, start, stop),
            g,
            h,
            d,
        )
        sink.add(d, x, start, stop)
    return sink.finish(call)


# ---- registration -------------------------------------------------------------------------------

FAST_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def register_chunked(op: str, *functions: str) -> None:
    """Register a chunked op: its implementations differ in their row kernels alone.

    Args:
        op: name of the op; it reads `Choice.impl` and passes it on in `Call.impl`.
        functions: what the C++ row kernels need of the compiled module.
    """

    def named(*_: Any) -> None:
        raise RuntimeError(f"{op}: row kernels are called by the name of the implementation")

    dispatch.register(op, "reference", named)
    dispatch.register(op, "cpu", named, native.on_cpu(*functions), dtypes=FAST_DTYPES)
    triton_support.register(op, named)


def checked_gradients(leaves: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """What a self-test compares: gradients, or their norms where products round to `dtype`.

    One step of bf16 in an entry lies above the self-test's tolerance; in the norm it averages out.
    """
    found = [x.grad for x in leaves if x.grad is not None]
    return found if dtype == torch.float32 else [g.norm() for g in found]
