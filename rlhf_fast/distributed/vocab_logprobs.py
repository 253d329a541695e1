"""`linear_logprobs` of a head whose rows lie on several ranks, under autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlhf_fast.distributed.vocab_rows import Group, HiddenGradient, SharedRows, beside
from rlhf_fast.distributed.vocab_slice import (
    Needs,
    RowFacts,
    Slice,
    agree,
    head_of,
    merged,
    taking,
)
from rlhf_fast_kernels.linear_arguments import Tokens
from rlhf_fast_kernels.linear_chunks import Call, GradientSink
from rlhf_fast_kernels.linear_head import Head
from rlhf_fast_kernels.logit_rows import RowStats, row_gradient


class ShardedLogprobs(torch.autograd.Function):
    """(log-probs [N], entropy [N] or None) of this rank's tokens.

    Its backward is collective too. Kept for it are inputs, and of each of this rank's rows two
    numbers; hidden rows are gathered, and logits made, once more.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        tokens: Tokens,
        call: Call,
        group: Group,
        vocab: int,
    ) -> tuple[Tensor, Tensor | None]:
        rows = agree(group, tokens, call, vocab)
        facts = RowFacts.told(tokens, rows)
        stats = _stats(hidden, head_of(weight, bias, call), tokens, call, rows, facts)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(hidden, weight, bias, *tokens, facts.facts, stats.lse, stats.entropy)
        ctx.call, ctx.rows = call, rows
        count = hidden.shape[0]
        entropy = None if stats.entropy is None else tokens.spread(stats.entropy, count)
        return tokens.spread(stats.logprobs, count), entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        # No way out where both gradients are None: the other ranks have theirs and wait.
        hidden, weight, bias, *rest = ctx.saved_tensors
        tokens, facts, lse, entropy = Tokens(*rest[:3]), RowFacts(rest[3]), rest[4], rest[5]
        numbers = [lse, _upstream(grad_logprobs, tokens)]
        if entropy is not None:
            numbers += [entropy, _upstream(grad_entropy, tokens)]
        with torch.autocast(hidden.device.type, enabled=False):
            told = ctx.rows.everyone(torch.stack([x.double() for x in numbers]))
            head = head_of(weight, bias, ctx.call)
            found = _gradients(
                *(hidden.detach(), head, tokens, ctx.call, ctx.rows, facts, told),
                ctx.needs_input_grad[:3],
            )
        typed = (
            None if g is None or x is None else g.to(x.dtype)
            for g, x in zip(found, (hidden, weight, bias), strict=True)
        )
        return *typed, None, None, None, None


def _upstream(gradient: Tensor | None, tokens: Tokens) -> Tensor:
    if gradient is None:
        return torch.zeros_like(tokens.labels, dtype=torch.float64)
    return tokens.pick(gradient)


def _stats(
    hidden: Tensor, head: Head, tokens: Tokens, call: Call, rows: SharedRows, facts: RowFacts
) -> RowStats:
    """Of this rank's n rows, over the whole vocabulary."""
    piece = Slice(head, call, rows)
    parts = rows.by_owner(2 + call.with_entropy, rows.longest, hidden.device)
    for chunk, x in rows.gathered(taking(hidden, tokens, call)):
        labels, settings = facts.of(chunk, piece.settings)
        _, logits = piece.logits(x)
        rows.put(parts, chunk, piece.stats(logits, labels, settings), chunk.start)
    own = rows.to_owners(parts)[:, :, : tokens.labels.shape[0]]
    return merged(own, tokens.labels, piece.settings, head.accumulate)


def _gradients(
    hidden: Tensor,
    head: Head,
    tokens: Tokens,
    call: Call,
    rows: SharedRows,
    facts: RowFacts,
    told: Tensor,
    needs: Needs,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    piece = Slice(head, call, rows)
    d_hidden = HiddenGradient(hidden, tokens, rows) if needs[0] else None
    sink = GradientSink(hidden, piece.head, tokens, (False, needs[1], needs[2]))
    for chunk, x in rows.gathered(taking(hidden, tokens, call)):
        labels, settings = facts.of(chunk, piece.settings)
        lse, g, *more = beside(told[:, :, chunk.start : chunk.stop], chunk, dim=1)
        entropy, h = (x.to(head.accumulate) for x in more) if more else (None, None)
        x, logits = piece.logits(x)
        d = piece.d(chunk.total)
        g = g.to(head.accumulate)
        # The gradient reads no log-prob.
        row_gradient(call.impl, logits, labels, settings, RowStats(g, entropy, lse), g, h, d)
        if not piece.empty:
            sink.add(d, x, 0, chunk.total)
        if d_hidden is not None:
            d_hidden.add(chunk, piece.hidden_gradient(d))
    return None if d_hidden is None else d_hidden.finish(), *sink.finish(call)[1:]


def likeliest_rows(hidden: Tensor, head: Head, call: Call, group: Group, vocab: int) -> Tensor:
    """[N] int64: for each hidden state of this rank the first id with the largest logit."""
    ids = torch.zeros(hidden.shape[0], dtype=torch.int64, device=hidden.device)
    tokens = Tokens(None, ids, None)
    rows = agree(group, tokens, call, vocab)
    piece = Slice(head, call, rows)
    parts = rows.by_owner(2, rows.longest, hidden.device)
    for chunk, x in rows.gathered(taking(hidden, tokens, call)):
        _, logits = piece.logits(x)
        if piece.empty:
            found = logits.new_tensor([[-torch.inf], [0.0]]).expand(2, chunk.total)
        else:
            best, at = logits.max(1)
            found = torch.stack([best.double(), (at + piece.settings.vocab_start).double()])
        rows.put(parts, chunk, found, chunk.start)
    best, at = rows.to_owners(parts)[:, :, : hidden.shape[0]].unbind(1)
    return torch.where(best == best.amax(0), at, vocab).amin(0).long()
