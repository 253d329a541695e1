"""Log-probability of the label and entropy of the distribution, in one read of the logits.

With z = logits / temperature, or softcap * tanh(logits / softcap) / temperature, over the
vocabulary j and per row:

    m    = max_j z_j                        lse = m + log sum_j exp(z_j - m)
    logp = z_label - lse                    p_j = exp(z_j - lse)
    H    = - sum_j p_j log p_j = lse - sum_j p_j z_j

and for upstream gradients g = dL/dlogp, h = dL/dH (dlogp/dz_j = [j = label] - p_j and
dH/dz_j = -p_j (log p_j + H), because sum_j p_j log p_j = -H):

    dL/dlogits_j = ( g ([j = label] - p_j) - h p_j (z_j - lse + H) ) / temperature
                   * (1 - tanh(logits_j / softcap)^2)                          with a softcap

Saved for backward are the logits themselves and two numbers a row, lse and H: backward is one read
and one write, and nothing of the logits' size is allocated but the gradient.

Over vocabulary shards, lse, H and z_label of each are gathered and merged in rank order
(`logit_rows.merge_shards`); backward fills each rank's shard from the merged ones.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal, overload

import torch
from torch import Tensor

from rlhf_fast_kernels import dispatch, native, reference, triton_support
from rlhf_fast_kernels.logit_arguments import (
    Arguments,
    row_settings,
    validate,
    validate_data,
    validate_inplace,
)
from rlhf_fast_kernels.logit_rows import OP, gather_shards, row_gradient, row_stats
from rlhf_fast_kernels.logit_settings import RowSettings, RowStats

FAST_DTYPES = tuple(native.DTYPE_CODES)
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


class _LogprobsFromLogits(torch.autograd.Function):
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
    @torch.autograd.function.once_differentiable
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
def _op(
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
    if logits.device.type == "cpu":
        validate_data(labels, settings, rows, logits.shape)
    stats = _forward(impl, logits, labels, rows, settings, with_entropy)
    entropy = stats.logprobs.new_empty(0) if stats.entropy is None else stats.entropy
    return stats.logprobs, entropy, stats.lse


@_op.register_fake
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


_op.register_autograd(_op_backward, setup_context=_setup_context)


# ---- the public function ------------------------------------------------------------------------


@overload
def logprobs_from_logits(
    logits: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor = ...,
    softcap: float | None = ...,
    rows: Tensor | None = ...,
    vocab_size: int | None = ...,
    group: Any = ...,
    vocab_start: int | None = ...,
    with_entropy: bool = ...,
    with_lse: Literal[False] = ...,
    ignore_index: int = ...,
    inplace_backward: bool = ...,
    impl: str | None = ...,
) -> tuple[Tensor, Tensor | None]: ...


@overload
def logprobs_from_logits(
    logits: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor = ...,
    softcap: float | None = ...,
    rows: Tensor | None = ...,
    vocab_size: int | None = ...,
    group: Any = ...,
    vocab_start: int | None = ...,
    with_entropy: bool = ...,
    with_lse: Literal[True],
    ignore_index: int = ...,
    inplace_backward: bool = ...,
    impl: str | None = ...,
) -> Results: ...


def logprobs_from_logits(
    logits: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    rows: Tensor | None = None,
    vocab_size: int | None = None,
    group: Any = None,
    vocab_start: int | None = None,
    with_entropy: bool = True,
    with_lse: bool = False,
    ignore_index: int = -100,
    inplace_backward: bool = False,
    impl: str | None = None,
) -> tuple[Tensor, Tensor | None] | Results:
    """Per-row log softmax(z)[label] and entropy of softmax(z), in nats.

    Args:
        logits: `[..., V]`, fp32 or bf16, on an accelerator also fp16 (the PyTorch reference takes
            any). Slices and transposes of the leading dims are read where they lie; a strided last
            dim is copied.
        labels: `[...]` int64 in `[0, vocab_size)`, or `ignore_index`; `[M]` with `rows`.
        temperature: positive scalar, or a tensor of labels' shape. It receives no gradient.
        softcap: z = softcap * tanh(logits / softcap) / temperature, as Gemma has it. A logit at
            -inf is then at -softcap.
        rows: `[M]` int64 or int32, indices into the flattened leading dims. Only these rows are
            read; the others have a zero gradient. No row may be named twice.
        vocab_size: ids that exist. Columns from there on (padding of the embedding) are not read
            and have a zero gradient. Default: all columns.
        group: `torch.distributed` process group over which the vocabulary is split, in rank order:
            `logits` are this rank's columns, labels the ids of the whole vocabulary and the same on
            all ranks, as are the upstream gradients. Results are the same bits on all ranks.
        vocab_start: id of this rank's first column, for unequal shards; needs `vocab_size`.
            Default: all shards have this one's width, and `vocab_size` is their sum.
        with_entropy: whether to return the entropy; it costs no further read.
        with_lse: return log sum exp z as third; it carries no gradient.
        ignore_index: rows with this label are not read (they may hold NaN), yield exact 0 and
            have a zero gradient.
        inplace_backward: write the gradient over the logits, which must not be needed by anyone
            else. A second backward then raises. Has no effect under `torch.compile` or in the
            reference.
        impl: implementation by name, see `rlhf_fast_kernels.dispatch`.

    Returns:
        `(logprobs, entropy)` or `(logprobs, entropy, lse)`, fp32 (fp64 for fp64 logits), of labels'
        shape; entropy is None without `with_entropy`. Entries at -inf are legal (probability 0); a
        row that holds NaN or +inf, or nothing above -inf, yields NaN.

    Raises:
        TypeError: a dtype that no implementation takes.
        ValueError: shapes differ; on the CPU also a label out of range, a temperature that is not
            positive, a row out of range or named twice, naming row and value. On an accelerator,
            where looking would stall the device, such a row yields NaN. `inplace_backward` on a
            leaf or on overlapping rows.
        RuntimeError: second backward after `inplace_backward`.
    """
    arguments = Arguments(temperature, softcap, rows, vocab_size, group, vocab_start, ignore_index)
    validate(logits, labels, arguments)
    settings = row_settings(logits, labels, arguments)
    rows = None if rows is None else rows.to(torch.int64).contiguous()
    chosen = dispatch.choose(OP, impl, logits)
    if torch.compiler.is_compiling() and group is None:
        run = _run_reference if chosen.impl == "reference" else partial(_run_compiled, chosen.impl)
        results = run(logits, labels, rows, settings, (with_entropy, False, None))
    else:
        if logits.device.type == "cpu":
            validate_data(labels, settings, rows, logits.shape)
        results = chosen.function(
            logits, labels, rows, settings, (with_entropy, inplace_backward, group)
        )
    logprobs, entropy, lse = results
    if not with_lse:
        return logprobs, entropy
    return logprobs, entropy, lse.to(logprobs.dtype)


# ---- implementations ----------------------------------------------------------------------------

Options = tuple[bool, bool, Any]  # with_entropy, inplace_backward, group


def _run_compiled(
    impl: str,
    logits: Tensor,
    labels: Tensor,
    rows: Tensor | None,
    settings: RowSettings,
    options: Options,
) -> Results:
    logprobs, entropy, lse = _op(
        logits,
        labels,
        rows,
        settings.temperature,
        settings.scale,
        settings.softcap,
        settings.ignore_index,
        settings.vocab_size,
        options[0],
        impl,
    )
    return logprobs, entropy if options[0] else None, lse


def _run_fused(
    impl: str,
    logits: Tensor,
    labels: Tensor,
    rows: Tensor | None,
    settings: RowSettings,
    options: Options,
) -> Results:
    with_entropy, inplace_backward, group = options
    if inplace_backward:
        validate_inplace(logits)
    results: Results = _LogprobsFromLogits.apply(
        logits, labels, rows, settings, (impl, with_entropy, inplace_backward, group)
    )
    return results


def _run_reference(
    logits: Tensor,
    labels: Tensor,
    rows: Tensor | None,
    settings: RowSettings,
    options: Options,
) -> Results:
    with_entropy, _, group = options
    if group is not None:
        return _run_fused("reference", logits, labels, rows, settings, (with_entropy, False, group))
    return reference.logprobs_from_logits(
        logits,
        labels,
        temperature=settings.scale if settings.temperature is None else settings.temperature,
        softcap=settings.softcap,
        rows=rows,
        vocab_size=settings.vocab_size,
        with_entropy=with_entropy,
        ignore_index=settings.ignore_index,
    )


def _selftest(
    device: torch.device, dtype: torch.dtype, generator: torch.Generator
) -> dispatch.SelftestRun:
    logits = (4 * torch.randn(5, 1027, generator=generator)).to(device, dtype)
    labels = torch.randint(0, 1027, (5,), generator=generator).to(device)
    labels[2] = -100
    upstream = torch.randn(2, 5, generator=generator).to(device)

    def run(impl: str) -> tuple[Tensor, ...]:
        leaf = logits.clone().requires_grad_()
        logprobs, entropy = logprobs_from_logits(leaf, labels, temperature=0.7, impl=impl)
        assert entropy is not None
        (upstream[0] * logprobs + upstream[1] * entropy).sum().backward()
        assert leaf.grad is not None
        # One step of bf16 lies above the self-test's tolerance: gradients are summed in fp32.
        return logprobs.detach(), entropy.detach(), leaf.grad.float().square().sum(-1)

    return run


dispatch.register(OP, "reference", _run_reference)
dispatch.register(
    OP,
    "cpu",
    partial(_run_fused, "cpu"),
    native.on_cpu(f"{OP}_forward", f"{OP}_backward"),
    dtypes=FAST_DTYPES,
)
# Above CUDA: on [tokens, vocab] a launch costs nothing beside the work.
triton_support.register(OP, partial(_run_fused, "triton"), preference=4)
dispatch.register_selftest(OP, _selftest)
