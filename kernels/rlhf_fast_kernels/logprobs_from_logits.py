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

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, overload

import torch
from torch import Tensor

from rlhf_fast_kernels import dispatch, native, reference, triton_support
from rlhf_fast_kernels.checked_mode import reads_values
from rlhf_fast_kernels.linear_arguments import plain
from rlhf_fast_kernels.logit_arguments import (
    Arguments,
    row_settings,
    validate,
    validate_data,
    validate_inplace,
)
from rlhf_fast_kernels.logit_rows import OP
from rlhf_fast_kernels.logit_settings import RowSettings
from rlhf_fast_kernels.logprobs_autograd import LogprobsFromLogits, Results, compiled_op
from rlhf_fast_kernels.registry import is_plain, refuse_wrappers

FAST_DTYPES = tuple(native.DTYPE_CODES)


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
        TypeError: a dtype that no implementation takes, a DTensor.
        ValueError: shapes differ; on the CPU also a label out of range, a temperature that is not
            positive, a row out of range or named twice, naming row and value. On an accelerator,
            where looking would stall the device, such a row yields NaN. `inplace_backward` on a
            leaf or on overlapping rows.
        RuntimeError: second backward after `inplace_backward`.
    """
    arguments = Arguments(temperature, softcap, rows, vocab_size, group, vocab_start, ignore_index)
    plain(OP, logits=logits, labels=labels)
    validate(logits, labels, arguments)
    settings = row_settings(logits, labels, arguments)
    rows = None if rows is None else rows.to(torch.int64).contiguous()
    chosen = dispatch.choose(OP, impl, logits)
    tensors = (logits, labels, rows, settings.temperature)
    if group is None and (torch.compiler.is_compiling() or not is_plain(tensors)):
        run = _run_reference if chosen.impl == "reference" else partial(_run_compiled, chosen.impl)
        results = run(logits, labels, rows, settings, (with_entropy, False, None))
    else:
        run_eager: Callable[..., Results] = _run_eager
        if torch.compiler.is_compiling():
            # A gather among the sums is no op of torch.library: the graph breaks here. Asked for
            # here, because `disable` loads the compiler: longer than all other imports together.
            run_eager = torch.compiler.disable(_run_eager)
        options = (with_entropy, inplace_backward, group)
        results = run_eager(chosen.function, logits, labels, rows, settings, options)
    logprobs, entropy, lse = results
    if not with_lse:
        return logprobs, entropy
    return logprobs, entropy, lse.to(logprobs.dtype)


# ---- implementations ----------------------------------------------------------------------------

Options = tuple[bool, bool, Any]  # with_entropy, inplace_backward, group


def _run_eager(
    run: Callable[..., Results],
    logits: Tensor,
    labels: Tensor,
    rows: Tensor | None,
    settings: RowSettings,
    options: Options,
) -> Results:
    if reads_values(logits):
        validate_data(labels, settings, rows, logits.shape)
    return run(logits, labels, rows, settings, options)


def _run_compiled(
    impl: str,
    logits: Tensor,
    labels: Tensor,
    rows: Tensor | None,
    settings: RowSettings,
    options: Options,
) -> Results:
    logprobs, entropy, lse = compiled_op(
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
    return logprobs, entropy if options[0] else None, lse.detach()


def _run_fused(
    impl: str,
    logits: Tensor,
    labels: Tensor,
    rows: Tensor | None,
    settings: RowSettings,
    options: Options,
) -> Results:
    with_entropy, inplace_backward, group = options
    refuse_wrappers(OP, logits=logits, labels=labels, rows=rows, temperature=settings.temperature)
    if inplace_backward:
        validate_inplace(logits)
    results: Results = LogprobsFromLogits.apply(
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
        # A step of bf16, by which roundings may differ, lies above the self-test's tolerance.
        steps = 1.0 if dtype == torch.float32 else 1 / 256
        return logprobs.detach(), entropy.detach(), steps * leaf.grad.float()

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
