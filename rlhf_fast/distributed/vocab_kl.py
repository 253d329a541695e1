"""`linear_kl` of heads whose rows lie on several ranks, under autograd."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from rlhf_fast.distributed.vocab_rows import Chunk, Group, HiddenGradient, SharedRows, beside
from rlhf_fast.distributed.vocab_slice import (
    Needs,
    RowFacts,
    Slice,
    agree,
    head_of,
    merged_kl,
    taking,
)
from rlhf_fast_kernels.kl_rows import KLRowStats, kl_row_gradient
from rlhf_fast_kernels.linear_arguments import Tokens
from rlhf_fast_kernels.linear_chunks import Call, GradientSink
from rlhf_fast_kernels.linear_kl import Side, kl_settings
from rlhf_fast_kernels.logit_rows import RowSettings


class ShardedKL(torch.autograd.Function):
    """KL [N] of this rank's tokens; backward is collective too.

    Kept for it are inputs, and of each of this rank's rows three numbers; the hidden rows of both
    sides are gathered, and logits made, once more.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        reference: Side,
        tokens: Tokens,
        call: Call,
        group: Group,
        vocab: int,
    ) -> Tensor:
        rows = agree(group, tokens, call, vocab)
        facts = RowFacts.told(tokens, rows)
        actor = Side(hidden.detach(), head_of(weight, bias, call))
        sweep = _Sweep(actor, reference, tokens, call, rows, facts)
        parts = rows.by_owner(3, rows.longest, hidden.device)
        for chunk, _, logits, ref_logits, settings in sweep:
            found = sweep.piece.kl_stats(logits, ref_logits, settings)
            rows.put(parts, chunk, found, chunk.start)
        own = rows.to_owners(parts)[:, :, : tokens.labels.shape[0]]
        stats = merged_kl(own, actor.head.accumulate)
        frozen = (reference.hidden, reference.head.weight, reference.head.bias)
        ctx.save_for_backward(hidden, weight, bias, *frozen, *tokens, facts.facts, *stats)
        ctx.call, ctx.rows = call, rows
        return tokens.spread(stats.kl, hidden.shape[0])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_kl: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, *rest = ctx.saved_tensors
        ref_hidden, ref_weight, ref_bias = rest[:3]
        tokens, facts, stats = Tokens(*rest[3:6]), RowFacts(rest[6]), rest[7:]
        call, rows = ctx.call, ctx.rows
        with torch.autocast(hidden.device.type, enabled=False):
            actor = Side(hidden.detach(), head_of(weight, bias, call))
            reference = Side(ref_hidden, head_of(ref_weight, ref_bias, call))
            sweep = _Sweep(actor, reference, tokens, call, rows, facts)
            told = rows.everyone(torch.stack([x.double() for x in (*stats, tokens.pick(grad_kl))]))
            found = sweep.gradients(told, ctx.needs_input_grad[:3])
        typed = (
            None if g is None or x is None else g.to(x.dtype)
            for g, x in zip(found, (hidden, weight, bias), strict=True)
        )
        return *typed, *(None,) * 5


class _Sweep:
    """Both sides' logits of this rank's slice, chunk by chunk, in the same memory."""

    def __init__(
        self,
        actor: Side,
        reference: Side,
        tokens: Tokens,
        call: Call,
        rows: SharedRows,
        facts: RowFacts,
    ) -> None:
        self._sides, self._tokens, self._call = (actor, reference), tokens, call
        self._rows, self._facts = rows, facts
        self.piece, self._ref = Slice(actor.head, call, rows), Slice(reference.head, call, rows)

    def __iter__(self) -> Iterator[tuple[Chunk, Tensor, Tensor, Tensor, RowSettings]]:
        """(chunk, actor's operand, its logits, the reference's, settings)."""
        both = (
            self._rows.gathered(taking(side.hidden, self._tokens, self._call))
            for side in self._sides
        )
        for (chunk, rows), (_, ref_rows) in zip(*both, strict=True):
            _, settings = self._facts.of(chunk, self.piece.settings)
            x, logits = self.piece.logits(rows)
            yield chunk, x, logits, self._ref.logits(ref_rows)[1], settings

    def gradients(
        self, told: Tensor, needs: Needs
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Of hidden, weight and bias, from [ranks, 4, m]: the statistics and dloss/dKL."""
        hidden, piece = self._sides[0].hidden, self.piece
        kind = piece.head.accumulate
        d_hidden = HiddenGradient(hidden, self._tokens, self._rows) if needs[0] else None
        sink = GradientSink(hidden, piece.head, self._tokens, (False, needs[1], needs[2]))
        for chunk, x, logits, ref_logits, settings in self:
            kl, lse, ref_lse, g = beside(told[:, :, chunk.start : chunk.stop], chunk, dim=1)
            stats, d = KLRowStats(kl.to(kind), lse, ref_lse), piece.d(chunk.total)
            if not piece.empty:
                kl_row_gradient(
                    *(self._call.impl, logits, ref_logits, kl_settings(settings), stats),
                    *(g.to(kind), d),
                )
                sink.add(d, x, 0, chunk.total)
            if d_hidden is not None:
                d_hidden.add(chunk, piece.hidden_gradient(d))
        return None if d_hidden is None else d_hidden.finish(), *sink.finish(self._call)[1:]
