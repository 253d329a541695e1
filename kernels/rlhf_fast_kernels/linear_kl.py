"""The exact KL(actor || reference) of every token over the whole vocabulary, from hidden states.

With z = softcap(x W^T + b) / temperature for the actor and q the same for the reference:

    p = softmax(z)      KL = sum_j p_j (z_j - q_j) - logsumexp(z) + logsumexp(q)
    dKL/dz_j = p_j ( (z_j - logsumexp(z)) - (q_j - logsumexp(q)) - KL )

k1, k2 and k3 estimate this number from the one token that was sampled. It has no noise of sampling,
and its gradient is that of the KL itself. Both sides' logits exist for one chunk of rows, in one
sweep; three numbers a row are kept for backward, which makes the chunk's logits again. 4 T H V
flops forward, 8 backward. No gradient flows to the reference.

`linear_ppo_loss(kl_estimator="exact")` has the same term at 2 T H V, inside the loss.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from rlhf_fast_kernels import dispatch, reference
from rlhf_fast_kernels.first_order import first_order
from rlhf_fast_kernels.kl_rows import (
    KLRowSettings,
    KLRowStats,
    gather_kl_shards,
    kl_row_gradient,
    kl_row_stats,
)
from rlhf_fast_kernels.linear_arguments import (
    Tokens,
    compute_dtype_of,
    is_distributed,
    select_tokens,
    temperature_of,
    validate_group,
    validate_head,
    validate_reference,
    validate_selection,
    validate_softcap,
)
from rlhf_fast_kernels.linear_chunks import (
    Call,
    GradientSink,
    checked_gradients,
    chunk_workspace,
    part,
    register_chunked,
)
from rlhf_fast_kernels.linear_head import Head
from rlhf_fast_kernels.logit_rows import RowSettings

OP = "linear_kl"
Needs = tuple[bool, bool, bool]


@dataclass(frozen=True)
class Side:
    """Hidden states [N, H] and head of the actor or of the reference."""

    hidden: Tensor
    head: Head

    def rounded(self) -> Side:
        """With the head's weight in the compute dtype where the device multiplies that."""
        return Side(self.hidden, self.head.rounded())


def kl_settings(rows: RowSettings) -> KLRowSettings:
    """The reference under the actor's temperature, softcap and vocabulary."""
    return KLRowSettings(
        temperature=rows.temperature,
        scale=rows.scale,
        softcap=rows.softcap,
        ref_softcap=rows.softcap,
        vocab_start=rows.vocab_start,
        vocab_size=rows.vocab_size,
    )


# ---- chunks -------------------------------------------------------------------------------------


class _Sweep:
    """Both sides' logits, chunk by chunk, in the same memory."""

    def __init__(self, actor: Side, ref: Side, tokens: Tokens, call: Call) -> None:
        self.tokens, self.call = tokens, call
        head, device = actor.head, actor.hidden.device
        self.bounds = call.bounds(tokens.labels.shape[0], head, device)
        self._logits = chunk_workspace(self.bounds, head.vocab, head.accumulate, device)
        self._ref_logits = torch.empty_like(self._logits)
        self._settings = call.settings(head, tokens.temperature)
        self.actor, self._ref = actor.rounded(), ref.rounded()

    def chunk(self, start: int, stop: int) -> tuple[Tensor, Tensor, Tensor, KLRowSettings]:
        """(actor's operand, its logits, the reference's, settings) of rows [start, stop)."""
        logits, ref_logits = self._logits[: stop - start], self._ref_logits[: stop - start]
        x = self.actor.head.operand(self.tokens.take(self.actor.hidden, start, stop))
        self.actor.head.logits(x, logits)
        ref_x = self._ref.head.operand(self.tokens.take(self._ref.hidden, start, stop))
        self._ref.head.logits(ref_x, ref_logits)
        return x, logits, ref_logits, kl_settings(part(self._settings, start, stop))


def _forward(actor: Side, ref: Side, tokens: Tokens, call: Call) -> KLRowStats:
    """[n] each."""
    sharded = is_distributed(call.group)
    sweep = _Sweep(actor, ref, tokens, call)
    parts = []
    for start, stop in pairwise(sweep.bounds):
        _, logits, ref_logits, settings = sweep.chunk(start, stop)
        parts.append(kl_row_stats(call.impl, logits, ref_logits, settings, shard=sharded))
    stats = KLRowStats(*(torch.cat(x) for x in zip(*parts, strict=True)))
    return gather_kl_shards(stats, call.group) if sharded else stats


