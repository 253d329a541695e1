"""One pass over the chunks of `linear_ppo_loss`: loss and, while a chunk is hot, gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from rlhf_fast_kernels import dispatch
from rlhf_fast_kernels.kl_rows import (
    KLRowStats,
    gather_kl_shards,
    kl_row_gradient,
    kl_row_stats,
)
from rlhf_fast_kernels.linear_arguments import Tokens, is_distributed
from rlhf_fast_kernels.linear_chunks import (
    Call,
    GradientSink,
    chunk_workspace,
    part,
)
from rlhf_fast_kernels.linear_head import Head
from rlhf_fast_kernels.linear_kl import Side, kl_settings
from rlhf_fast_kernels.logit_rows import (
    RowSettings,
    RowStats,
    gather_shards,
    row_gradient,
    row_stats,
)
from rlhf_fast_kernels.ppo_arguments import OP as PPO_OP
from rlhf_fast_kernels.ppo_arguments import Inputs, Settings
from rlhf_fast_kernels.ppo_loss import token_gradients

Needs = tuple[bool, bool, bool]


@dataclass(frozen=True)
class Problem:
    """One call.

    Attributes:
        hidden: [N, H].
        head: the actor's.
        tokens: the n rows that count.
        inputs: what `ppo_loss` reads beside log-probs, entropy and the exact KL, [n] each.
        normalizer, settings: as in `ppo_loss`.
        reference: for `kl_estimator="exact"`.
        call: how rows are read and cut.
        grad_scale: number that the gradients, not the loss, are multiplied by.
    """

    hidden: Tensor
    head: Head
    tokens: Tokens
    inputs: Inputs
    normalizer: float | Tensor
    settings: Settings
    reference: Side | None
    call: Call
    grad_scale: float = 1.0

    def unpack(self) -> tuple[list[Tensor | None], Callable[[Sequence[Any]], Problem]]:
        """(all tensors, what makes the problem of them again); the latter holds no tensor."""
        head, ref, count = self.head, self.reference, self.normalizer
        inputs = vars(self.inputs)
        frozen = [None] * 3 if ref is None else [ref.hidden, ref.head.weight, ref.head.bias]
        tensors = [self.hidden, head.weight, head.bias, *self.tokens, *inputs.values(), *frozen]
        rest = (self.settings, self.call, self.grad_scale, head.compute)
        names, number = tuple(inputs), None if isinstance(count, Tensor) else count
        tensors.append(count if isinstance(count, Tensor) else None)
        return tensors, lambda given: _problem_of(given, names, number, *rest)


def _problem_of(
    tensors: Sequence[Any],
    names: tuple[str, ...],
    number: float | None,
    settings: Settings,
    call: Call,
    grad_scale: float,
    compute: torch.dtype,
) -> Problem:
    hidden, weight, bias, *rest = tensors
    tokens, given, frozen, count = rest[:3], rest[3:-4], rest[-4:-1], rest[-1]
    ref_hidden, ref_weight, ref_bias = frozen
    return Problem(
        hidden,
        Head(weight, bias, compute),
        Tokens(*tokens),
        Inputs(**dict(zip(names, given, strict=True))),
        count if number is None else number,
        settings,
        None if ref_hidden is None else Side(ref_hidden, Head(ref_weight, ref_bias, compute)),
        call,
        grad_scale,
    )


@dataclass
class Result:
    """Loss [], sums, extrema, log-probs and entropy [n], gradients of (hidden, weight, bias)."""

    loss: Tensor
    sums: Tensor
    extrema: Tensor
    logprobs: Tensor
    entropy: Tensor
    grads: tuple[Tensor | None, Tensor | None, Tensor | None]


class _Memory:
    """The chunk's logits, the reference's, and D, over the logits where that is possible."""

    def __init__(self, problem: Problem, bounds: list[int], wants_gradient: bool) -> None:
        head, device = problem.head, problem.hidden.device
        self.logits = chunk_workspace(bounds, head.vocab, head.accumulate, device)
        # The exact KL reads the logits after the policy's gradient has been written.
        separate = head.gradient_apart or problem.reference is not None
        self.d = self.logits
        if wants_gradient and separate:
            self.d = chunk_workspace(bounds, head.vocab, head.gradient_dtype, device)
        self.ref_logits = self.logits
        if problem.reference is not None:
            self.ref_logits = torch.empty_like(self.logits)


def run(problem: Problem, needs: Needs, weight_out: Tensor | None = None) -> Result:
    """Everything of one call.

    Args:
        problem: the call.
        needs: which of (hidden, weight, bias) want a gradient; none: the loss alone.
        weight_out: fp32 [V, H] that the weight's gradient is added to.
    """
    head, tokens = problem.head, problem.tokens
    bounds = problem.call.bounds(tokens.labels.shape[0], head, problem.hidden.device)
    memory = _Memory(problem, bounds, any(needs))
    problem = replace(problem, head=head.rounded())
    if problem.reference is not None:
        problem = replace(problem, reference=problem.reference.rounded())
    sink = GradientSink(problem.hidden, problem.head, tokens, needs, weight_out)
    parts = [
        _chunk(problem, memory, sink if any(needs) else None, start, stop)
        for start, stop in pairwise(bounds)
    ]
    losses, sums, extrema, logprobs, entropy = zip(*parts, strict=True)
    return Result(
        sum_of_chunks(losses),
        sum_of_chunks(sums),
        torch.stack(extrema).amax(0),
        torch.cat(logprobs),
        torch.cat(entropy),
        sink.finish(problem.call) if any(needs) else (None, None, None),
    )


def sum_of_chunks(parts: tuple[Tensor, ...]) -> Tensor:
    """The sum over chunks in fp64: their number must not show in the digits."""
    return torch.stack(parts).double().sum(0).to(parts[0].dtype)


def _chunk(
    problem: Problem, memory: _Memory, sink: GradientSink | None, start: int, stop: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, sums, extrema, log-probs, entropy) of rows [start, stop); gradients go to the sink."""
    head, tokens, call = problem.head, problem.tokens, problem.call
    settings = part(call.settings(head, tokens.temperature), start, stop)
    labels = tokens.labels[start:stop]
    logits = memory.logits[: stop - start]
    x = head.operand(tokens.take(problem.hidden, start, stop))
    head.logits(x, logits)
    sharded = is_distributed(call.group)
    stats = row_stats(call.impl, logits, labels, settings, with_entropy=True, shard=sharded)
    if sharded:
        stats = gather_shards(stats, labels, settings, call.group)
    assert stats.entropy is not None
    kl = _exact_kl(problem, memory, settings, start, stop)
    loss, sums, extrema, g, h, _ = loss_of_rows(
        problem, stats, kl, start, stop, wants_gradient=sink is not None
    )
    if sink is not None:
        d = memory.d[: stop - start]
        g, h = (x if x is None else x * problem.grad_scale for x in (g, h))
        row_gradient(call.impl, logits, labels, settings, stats, g, h, d)
        if kl is not None:
            _add_kl_gradient(problem, memory, settings, kl, d)
        sink.add(d, x, start, stop)
    return loss, sums, extrema, stats.logprobs, stats.entropy


