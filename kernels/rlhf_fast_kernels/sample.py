"""One token a row from logits [B, V]; the randomness belongs to the sample, not to the batch.

With z = logits / temperature, p = softmax(z) and one Exp(1) variable E_i a token,

    token = argmin_i E_i / p_i        is distributed as p (the first of competing Poisson clocks),

the Gumbel-max trick, argmax_i z_i + G_i with G = -log E, without its second logarithm. Compared is
exp(z_i - max z) / E_i: no digits are lost where E is tiny, and that is where winners are. In
Gumbel's usual form, -log(-log u), fp32 cannot tell u near 1 apart, and the best draws tie.

**The random numbers** are a pure function of (seed, step, token id), Philox4x32-10 (Salmon et al.,
SC 2011), the same in every implementation:

    key      (seed mod 2^32, seed div 2^32)                        seed and step as unsigned 64 bits
    counter  (1024 (id div 4096) + id mod 1024, step mod 2^32, step div 2^32, 0)
    r        word (id div 1024) mod 4 of the result
    E        -log(1 - (r + 1/2) / 2^32)

One call of Philox serves the four ids b, b + 1024, b + 2048, b + 3072 of a group of 4096, so
vectors of consecutive ids meet vectors of words without a shuffle. E is at least 2^-33 and below
23: a token less likely than 2^-38 of the best one never wins. No state, no batch: a row gives the
same token alone, in any batch, after a resume and in every implementation, unless two runners are
as close as the rounding of fp32 (about one draw in a million).

**The filters**, each on what the one before left; the order of transformers' `generate`:

    temperature   0 is greedy: the first of the best tokens, log-prob 0
    top-k         the k best tokens
    top-p         the shortest prefix of the tokens, best first, whose mass reaches top_p
    min-p         tokens with p_i >= min_p max p

Equal logits are ordered by id, the lower first, so `top_k=1` and `top_p=0` are greedy too. What the
filters leave is a prefix of one order, hence "above a value, or equal to it up to an id". The
border is found by bisection on the bits of the logits (fp32 as integers of the same order): exact,
no sort.

**What is returned**, with m the kept mass: `logprobs` = log(p_token / m) is that of the
distribution drawn from; `raw_logprobs` = log p_token and `entropy` = -sum p log p are of
softmax(logits / temperature) over `vocab_size` columns before any filter, at temperature 0 of
softmax(logits).

**Vocabulary shards** merge by the maximum: each rank races over its columns with global token ids
and hands over max z, sum exp(z - max), sum (z - max) exp(z - max), the leader's ratio and id.
Ratios and sums are scaled to the common maximum, and the largest ratio (then the lower id) wins:
with the ids of the whole vocabulary this is the draw of one device. The splits of the Triton kernel
and the segments of the C++ one merge so. Filters need the border of all shards: counts and masses
above trial values add up.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rlhf_fast_kernels import dispatch, native, reference, triton_support
from rlhf_fast_kernels.checked_mode import reads_values
from rlhf_fast_kernels.registry import opaque_op
from rlhf_fast_kernels.sample_arguments import (
    OP,
    Draw,
    SampleOutput,
    Setting,
    collect,
    validate_data,
    validate_out,
)

TRITON_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


# ---- launchers ----------------------------------------------------------------------------------


def _run_reference(call: Draw, out: SampleOutput) -> None:
    results = reference.sample(
        call.logits,
        seeds=call.seeds,
        step=call.step.either,  # type: ignore[arg-type]
        temperature=call.temperature.either,
        top_k=call.top_k.either,  # type: ignore[arg-type]
        top_p=call.top_p.either,
        min_p=call.min_p.either,
        vocab_size=call.vocab,
        with_entropy=out.entropy is not None,
    )
    for buffer, result in zip(out, results, strict=True):
        if buffer is not None and result is not None:
            buffer.copy_(result)


def _rows_of(logits: Tensor) -> Tensor:
    return logits if logits.stride(1) == 1 or logits.shape[1] == 1 else logits.contiguous()


def _run_cpu(call: Draw, out: SampleOutput) -> None:
    logits, rows = _rows_of(call.logits), call.logits.shape[0]
    if call.vocab < logits.shape[1]:
        logits = logits[:, : call.vocab]
    # Held until the call is over: it has their addresses alone.
    settings = (
        call.seeds,
        call.step.per_row(rows, torch.int64),
        call.temperature.per_row(rows, torch.float32),
        call.top_k.per_row(rows, torch.int64),
        call.top_p.per_row(rows, torch.float32),
        call.min_p.per_row(rows, torch.float32),
    )
    prepare(logits, *settings, out)()


def prepare(
    logits: Tensor,
    seeds: Tensor,
    step: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    out: SampleOutput,
) -> Callable[[], None]:
    """`sample` in C++ as a call without arguments, for buffers that stay where they are.

    Logits [B, V] fp32 or bf16 with adjacent columns; the settings [B] contiguous and legal, int64
    or float32 as `sample` takes them. Addresses, shapes and the number of threads are read now; the
    caller keeps the tensors alive. Needs `native.missing("sample") is None`.
    """
    settings = (seeds, step, temperature, top_k, top_p, min_p)
    bound: Callable[[], None] = native.core().sample(
        logits.data_ptr(),
        native.DTYPE_CODES[logits.dtype],
        (logits.shape[0], logits.stride(0), logits.shape[1]),
        tuple(setting.data_ptr() for setting in settings),
        tuple(0 if buffer is None else buffer.data_ptr() for buffer in out),
        native.thread_count(),
    )
    return bound


def _run_triton(call: Draw, out: SampleOutput) -> None:
    kernels = triton_support.kernels(OP)
    logits, rows = _rows_of(call.logits), call.logits.shape[0]
    splits = kernels.splits_of(call.vocab)
    partials = logits.new_empty((rows, splits, kernels.PARTIALS), dtype=torch.float32)
    leaders = logits.new_empty((rows, splits), dtype=torch.int32)
    row = (logits, logits.stride(0), call.vocab, splits)
    step = call.step.tensor
    draw = (call.seeds, step, 0 if step is None else step.stride(0), call.step.value)
    settings = (*call.temperature, *call.top_k, *call.top_p)
    scratch = (partials, leaders)
    results = (out.tokens, out.logprobs, out.raw_logprobs)
    merge = kernels.merge_block(splits)
    triton_support.launch(
        kernels._scan,
        rows * splits,
        logits.device,
        *(*row, *draw, *settings, *scratch),
        LANES=kernels.LANES,
        SPLIT=kernels.SPLIT,
        num_warps=kernels.SCAN_WARPS,
    )
    triton_support.launch(
        kernels._finish,
        rows,
        logits.device,
        *(*row, *settings, *call.min_p, *scratch, *results, out.entropy),
        SPLITS=merge,
        num_warps=1,
    )
    if call.top_k == (None, 0) and call.top_p == (None, 1.0) and call.min_p == (None, 0.0):
        return
    filters = triton_support.kernels(f"{OP}_filters")
    triton_support.launch(
        filters._filter,
        rows,
        logits.device,
        *(*row, *draw, *settings, *call.min_p, *scratch, *results),
        SPLITS=merge,
        LANES=kernels.LANES,
        PIECE=filters.PIECE,
        SWEEP=filters.SWEEP,
        SHIFT=filters.KEY_SHIFTS[TRITON_NAMES[logits.dtype]],
        STEPS=filters.STEPS,
        num_warps=filters.WARPS,
    )


# ---- torch.library, for torch.compile -----------------------------------------------------------


def _empty(logits: Tensor, with_entropy: bool) -> SampleOutput:
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    rows = logits.shape[:1]
    tokens = torch.empty(rows, dtype=torch.int64, device=logits.device)
    logprobs, raw = (torch.empty(rows, dtype=wide, device=logits.device) for _ in range(2))
    return SampleOutput(tokens, logprobs, raw, torch.empty_like(raw) if with_entropy else None)


def _draw(call: Draw, out: SampleOutput, impl: str | None) -> SampleOutput:
    chosen = dispatch.choose(OP, impl, call.logits)
    if reads_values(call.logits):
        validate_data(call)
    if call.logits.shape[0] > 0:
        chosen.function(call, out)
    return out


def _op(
    logits: Tensor,
    vocab: int,
    seeds: Tensor,
    step: Tensor | None,
    step_value: int,
    temperature: Tensor | None,
    temperature_value: float,
    top_k: Tensor | None,
    top_k_value: int,
    top_p: Tensor | None,
    top_p_value: float,
    min_p: Tensor | None,
    min_p_value: float,
    with_entropy: bool,
    impl: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    call = Draw(
        logits,
        vocab,
        seeds,
        Setting(step, step_value),
        Setting(temperature, temperature_value),
        Setting(top_k, top_k_value),
        Setting(top_p, top_p_value),
        Setting(min_p, min_p_value),
    )
    return _as_tensors(_draw(call, _empty(logits, with_entropy), impl))


def _fake(logits: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    with_entropy = arguments[-2]
    return _as_tensors(_empty(logits, with_entropy))


def _as_tensors(out: SampleOutput) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """An op of torch.library returns no None."""
    entropy = out.logprobs.new_empty(0) if out.entropy is None else out.entropy
    return out.tokens, out.logprobs, out.raw_logprobs, entropy


_opaque = opaque_op(OP, _op, _fake)


# ---- the public function ------------------------------------------------------------------------


def sample(
    logits: Tensor,
    *,
    seeds: Tensor,
    step: int | Tensor,
    temperature: float | Tensor = 1.0,
    top_k: int | Tensor = 0,
    top_p: float | Tensor = 1.0,
    min_p: float | Tensor = 0.0,
    vocab_size: int | None = None,
    with_entropy: bool = True,
    out: SampleOutput | None = None,
    impl: str | None = None,
) -> SampleOutput:
    """Draw one token a row from softmax(logits / temperature) after top-k, top-p and min-p.

    Nothing waits for the device and no launch depends on data, so a call can be captured in a CUDA
    graph; with `step` as a tensor every replay draws anew.

    Args:
        logits: `[B, V]`; fp32 and bf16 everywhere, fp16 also on a GPU (fp64, and fp16 on a CPU, run
            in the reference). Rows may be strided, a strided last dim is copied. Single entries at
            -inf are legal and never drawn.
        seeds: `[B]` int64, any values: one a sample, kept for all its steps.
        step: index of the response token, a number or int64 `[]` or `[B]`. The same (seed, step,
            row) gives the same token.
        temperature: number or `[B]`, in [0, inf); 0 is greedy.
        top_k: number or `[B]` int64; 0 is off, more than the vocabulary keeps everything.
        top_p: number or `[B]`, in [0, 1]; 1 is off, 0 keeps the best token.
        min_p: number or `[B]`, in [0, 1]; 0 is off.
        vocab_size: columns from here on (padding of the lm_head) are not read; default V.
        with_entropy: whether to return the entropy.
        out: tensors to write to (contiguous, as returned) instead of new ones.
        impl: implementation by name, see `rlhf_fast_kernels.dispatch`.

    Returns:
        `SampleOutput(tokens, logprobs, raw_logprobs, entropy)`, `[B]` each, in nats, fp32 (fp64 for
        fp64 logits). A row with NaN, with +inf, or with nothing above -inf is unusable: token -1
        and NaN.

    Raises:
        ValueError, TypeError: shape, dtype, device or value of an argument. A setting out of range
            in a tensor is found on the CPU alone; on an accelerator its row becomes unusable.
    """
    call = collect(logits, seeds, step, temperature, top_k, top_p, min_p, vocab_size)
    if out is not None:
        validate_out(out, logits, with_entropy)
    if not torch.compiler.is_compiling() and type(logits) is Tensor:
        buffers = _empty(logits, with_entropy) if out is None else out
        if not with_entropy:
            buffers = buffers._replace(entropy=None)
        return _draw(call, buffers, impl)
    flat: list[Any] = [call.logits, call.vocab, call.seeds]
    for setting in call[3:]:
        flat += setting
    tokens, logprobs, raw, entropy = _opaque(*flat, with_entropy, impl)
    drawn = SampleOutput(tokens, logprobs, raw, entropy if with_entropy else None)
    if out is None:
        return drawn
    for buffer, result in zip(out, drawn, strict=True):
        if buffer is not None and result is not None:
            buffer.copy_(result)
    return out if with_entropy else out._replace(entropy=None)


def _selftest(
    device: torch.device, dtype: torch.dtype, generator: torch.Generator
) -> dispatch.SelftestRun:
    logits = (4 * torch.randn(6, 1027, generator=generator)).to(device, dtype)
    seeds = torch.arange(6).to(device)
    temperature = torch.tensor([0.0, 0.7, 1.0, 1.0, 1.3, 1.0]).to(device)
    top_k = torch.tensor([0, 0, 20, 50, 0, 1]).to(device)
    top_p = torch.tensor([1.0, 1.0, 1.0, 0.9, 0.8, 1.0]).to(device)

    def run(impl: str) -> tuple[Tensor, ...]:
        drawn = sample(
            logits,
            seeds=seeds,
            step=3,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=0.01,
            impl=impl,
        )
        return tuple(x for x in drawn if x is not None)

    return run


dispatch.register(OP, "reference", _run_reference)
dispatch.register(OP, "cpu", _run_cpu, native.on_cpu(OP), dtypes=tuple(native.DTYPE_CODES))
triton_support.register(OP, _run_triton, preference=4)
dispatch.register_selftest(OP, _selftest)
