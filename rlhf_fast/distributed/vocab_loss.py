"""`linear_ppo_loss` of a head whose rows lie on several ranks: loss and gradients in one pass.

Per chunk: the hidden rows of all ranks are gathered, each rank reads its slice's logits, the owners
merge the statistics of their rows and compute loss and gradients by log-prob and entropy, which all
ranks then hear of. While the chunk's logits are still there, each rank turns them into their
gradient D:

    dW of the slice += D^T x, complete over the group          dx += D W, summed at the owner
"""

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
    merged,
    merged_kl,
    taking,
)
from rlhf_fast_kernels.kl_rows import KLRowStats, kl_row_gradient
from rlhf_fast_kernels.linear_chunks import GradientSink
from rlhf_fast_kernels.linear_kl import kl_settings
from rlhf_fast_kernels.linear_ppo_autograd import scale_in_place
from rlhf_fast_kernels.linear_ppo_chunks import (
    Problem,
    Result,
    kl_slope,
    loss_of_rows,
    sum_of_chunks,
)
from rlhf_fast_kernels.logit_rows import RowSettings, RowStats, row_gradient


class ShardedPPOLoss(torch.autograd.Function):
    """Loss [] of this rank's tokens and its constants; gradients are made in forward.

    Backward, which holds no collective, gives them away: it can run once.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        problem: Problem,
        group: Group,
        vocab: int,
        wants_gradient: bool,
    ) -> tuple[Tensor, ...]:
        a, b, c = ctx.needs_input_grad[:3] if wants_gradient else (False,) * 3
        result = _Pass(problem, agree(group, problem.tokens, problem.call, vocab), (a, b, c)).run()
        ctx.gradients = result.grads
        ctx.dtypes = [None if x is None else x.dtype for x in (hidden, weight, bias)]
        spread = (problem.tokens.spread(x, len(hidden)) for x in (result.logprobs, result.entropy))
        constants = (result.sums, result.extrema, *spread)
        ctx.mark_non_differentiable(*constants)
        ctx.set_materialize_grads(False)
        return result.loss, *constants

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        if upstream is None:
            return (None,) * 7
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError("linear_ppo_loss: on a sharded head, backward can run once")
        for gradient in gradients:
            if gradient is not None:
                scale_in_place(gradient, upstream)
        typed = (
            None if g is None else g.to(dtype)
            for g, dtype in zip(gradients, ctx.dtypes, strict=True)
        )
        return *typed, None, None, None, None


class _Pass:
    """One sweep over the chunks."""

    def __init__(self, problem: Problem, rows: SharedRows, needs: Needs) -> None:
        self.problem, self.rows, self.needs = problem, rows, needs
        self.facts = RowFacts.told(problem.tokens, rows)
        exact = problem.reference is not None
        # The exact KL reads the logits after the policy's gradient has been written.
        self.piece = Slice(problem.head, problem.call, rows, apart=exact)
        self.ref = None
        if problem.reference is not None:
            self.ref = Slice(problem.reference.head, problem.call, rows)
        self.kind = problem.head.accumulate
        no_hidden = (False, needs[1], needs[2])
        self.sink = GradientSink(problem.hidden, self.piece.head, problem.tokens, no_hidden)
        self.d_hidden = HiddenGradient(problem.hidden, problem.tokens, rows) if needs[0] else None

    def run(self) -> Result:
        parts = [self._chunk(*both) for both in self._gathered()]
        losses, sums, extrema, logprobs, entropy = zip(*parts, strict=True)
        _, d_weight, d_bias = self.sink.finish(self.problem.call)
        return Result(
            sum_of_chunks(losses),
            sum_of_chunks(sums),
            torch.stack(extrema).amax(0),
            torch.cat(logprobs),
            torch.cat(entropy),
            (None if self.d_hidden is None else self.d_hidden.finish(), d_weight, d_bias),
        )

    def _gathered(self) -> Iterator[tuple[Chunk, Tensor, Tensor | None]]:
        """(chunk, actor's rows, reference's or None)."""
        problem, rows = self.problem, self.rows
        tokens, call, reference = problem.tokens, problem.call, problem.reference
        actor = rows.gathered(taking(problem.hidden, tokens, call))
        if reference is None:
            for chunk, x in actor:
                yield chunk, x, None
            return
        theirs = rows.gathered(taking(reference.hidden, tokens, call))
        for (chunk, x), (_, ref_x) in zip(actor, theirs, strict=True):
            yield chunk, x, ref_x

    def _chunk(
        self, chunk: Chunk, x: Tensor, ref_x: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """(loss, sums, extrema, log-probs, entropy) of this rank's rows of the chunk."""
        problem, piece, own = self.problem, self.piece, chunk.own
        labels, settings = self.facts.of(chunk, piece.settings)
        x, logits = piece.logits(x)
        found, ref_logits = [piece.stats(logits, labels, settings)], None
        if self.ref is not None and ref_x is not None:
            _, ref_logits = self.ref.logits(ref_x)
            found.append(piece.kl_stats(logits, ref_logits, settings))
        parts = self._of_owners(chunk, torch.cat(found))
        stats = merged(parts[:, :3], problem.tokens.labels[own], piece.settings, self.kind)
        kl = None if ref_logits is None else merged_kl(parts[:, 3:], self.kind)
        wanted = any(self.needs)
        loss, sums, extrema, g, h, _ = loss_of_rows(
            problem, stats, kl, own.start, own.stop, wants_gradient=wanted
        )
        if wanted:
            assert g is not None
            told = self._told(chunk, stats, kl, (g, h))
            d = self._gradient(chunk, told, (logits, ref_logits), labels, settings)
            self._take_in(chunk, d, x)
        assert stats.entropy is not None
        return loss, sums, extrema, stats.logprobs, stats.entropy

    def _of_owners(self, chunk: Chunk, found: Tensor) -> Tensor:
        """[ranks, F, n] of this rank's rows from [F, total] over this rank's slice."""
        parts = self.rows.by_owner(len(found), chunk.width, found.device)
        self.rows.put(parts, chunk, found, 0)
        return self.rows.to_owners(parts)[:, :, : chunk.counts[chunk.rank]]

    def _told(
        self,
        chunk: Chunk,
        stats: RowStats,
        kl: KLRowStats | None,
        upstream: tuple[Tensor, Tensor | None],
    ) -> list[Tensor]:
        """[total] fp64 each: lse, g, and as they are wanted entropy, h, the three of KL, slope."""
        g, h = upstream
        numbers = [stats.lse, g]
        if h is not None:
            assert stats.entropy is not None
            numbers += [stats.entropy, h]
        if kl is not None:
            numbers += [*kl, kl_slope(self.problem, kl.kl)]
        everyone = self.rows.everyone(torch.stack([x.double() for x in numbers]), chunk)
        return list(beside(everyone, chunk, dim=1))

    def _gradient(
        self,
        chunk: Chunk,
        told: list[Tensor],
        logits: tuple[Tensor, Tensor | None],
        labels: Tensor,
        settings: RowSettings,
    ) -> Tensor:
        """D [total, V_r] of the slice."""
        impl, d = self.problem.call.impl, self.piece.d(chunk.total)
        own, reference = logits
        if self.piece.empty:
            return d
        lse, g = told[0], told[1].to(self.kind)
        entropy = h = None
        if self.problem.settings.entropy_coef != 0:
            entropy, h = (x.to(self.kind) for x in told[2:4])
        # The gradient reads no log-prob.
        row_gradient(impl, own, labels, settings, RowStats(g, entropy, lse), g, h, d)
        if reference is not None:
            kl, kl_lse, ref_lse, slope = told[-4:]
            stats = KLRowStats(kl.to(self.kind), kl_lse, ref_lse)
            kl_row_gradient(
                *(impl, own, reference, kl_settings(settings), stats, slope.to(self.kind), d),
                accumulate=True,
            )
        return d

    def _take_in(self, chunk: Chunk, d: Tensor, x: Tensor) -> None:
        if not self.piece.empty:
            self.sink.add(d, x, 0, chunk.total)
        if self.d_hidden is not None:
            self.d_hidden.add(chunk, self.piece.hidden_gradient(d))