def loss_of_rows(
    problem: Problem,
    stats: RowStats,
    kl: KLRowStats | None,
    start: int,
    stop: int,
    *,
    wants_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """(loss, sums, extrema, dloss/dlogp, dloss/dH, None) of rows [start, stop).

    Args:
        problem: the call.
        stats, kl: of these rows over the whole vocabulary; kl with a reference only.
        start, stop: the rows, among those of `problem.inputs`.
        wants_gradient: otherwise the two gradients are None.
    """
    here = {name: None if x is None else x[start:stop] for name, x in vars(problem.inputs).items()}
    here |= {
        "logprobs": stats.logprobs,
        "entropy": stats.entropy,
        "kl": None if kl is None else kl.kl,
    }
    bonus = wants_gradient and problem.settings.entropy_coef != 0
    return token_gradients(
        _loss_implementation(problem.call.impl, stats.logprobs),
        Inputs(**here),
        torch.ones_like(stats.logprobs, dtype=torch.bool),
        problem.normalizer,
        problem.settings,
        (wants_gradient, bonus, False),
    )


def _loss_implementation(rows: str, like: Tensor) -> str:
    """Whose `ppo_loss` goes with these row kernels: on a GPU the one with the cheapest launch."""
    return dispatch.choose(PPO_OP, "auto", like).impl if rows == "triton" else rows


# ---- exact KL -----------------------------------------------------------------------------------


def _exact_kl(
    problem: Problem, memory: _Memory, rows: RowSettings, start: int, stop: int
) -> KLRowStats | None:
    """KL(actor || reference) of rows [start, stop); leaves the reference's logits in memory."""
    reference, call = problem.reference, problem.call
    if reference is None:
        return None
    logits, ref_logits = memory.logits[: stop - start], memory.ref_logits[: stop - start]
    x = reference.head.operand(problem.tokens.take(reference.hidden, start, stop))
    reference.head.logits(x, ref_logits)
    sharded = is_distributed(call.group)
    kl = kl_row_stats(call.impl, logits, ref_logits, kl_settings(rows), shard=sharded)
    return gather_kl_shards(kl, call.group) if sharded else kl


def _add_kl_gradient(
    problem: Problem, memory: _Memory, rows: RowSettings, kl: KLRowStats, d: Tensor
) -> None:
    """d += the gradient of kl_coef KL / normalizer."""
    count = d.shape[0]
    kl_row_gradient(
        problem.call.impl,
        memory.logits[:count],
        memory.ref_logits[:count],
        kl_settings(rows),
        kl,
        kl_slope(problem, kl.kl),
        d,
        accumulate=True,
    )


def kl_slope(problem: Problem, kl: Tensor) -> Tensor:
    """dloss/dKL of rows with exact KL `kl`: kl_coef / normalizer, times the gradients' scale."""
    slope = torch.full_like(kl, problem.settings.kl_coef * problem.grad_scale)
    if not isinstance(problem.normalizer, Tensor):
        return slope / problem.normalizer if problem.normalizer > 0 else slope * 0
    count = problem.normalizer.reshape(()).to(slope.device)
    positive = count > 0
    return torch.where(positive, slope / torch.where(positive, count, 1), 0).to(kl.dtype)
