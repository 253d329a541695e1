"""Autograd and torch.library of `logprobs_from_logits`: eager calls take the first, torch.compile
the second; both end in `logit_rows`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlhf_fast_kernels.checked_mode import reads_values
from rlhf_fast_kernels.first_order import first_order
from rlhf_fast_kernels.logit_arguments import validate_data
from rlhf_fast_kernels.logit_rows import OP, gather_shards, row_gradient, row_stats
from rlhf_fast_kernels.logit_settings import RowSettings, RowStats

Results = tuple[Tensor, Tensor | None, Tensor]


# ---- both directions, for autograd and torch.library --------------------------------------------


def _forward(
    impl: str,
    logits: Tensor,
    labels: Tensor,
    rows: Tensor | None,
    settings: RowSettings,
    with_entropy: bool,
    group: Any = None,
) -> RowStats:
    shard = group is not None
    stats = row_stats(
        impl, logits, labels, settings, with_entropy=with_entropy, shard=shard, rows=rows
    )
    return gather_shards(stats, labels, settings, group) if shard else stats


def _backward(
    impl: str,
    logits: Tensor,
    labels: Tensor,
    rows: Tensor | None,
    settings: RowSettings,
    stats: RowStats,
    grads: tuple[Tensor | None, Tensor | None],
    in_place: bool = False,
) -> Tensor:
    """The gradient of the logits: a new contiguous tensor, or the logits' own storage."""
    logits = logits.detach()
    out = logits
    if not in_place:
        out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    slots = None if rows is None else _slots(rows, logits.shape[:-1].numel())
    row_gradient(impl, logits, labels, settings, stats, *grads, out, slots=slots)
    return out


def _slots(rows: Tensor, count: int) -> Tensor:
    """The inverse of rows: position of each of `count` rows in it, or -1."""
    slots = torch.full((count + 1,), -1, dtype=torch.int64, device=rows.device)
    # On an accelerator nobody has looked whether rows are in range: what is not goes to the end.
    at = torch.where((rows >= 0) & (rows < count), rows, count)
    slots[at] = torch.arange(len(rows), device=rows.device)
    return slots[:-1]


# ---- eager autograd -----------------------------------------------------------------------------


class LogprobsFromLogits(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        labels: Tensor,
        rows: Tensor | None,
        settings: RowSettings,
        options: tuple[str, bool, bool, Any],
    ) -> Results:
        impl, with_entropy, inplace_backward, group = options
        stats = _forward(impl, logits, labels, rows, settings, with_entropy, group)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(stats.lse)
        ctx.save_for_backward(logits, labels, rows, settings.temperature, *stats)
        ctx.settings, ctx.impl = settings._replace(temperature=None), impl
        ctx.inplace_backward, ctx.consumed = inplace_backward, False
        return stats.logprobs, stats.entropy, stats.lse

    @staticmethod
    @first_order(OP)
    def backward(
        ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None, _grad_lse: Any
    ) -> tuple[Tensor | None, ...]:
        if ctx.consumed:
            raise RuntimeError(
                f"{OP}: a second backward is impossible after inplace_backward=True, because the "
                "first one wrote the gradient over the logits; use inplace_backward=False with "
                "retain_graph=True"
            )
        nothing = (None,) * 4
        if grad_logprobs is None and grad_entropy is None:
            return None, *nothing
        logits, labels, rows, temperature, *stats = ctx.saved_tensors
        grad = _backward(
            ctx.impl,
            logits,
            labels,
            rows,
            ctx.settings._replace(temperature=temperature),
            RowStats(*stats),
            (grad_logprobs, grad_entropy),
            ctx.inplace_backward,
        )
        if ctx.inplace_backward:
            ctx.consumed = True
            # Anyone else who saved these logits for a backward must hear that they are gone.
            torch.autograd.graph.increment_version(logits)
        return grad, *nothing


# ---- torch.library, for torch.compile -----------------------------------------------------------


@torch.library.custom_op("rlhf_fast::logprobs_from_logits", mutates_args=())
def compiled_op(
    logits: Tensor,
    labels: Tensor,
    rows: Tensor | None,
    temperature: Tensor | None,
    scale: float,
    softcap: float | None,
    ignore_index: int,
    vocab_size: int | None,
    with_entropy: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    settings = RowSettings(temperature, scale, softcap, ignore_index, 0, vocab_size)
    if reads_values(logits):
        validate_data(labels, settings, rows, logits.shape)
    stats = _forward(impl, logits, labels, rows, settings, with_entropy)
    entropy = stats.logprobs.new_empty(0) if stats.entropy is None else stats.entropy
    return stats.logprobs, entropy, stats.lse


@compiled_op.register_fake
def _op_fake(logits: Tensor, labels: Tensor, *options: Any) -> tuple[Tensor, Tensor, Tensor]:
    logprobs = torch.empty(labels.shape, dtype=torch.float32, device=logits.device)
    with_entropy = options[-2]
    entropy = torch.empty_like(logprobs) if with_entropy else logprobs.new_empty(0)
    return logprobs, entropy, torch.empty_like(logprobs, dtype=torch.float64)


@torch.library.custom_op("rlhf_fast::logprobs_from_logits_backward", mutates_args=())
def _backward_op(
    logits: Tensor,
    labels: Tensor,
    rows: Tensor | None,
    temperature: Tensor | None,
    scale: float,
    softcap: float | None,
    ignore_index: int,
    vocab_size: int | None,
    impl: str,
    entropy: Tensor | None,
    lse: Tensor,
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
) -> Tensor:
    settings = RowSettings(temperature, scale, softcap, ignore_index, 0, vocab_size)
    stats = RowStats(lse, entropy, lse)
    grads = (grad_logprobs, grad_entropy)
    return _backward(impl, logits, labels, rows, settings, stats, grads)


@_backward_op.register_fake
def _backward_op_fake(logits: Tensor, *_: Any) -> Tensor:
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, labels, rows, temperature, *scalars, with_entropy, impl = inputs
    _, entropy, lse = output
    ctx.save_for_backward(logits, labels, rows, temperature, entropy, lse)
    ctx.scalars, ctx.with_entropy, ctx.impl = scalars, with_entropy, impl


def _op_backward(
    ctx: Any, grad_logprobs: Tensor, grad_entropy: Tensor, _grad_lse: Tensor
) -> tuple[Tensor | None, ...]:
    *tensors, entropy, lse = ctx.saved_tensors
    of_entropy = (entropy, grad_entropy) if ctx.with_entropy else (None, None)
    grad = _backward_op(
        *tensors, *ctx.scalars, ctx.impl, of_entropy[0], lse, grad_logprobs, of_entropy[1]
    )
    return grad, *(None,) * 9


compiled_op.register_autograd(_op_backward, setup_context=_setup_context)