def _backward(
    actor: Side,
    ref: Side,
    tokens: Tokens,
    call: Call,
    stats: KLRowStats,
    grad_kl: Tensor,
    needs: Needs,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    sweep = _Sweep(actor, ref, tokens, call)
    head = sweep.actor.head
    grads = chunk_workspace(
        sweep.bounds if head.gradient_apart else [0],
        head.vocab,
        head.gradient_dtype,
        grad_kl.device,
    )
    sink = GradientSink(actor.hidden, head, tokens, needs)
    for start, stop in pairwise(sweep.bounds):
        x, logits, ref_logits, settings = sweep.chunk(start, stop)
        d = grads[: stop - start] if head.gradient_apart else logits
        here = KLRowStats(*(s[start:stop] for s in stats))
        kl_row_gradient(call.impl, logits, ref_logits, settings, here, grad_kl[start:stop], d)
        sink.add(d, x, start, stop)
    return sink.finish(call)


# ---- autograd -----------------------------------------------------------------------------------


class _LinearKL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        ref: Side,
        tokens: Tokens,
        call: Call,
    ) -> Tensor:
        stats = _forward(_side(hidden, weight, bias, call), ref, tokens, call)
        frozen = (ref.hidden, ref.head.weight, ref.head.bias)
        ctx.save_for_backward(hidden, weight, bias, *frozen, *tokens, *stats)
        ctx.call = call
        return tokens.spread(stats.kl, hidden.shape[0])

    @staticmethod
    @first_order(OP)
    def backward(ctx: Any, grad_kl: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, *rest = ctx.saved_tensors
        ref_hidden, ref_weight, ref_bias = rest[:3]
        tokens, stats = Tokens(*rest[3:6]), KLRowStats(*rest[6:])
        with torch.autocast(hidden.device.type, enabled=False):
            found = _backward(
                _side(hidden, weight, bias, ctx.call),
                _side(ref_hidden, ref_weight, ref_bias, ctx.call),
                tokens,
                ctx.call,
                stats,
                tokens.pick(grad_kl).contiguous(),
                ctx.needs_input_grad[:3],
            )
        typed = (
            None if g is None else g.to(x.dtype)
            for g, x in zip(found, (hidden, weight, bias), strict=True)
        )
        return *typed, None, None, None


def _side(hidden: Tensor, weight: Tensor, bias: Tensor | None, call: Call) -> Side:
    head = Head(weight.detach(), None if bias is None else bias.detach(), call.compute)
    return Side(hidden.detach(), head)


# ---- torch.library, for torch.compile -----------------------------------------------------------


def _no_labels(hidden: Tensor) -> Tensor:
    """The KL has no labels; what counts tokens wants some."""
    return hidden.new_zeros(hidden.shape[:-1], dtype=torch.int64)


@torch.library.custom_op(f"rlhf_fast::{OP}", mutates_args=())
def _op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    ref_bias: Tensor | None,
    keep: Tensor | None,
    rows: Tensor | None,
    temperature: Tensor | None,
    impl: str,
    compute: torch.dtype,
    scale: float,
    softcap: float | None,
    vocab_size: int | None,
    chunk_rows: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    call = Call(impl, compute, scale, softcap, vocab_size, chunk_rows, with_entropy=False)
    tokens = select_tokens(OP, _no_labels(hidden), keep, rows, temperature)
    actor = _side(hidden, weight, bias, call)
    ref = _side(ref_hidden, ref_weight, ref_bias, call)
    stats = _forward(actor, ref, tokens, call)
    kl, lse, ref_lse = (tokens.spread(x, hidden.shape[0]).clone() for x in stats)
    return kl, lse, ref_lse


@_op.register_fake
def _op_fake(hidden: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    kind = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    kl = torch.empty(hidden.shape[0], dtype=kind, device=hidden.device)
    return kl, torch.empty_like(kl, dtype=torch.float64), torch.empty_like(kl, dtype=torch.float64)


@torch.library.custom_op(f"rlhf_fast::{OP}_backward", mutates_args=())
def _backward_op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    ref_bias: Tensor | None,
    keep: Tensor | None,
    rows: Tensor | None,
    temperature: Tensor | None,
    impl: str,
    compute: torch.dtype,
    scale: float,
    softcap: float | None,
    vocab_size: int | None,
    chunk_rows: int | None,
    stats: list[Tensor],
    grad_kl: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    call = Call(impl, compute, scale, softcap, vocab_size, chunk_rows, with_entropy=False)
    tokens = select_tokens(OP, _no_labels(hidden), keep, rows, temperature)
    actor = _side(hidden, weight, bias, call)
    ref = _side(ref_hidden, ref_weight, ref_bias, call)
    here = KLRowStats(*(tokens.pick(s) for s in stats))
    grad = tokens.pick(grad_kl).contiguous()
    found = _backward(actor, ref, tokens, call, here, grad, (True, True, bias is not None))
    typed = (
        weight.new_empty(0) if g is None or x is None else g.to(x.dtype)
        for g, x in zip(found, (hidden, weight, bias), strict=True)
    )
    d_hidden, d_weight, d_bias = typed
    return d_hidden, d_weight, d_bias


@_backward_op.register_fake
def _backward_op_fake(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    nothing = weight.new_empty(0)
    d_bias = nothing if bias is None else torch.empty_like(bias)
    return torch.empty_like(hidden), weight.new_empty(weight.shape), d_bias


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:9], *output)
    ctx.scalars = inputs[9:]


def _op_backward(ctx: Any, grad_kl: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    tensors, stats = ctx.saved_tensors[:9], list(ctx.saved_tensors[9:])
    d_hidden, d_weight, d_bias = _backward_op(*tensors, *ctx.scalars, stats, grad_kl)
    return d_hidden, d_weight, None if tensors[2] is None else d_bias, *(None,) * 12


_op.register_autograd(_op_backward, setup_context=_setup_context)


# ---- the public function ------------------------------------------------------------------------


def linear_kl(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    *,
    bias: Tensor | None = None,
    ref_bias: Tensor | None = None,
    mask: Tensor | None = None,
    rows: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    vocab_size: int | None = None,
    compute_dtype: torch.dtype | None = None,
    chunk_rows: int | None = None,
    group: Any = None,
    vocab_start: int | None = None,
    sum_hidden_gradient: bool = True,
    impl: str | None = None,
) -> Tensor:
    """Exact KL(softmax(actor's logits / T) || softmax(reference's logits / T)) of each token.

    Args:
        hidden, weight, bias: the actor's hidden states `[..., H]` and head `[V, H]`, `[V]`.
        ref_hidden, ref_weight, ref_bias: the reference's, `[..., H']`, `[V, H']`, `[V]`; they
            receive no gradient.
        mask: bool `[...]`; tokens where it is false cost nothing and yield exact 0. None: all.
        rows: `[n]` int64, the flat indices of the tokens that count, instead of `mask`.
        temperature, softcap, vocab_size, compute_dtype, chunk_rows, group, vocab_start,
            sum_hidden_gradient, impl: as in `linear_logprobs`, for both sides.

    Returns:
        `[...]` fp32 (fp64 for fp64 inputs), nats.

    Raises:
        ValueError, TypeError, RuntimeError: as `linear_logprobs`.
    """
    validate_head(OP, hidden, weight, bias)
    validate_reference(OP, hidden, weight, (ref_hidden, ref_weight, ref_bias))
    validate_softcap(OP, softcap)
    validate_selection(OP, mask, rows, chunk_rows)
    validate_group(OP, group, vocab_size, vocab_start)
    labels = _no_labels(hidden)
    if mask is not None and (mask.dtype != torch.bool or mask.shape != labels.shape):
        raise ValueError(
            f"{OP}: mask must be bool {tuple(labels.shape)}, got {mask.dtype} {tuple(mask.shape)}"
        )
    scale, per_row = temperature_of(OP, temperature, labels)
    compute = compute_dtype_of(hidden, compute_dtype)
    chosen = dispatch.choose(OP, impl, hidden, weight, hidden.new_empty(0, dtype=compute))
    flat, ref_flat = (x.reshape(-1, x.shape[-1]) for x in (hidden, ref_hidden))
    keep = None if mask is None or rows is not None else mask.reshape(-1)
    scalars = (scale, softcap, vocab_size, chunk_rows)
    with torch.autocast(hidden.device.type, enabled=False):
        if torch.compiler.is_compiling():
            if group is not None:
                raise ValueError(f"{OP}: group is not supported under torch.compile")
            ref_tensors = [x if x is None else x.detach() for x in (ref_flat, ref_weight, ref_bias)]
            selection = (keep, rows, per_row)
            kl, _, _ = _op(
                *(flat, weight, bias, *ref_tensors, *selection, chosen.impl, compute, *scalars)
            )
        else:
            call = Call(
                chosen.impl, compute, *scalars, False, group, sum_hidden_gradient, vocab_start
            )
            tokens = select_tokens(OP, labels.reshape(-1), keep, rows, per_row)
            ref = _side(ref_flat, ref_weight, ref_bias, call)
            kl = _LinearKL.apply(flat, weight, bias, ref, tokens, call)
    return kl.view(labels.shape)


# ---- registration -------------------------------------------------------------------------------


def _selftest(
    device: torch.device, dtype: torch.dtype, generator: torch.Generator
) -> dispatch.SelftestRun:
    hidden = torch.randn(7, 32, generator=generator).to(device, dtype)
    weight = (torch.randn(1027, 32, generator=generator) / 4).to(device, dtype)
    ref_hidden = (hidden + 0.1 * torch.randn(7, 32, generator=generator).to(device)).to(dtype)
    upstream = torch.randn(7, generator=generator).to(device)

    def run(impl: str) -> tuple[Tensor, ...]:
        leaves = [x.float().clone().requires_grad_() for x in (hidden, weight)]
        op: Any = reference.linear_kl if impl == "reference" else linear_kl
        options = {"compute_dtype": dtype} | ({} if impl == "reference" else {"impl": impl})
        kl = op(*leaves, ref_hidden.float(), weight.float(), temperature=0.7, **options)
        (upstream * kl).sum().backward()
        return kl.detach(), *checked_gradients(leaves, dtype)

    return run


register_chunked(OP, "kl_from_logits_forward", "kl_from_logits_backward")
dispatch.register_selftest(OP, _selftest)
