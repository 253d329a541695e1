"""Log-probability and entropy of tokens straight from hidden states and the vocabulary head.

With z = softcap(x W^T + b) / temperature:

    logp = z_label - logsumexp(z)          H = logsumexp(z) - sum_j p_j z_j        p = softmax(z)

as in `logprobs_from_logits`, but logits exist for one chunk of rows only: forward makes a chunk,
reads its sums and forgets it. For backward two numbers a row are kept; each chunk's logits are
computed again, turned into their gradient D, and

    d hidden = D W        d weight = sum over chunks of D^T x  (fp32)        d bias = sum of D

That is 2 T H V flops forward and 6 backward (4 if the head or the hidden states are frozen).
`linear_ppo_loss` needs 6 in all, because it knows the loss; this op serves any loss.

Tokens whose label is `ignore_index` are left out before the first product: they cost nothing.

Under tensor parallelism (`group`) each rank holds V / W rows of the weight; per row the ranks
exchange three numbers, merged in rank order, and the gradients of the hidden states are summed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlhf_fast_kernels import dispatch, reference
from rlhf_fast_kernels.first_order import first_order
from rlhf_fast_kernels.linear_arguments import (
    Tokens,
    compute_dtype_of,
    select_tokens,
    temperature_of,
    validate_group,
    validate_head,
    validate_label_range,
    validate_labels,
    validate_selection,
    validate_softcap,
    vocabulary_of,
)
from rlhf_fast_kernels.linear_chunks import (
    Call,
    checked_gradients,
    chunked_gradients,
    chunked_stats,
    register_chunked,
)
from rlhf_fast_kernels.linear_head import Head
from rlhf_fast_kernels.logit_rows import RowStats

OP = "linear_logprobs"

# ---- eager autograd -----------------------------------------------------------------------------


class _LinearLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        tokens: Tokens,
        call: Call,
    ) -> tuple[Tensor, Tensor | None]:
        head = Head(weight.detach(), None if bias is None else bias.detach(), call.compute)
        stats = chunked_stats(hidden.detach(), head, tokens, call)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(hidden, weight, bias, *tokens, stats.entropy, stats.lse)
        ctx.call = call
        count = hidden.shape[0]
        entropy = None if stats.entropy is None else tokens.spread(stats.entropy, count)
        return tokens.spread(stats.logprobs, count), entropy if call.with_entropy else None

    @staticmethod
    @first_order(OP)
    def backward(
        ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        if grad_logprobs is None and grad_entropy is None:
            return (None,) * 5
        hidden, weight, bias, *rest = ctx.saved_tensors
        grads = _gradients(
            (hidden, weight, bias),
            Tokens(*rest[:3]),
            ctx.call,
            RowStats(rest[4], rest[3], rest[4]),  # gradients read no log-prob
            (grad_logprobs, grad_entropy),
            ctx.needs_input_grad[:3],
        )
        return *grads, None, None


def _gradients(
    inputs: tuple[Tensor, Tensor, Tensor | None],
    tokens: Tokens,
    call: Call,
    stats: RowStats,
    upstream: tuple[Tensor | None, Tensor | None],
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, ...]:
    """Gradients of the inputs that need one, in their dtypes."""
    hidden, weight, bias = (None if x is None else x.detach() for x in inputs)
    assert hidden is not None
    assert weight is not None
    g, h = (None if x is None else tokens.pick(x) for x in upstream)
    head = Head(weight, bias, call.compute)
    with torch.autocast(hidden.device.type, enabled=False):
        found = chunked_gradients(hidden, head, tokens, call, stats, (g, h), needs)
    return tuple(
        None if g is None or x is None else g.to(x.dtype)
        for g, x in zip(found, inputs, strict=True)
    )


# ---- torch.library, for torch.compile -----------------------------------------------------------


def _call_of(
    impl: str,
    compute: torch.dtype,
    scale: float,
    softcap: float | None,
    vocab_size: int | None,
    chunk_rows: int | None,
    fused: bool,
) -> Call:
    scalars = (scale, softcap, vocab_size, chunk_rows)
    return Call(impl, compute, *scalars, with_entropy=True, fused=fused)


@torch.library.custom_op(f"rlhf_fast::{OP}", mutates_args=())
def _op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    rows: Tensor | None,
    temperature: Tensor | None,
    ignore_index: int,
    impl: str,
    compute: torch.dtype,
    scale: float,
    softcap: float | None,
    vocab_size: int | None,
    chunk_rows: int | None,
    fused: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    call = _call_of(impl, compute, scale, softcap, vocab_size, chunk_rows, fused)
    tokens = _tokens(labels, rows, temperature, ignore_index)
    validate_label_range(OP, tokens.labels, vocabulary_of(weight, vocab_size, None))
    stats = chunked_stats(hidden, Head(weight, bias, compute), tokens, call)
    assert stats.entropy is not None
    logprobs, entropy, lse = (
        tokens.spread(x, labels.shape[0]).clone()
        for x in (stats.logprobs, stats.entropy, stats.lse)
    )
    return logprobs, entropy, lse


@_op.register_fake
def _op_fake(hidden: Tensor, weight: Tensor, bias: Any, labels: Tensor, *rest: Any) -> Any:
    kind = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    make = lambda dtype: torch.empty(labels.shape, dtype=dtype, device=labels.device)  # noqa: E731
    return make(kind), make(kind), make(torch.float64)


@torch.library.custom_op(f"rlhf_fast::{OP}_backward", mutates_args=())
def _backward_op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    rows: Tensor | None,
    temperature: Tensor | None,
    ignore_index: int,
    impl: str,
    compute: torch.dtype,
    scale: float,
    softcap: float | None,
    vocab_size: int | None,
    chunk_rows: int | None,
    fused: bool,
    stats: list[Tensor],
    upstream: list[Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    call = _call_of(impl, compute, scale, softcap, vocab_size, chunk_rows, fused)
    tokens = _tokens(labels, rows, temperature, ignore_index)
    grads = _gradients(
        (hidden, weight, bias),
        tokens,
        call,
        RowStats(*(tokens.pick(s) for s in stats)),
        (upstream[0], upstream[1]),
        (True, True, bias is not None),
    )
    d_hidden, d_weight, d_bias = (weight.new_empty(0) if g is None else g for g in grads)
    return d_hidden, d_weight, d_bias


@_backward_op.register_fake
def _backward_op_fake(hidden: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Any:
    nothing = weight.new_empty(0)
    return (
        torch.empty_like(hidden),
        weight.new_empty(weight.shape),
        nothing if bias is None else torch.empty_like(bias),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:6], *output)
    ctx.rest = inputs[6:]


def _op_backward(
    ctx: Any, grad_logprobs: Tensor, grad_entropy: Tensor, _grad_lse: Tensor
) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    d_hidden, d_weight, d_bias = _backward_op(
        *saved[:6], *ctx.rest, list(saved[6:]), [grad_logprobs, grad_entropy]
    )
    return d_hidden, d_weight, None if saved[2] is None else d_bias, *(None,) * 11


_op.register_autograd(_op_backward, setup_context=_setup_context)


# ---- the public function ------------------------------------------------------------------------


def _tokens(
    labels: Tensor, rows: Tensor | None, temperature: Tensor | None, ignore_index: int
) -> Tokens:
    keep = None if rows is not None else labels != ignore_index
    return select_tokens(OP, labels, keep, rows, temperature)


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    with_entropy: bool = True,
    ignore_index: int = -100,
    rows: Tensor | None = None,
    vocab_size: int | None = None,
    compute_dtype: torch.dtype | None = None,
    chunk_rows: int | None = None,
    group: Any = None,
    vocab_start: int | None = None,
    sum_hidden_gradient: bool = True,
    fused: bool = False,
    impl: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Per-token log softmax(softcap(hidden weight^T + bias) / temperature)[label] and entropy.

    Args:
        hidden: `[..., H]`, fp32, bf16 or fp16 (fp64 with `impl="reference"`).
        weight: `[V, H]`, any of these dtypes: fp32 masters may serve bf16 hidden states. Under
            tensor parallelism, this rank's rows of it.
        labels: `[...]` int64 in `[0, V)`, or `ignore_index`: such tokens cost nothing, yield exact
            0 and have a zero gradient; their hidden states may hold NaN. Global under `group`.
        bias: `[V]` or None.
        temperature: positive scalar, or a tensor of labels' shape. It receives no gradient.
        softcap: c of c tanh(logit / c), before the temperature (Gemma 2); None: no cap.
        with_entropy: whether to return the entropy.
        ignore_index: see labels.
        rows: `[n]` int32 or int64, the flat indices of the tokens that count, each once, on the
            device, instead of `ignore_index`. Without it they are looked up, and an accelerator has
            to be waited for.
        vocab_size: number of real tokens; rows of the weight from there on are padding and have no
            probability. None: all are real.
        compute_dtype: dtype the operands of the products are rounded to; None: autocast's inside
            autocast, otherwise hidden's. Logits and everything up to their gradient are fp32.
        chunk_rows: rows whose logits exist at once; None: up to 512 on CPUs, 4096 on GPUs.
        group: process group over which the vocabulary is split.
        vocab_start: id of the first row of `weight` on this rank, with `vocab_size`; None: equal
            shards in rank order.
        sum_hidden_gradient: under `group`, all-reduce the gradient of `hidden`. False leaves each
            rank's part to the caller (sequence parallelism reduce-scatters it).
        fused: forward in one Triton kernel that makes no logits at all, not even a chunk's, with
            `impl="triton"`; backward is chunked all the same.
        impl: whose row kernels, see `rlhf_fast_kernels.dispatch`; unless fused the products are
            those of `rlhf_fast_kernels.matmul` whatever the name.

    Returns:
        `(logprobs, entropy)` in nats, fp32, of labels' shape; entropy is None without
        `with_entropy`.

    Raises:
        ValueError: shapes, devices or shards that do not fit, an empty vocabulary; on the CPU also
            labels and rows out of range. On an accelerator a label out of range yields NaN. Also
            `fused` where that kernel cannot run.
        TypeError: wrong dtypes, or a DTensor.
        RuntimeError: the implementation asked for cannot run here.
    """
    validate_head(OP, hidden, weight, bias)
    validate_labels(OP, hidden, labels)
    validate_softcap(OP, softcap)
    validate_selection(OP, None, rows, chunk_rows)
    validate_group(OP, group, vocab_size, vocab_start)
    scale, per_row = temperature_of(OP, temperature, labels)
    compute = compute_dtype_of(hidden, compute_dtype)
    chosen = dispatch.choose(OP, impl, hidden, weight, hidden.new_empty(0, dtype=compute))
    if fused and chosen.impl != "triton":
        raise ValueError(
            f"{OP}: fused=True is a Triton kernel, and the implementation of this call is "
            f"{chosen.impl!r}"
        )
    flat, flat_labels = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    compiling = torch.compiler.is_compiling()
    if compiling and group is not None:
        raise ValueError(f"{OP}: group is not supported under torch.compile")
    with torch.autocast(hidden.device.type, enabled=False):
        if compiling:
            logprobs, entropy, _ = _op(
                *(flat, weight, bias, flat_labels, rows, per_row, ignore_index),
                *(chosen.impl, compute, scale, softcap, vocab_size, chunk_rows, fused),
            )
        else:
            call = Call(
                *(chosen.impl, compute, scale, softcap, vocab_size, chunk_rows, with_entropy),
                *(group, sum_hidden_gradient, vocab_start, fused),
            )
            tokens = _tokens(flat_labels, rows, per_row, ignore_index)
            validate_label_range(OP, tokens.labels, vocabulary_of(weight, vocab_size, group))
            logprobs, entropy = _LinearLogprobs.apply(flat, weight, bias, tokens, call)
    if not with_entropy or entropy is None:
        return logprobs.view(labels.shape), None
    return logprobs.view(labels.shape), entropy.view(labels.shape)


# ---- registration -------------------------------------------------------------------------------


def _selftest(
    device: torch.device, dtype: torch.dtype, generator: torch.Generator
) -> dispatch.SelftestRun:
    hidden = torch.randn(9, 32, generator=generator).to(device, dtype)
    weight = (torch.randn(1027, 32, generator=generator) / 4).to(device, dtype)
    labels = torch.randint(0, 1027, (9,), generator=generator).to(device)
    labels[2] = -100
    upstream = torch.randn(2, 9, generator=generator).to(device)

    def run(impl: str) -> tuple[Tensor, ...]:
        leaves = [x.float().clone().requires_grad_() for x in (hidden, weight)]
        op: Any = reference.linear_logprobs if impl == "reference" else linear_logprobs
        options = {"compute_dtype": dtype} | ({} if impl == "reference" else {"impl": impl})
        logprobs, entropy = op(*leaves, labels, temperature=0.7, **options)
        assert entropy is not None
        (upstream[0] * logprobs + upstream[1] * entropy).sum().backward()
        return logprobs.detach(), entropy.detach(), *checked_gradients(leaves, dtype)

    return run


register_chunked(OP, "logprobs_from_logits_forward", "logprobs_from_logits_backward")
dispatch.register_selftest(OP, _selftest)
