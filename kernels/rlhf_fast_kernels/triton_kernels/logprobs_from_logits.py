"""Triton kernels of rows of logits; the maths is in `rlhf_fast_kernels/logprobs_from_logits.py`.

Forward: a row is a list of segments, cut by the vocabulary alone; one program reads one segment,
once, into (maximum, sum, weighted sum), and a second kernel merges a row's segments in their order
and looks up the label. So one row alone fills as many multiprocessors as it has segments, and its
bits do not depend on how many rows stand beside it. The 12 bytes of a segment are 0.1 % of what it
reads in bf16.

Backward: one program reads one block and writes its gradient, perhaps in the same place.

Exponents are (x - shift) log2(e) / temperature, with the subtraction first: it is exact where it
matters, whereas a product would be rounded at the size of the logits. For the same reason lse is
fp64: in fp32 it has an error of 8e-6 at 200, and with it every probability in backward.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlhf_fast_kernels.logit_settings import RowSettings, RowStats
from rlhf_fast_kernels.triton_support import AotCase, launch

LOG2E = 1.4426950408889634
LN2 = 0.6931471805599453
LARGEST_SEGMENT = 8192
LARGEST_GRADIENT_BLOCK = (
    4096  # 32 to 64 registers: reads and writes of 4 programs or more in flight
)

Layout = tuple[int, int, int, int]


# ---- parts of kernels ---------------------------------------------------------------------------


@triton.jit
def _row_start(row, inner, outer_stride, inner_stride):
    row = row.to(tl.int64)
    return row // inner * outer_stride + row % inner * inner_stride


@triton.jit
def _tanh(u):
    """An odd polynomial for |u| < 0.5 (minimax, 2e-8), where 1 - 2 / (1 + e^2u) would cancel."""
    square = u * u
    p = 0.0171511285 * square - 0.0529941581
    p = p * square + 0.133249059
    p = p * square - 0.33333075
    far = 1.0 - 2.0 / (1.0 + tl.exp2(2.88539008 * u))
    return tl.where(square < 0.25, p * square * u + u, far)


@triton.jit
def _log2e_over_temperature(temperature, slot, scale):
    if temperature is None:
        return scale
    else:  # noqa: RET505 (without it the compiler meets two types of result)
        return 1.4426950408889634 / tl.load(temperature + slot).to(tl.float32)


@triton.jit
def _label_state(label, vocab_start, vocab_size, columns):
    """(column, whether it is one of these, whether the label belongs to the vocabulary)."""
    column = label - vocab_start
    legal = (label >= 0) & (label < vocab_size)
    return column, legal & (column >= 0) & (column < columns), legal


# ---- kernels ------------------------------------------------------------------------------------


@triton.jit
def segment_sums(
    logits,
    labels,
    rows,
    temperature,
    partials,
    row_count,
    inner,
    outer_stride,
    inner_stride,
    columns,
    segments,
    ignore_index,
    scale,
    softcap,
    ENTROPY: tl.constexpr,
    CAPPED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    slot = (program // segments).to(tl.int64)
    segment = program % segments
    if tl.load(labels + slot) == ignore_index:
        return
    row = slot
    if rows is not None:
        row = tl.load(rows + slot)
    column = segment * BLOCK + tl.arange(0, BLOCK)
    inside = column < tl.where((row >= 0) & (row < row_count), columns, 0)
    start = _row_start(row, inner, outer_stride, inner_stride)
    x = tl.load(logits + start + column, mask=inside, other=-float("inf")).to(tl.float32)
    if CAPPED:
        x = tl.where(inside, softcap * _tanh(x / softcap), -float("inf"))
    factor = _log2e_over_temperature(temperature, slot, scale)
    top = tl.max(x, axis=0)
    distance = (x - tl.where(top == -float("inf"), 0.0, top)) * factor
    power = tl.exp2(distance)
    partials += slot * 3 * segments + segment
    tl.store(partials, top)
    tl.store(partials + segments, tl.sum(power, axis=0))
    if ENTROPY:
        # Bounded, because -inf would add -inf * 0; NaN survives in `power`.
        weighted = tl.maximum(distance, -1000.0) * power
        tl.store(partials + 2 * segments, tl.sum(weighted, axis=0))


@triton.jit
def merge_segments(
    logits,
    labels,
    rows,
    temperature,
    partials,
    logprobs,
    entropy,
    lse,
    row_count,
    inner,
    outer_stride,
    inner_stride,
    columns,
    segments,
    vocab_start,
    vocab_size,
    ignore_index,
    scale,
    softcap,
    SHARD: tl.constexpr,
    CAPPED: tl.constexpr,
    SEGMENTS: tl.constexpr,
):
    slot = tl.program_id(0).to(tl.int64)
    label = tl.load(labels + slot)
    if label == ignore_index:
        tl.store(logprobs + slot, 0.0)
        tl.store(lse + slot, 0.0)
        if entropy is not None:
            tl.store(entropy + slot, 0.0)
        return
    segment = tl.arange(0, SEGMENTS)
    real = segment < segments
    partials += slot * 3 * segments + segment
    tops = tl.load(partials, mask=real, other=-float("inf"))
    sums = tl.load(partials + segments, mask=real, other=0.0)
    top = tl.max(tops, axis=0)
    shift = tl.where(top == -float("inf"), 0.0, top)
    factor = _log2e_over_temperature(temperature, slot, scale)
    distance = (tops - shift) * factor
    share = tl.exp2(distance)
    total = tl.sum(sums * share, axis=0)
    log2_total = tl.log2(total)
    log2_lse = shift.to(tl.float64) * factor.to(tl.float64) + log2_total.to(tl.float64)
    tl.store(lse + slot, log2_lse * tl.full((), 0.6931471805599453, tl.float64))
    if entropy is not None:
        weighted = tl.load(partials + 2 * segments, mask=real, other=0.0)
        distance = tl.where(tops == -float("inf"), 0.0, distance)
        weighted = tl.sum((weighted + sums * distance) * share, axis=0)
        tl.store(entropy + slot, (log2_total - weighted / total) * 0.6931471805599453)

    row = slot
    if rows is not None:
        row = tl.load(rows + slot)
    column, here, legal = _label_state(label, vocab_start, vocab_size, columns)
    here = here & (row >= 0) & (row < row_count)
    at = _row_start(row, inner, outer_stride, inner_stride) + column
    x = tl.load(logits + at, mask=here, other=0.0).to(tl.float32)
    if CAPPED:
        x = softcap * _tanh(x / softcap)
    if SHARD:
        result = tl.where(legal, tl.where(here, x * factor, 0.0), float("nan"))
    else:
        result = tl.where(here, (x - shift) * factor - log2_total, float("nan"))
    tl.store(logprobs + slot, result * 0.6931471805599453)


@triton.jit
def block_gradient(
    logits,
    labels,
    slots,
    temperature,
    entropy,
    lse,
    grad_logprobs,
    grad_entropy,
    out,
    inner,
    outer_stride,
    inner_stride,
    out_outer_stride,
    out_inner_stride,
    width,
    columns,
    blocks,
    vocab_start,
    vocab_size,
    ignore_index,
    scale,
    softcap,
    CAPPED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    row = (program // blocks).to(tl.int64)
    column = program % blocks * BLOCK + tl.arange(0, BLOCK)
    slot = row
    if slots is not None:
        slot = tl.load(slots + row)
    used = slot >= 0
    label = tl.load(labels + slot, mask=used, other=ignore_index)
    g = 0.0
    h = 0.0
    if grad_logprobs is not None:
        g = tl.load(grad_logprobs + slot, mask=used, other=0.0)
    if grad_entropy is not None:
        h = tl.load(grad_entropy + slot, mask=used, other=0.0)
    out += _row_start(row, inner, out_outer_stride, out_inner_stride)
    if (label == ignore_index) | ((g == 0.0) & (h == 0.0)):
        zeros = tl.zeros((BLOCK,), out.dtype.element_ty)
        tl.store(out + column, zeros, mask=column < width)
        return
    factor = _log2e_over_temperature(temperature, slot, scale)
    inverse_temperature = factor * 0.6931471805599453
    a = -g
    if grad_entropy is not None:
        a -= h * tl.load(entropy + slot)
    b = -h * 0.6931471805599453
    label_column, here, legal = _label_state(label, vocab_start, vocab_size, columns)
    a = tl.where(legal, a, float("nan"))
    # lse in units of the logits, as a sum of two fp32 numbers.
    log2_lse = tl.load(lse + slot).to(tl.float64) * tl.full((), 1.4426950408889634, tl.float64)
    exact = log2_lse / factor.to(tl.float64)
    shift = exact.to(tl.float32)
    rest = (exact - shift.to(tl.float64)).to(tl.float32) * factor

    inside = column < columns
    start = _row_start(row, inner, outer_stride, inner_stride)
    x = tl.load(logits + start + column, mask=inside, other=-float("inf")).to(tl.float32)
    if CAPPED:
        bounded = _tanh(x / softcap)
        x = softcap * bounded
    log2_p = (x - shift) * factor - rest
    # Bounded, because -inf * 0 is NaN at an entry of probability 0; NaN survives in exp2.
    grad = tl.exp2(log2_p) * (a + b * tl.maximum(log2_p, -1000.0))
    # The label's own entry is rounded once, after g has been added.
    grad += tl.where(column == tl.where(here, label_column, -1), g, 0.0)
    grad *= inverse_temperature
    if CAPPED:
        grad *= 1.0 - bounded * bounded
    grad = tl.where(inside, grad, 0.0)
    tl.store(out + column, grad.to(out.dtype.element_ty), mask=column < width)


# ---- launches -----------------------------------------------------------------------------------


def segment_size(columns: int) -> int:
    """From the vocabulary alone: it decides the order of the sums, and so their bits."""
    return max(256, min(LARGEST_SEGMENT, triton.next_power_of_2(columns)))


def _warps(block: int) -> int:
    return 8 if block >= 4096 else 4


def _by_rows(layout: Layout) -> Layout:
    """Rows at a single stride as outer ones: an inner size of 1 compiles without a division."""
    outer, inner, _, inner_stride = layout
    return (inner, 1, inner_stride, 0) if outer == 1 else layout


def _scale(settings: RowSettings) -> float:
    return LOG2E / settings.scale


def forward(
    logits: Tensor,
    layout: Layout,
    labels: Tensor,
    settings: RowSettings,
    stats: RowStats,
    shard: bool,
    rows: Tensor | None,
) -> None:
    """Fill `stats`, as `logit_rows.row_stats` describes it."""
    outer, inner, *strides = _by_rows(layout)
    columns, count = settings.columns(logits.shape[-1]), labels.numel()
    block = segment_size(columns)
    segments = triton.cdiv(columns, block)
    partials = torch.empty((count, 3, segments), dtype=torch.float32, device=logits.device)
    inputs = (logits, labels, rows, settings.temperature, partials)
    place = (outer * inner, inner, *strides, columns, segments)
    numbers = (settings.ignore_index, _scale(settings), settings.softcap or 1.0)
    capped = settings.softcap is not None
    if segments > 0:
        launch(
            segment_sums,
            count * segments,
            logits.device,
            *inputs,
            *place,
            *numbers,
            ENTROPY=stats.entropy is not None,
            CAPPED=capped,
            BLOCK=block,
            num_warps=_warps(block),
        )
    launch(
        merge_segments,
        count,
        logits.device,
        *inputs,
        stats.logprobs,
        stats.entropy,
        stats.lse,
        *place,
        settings.vocab_start,
        settings.labels_end(logits.shape[-1]),
        *numbers,
        SHARD=shard,
        CAPPED=capped,
        SEGMENTS=triton.next_power_of_2(max(segments, 1)),
        num_warps=1,
    )


def backward(
    logits: Tensor,
    layouts: tuple[Layout, Layout],
    labels: Tensor,
    settings: RowSettings,
    stats: RowStats,
    upstream: tuple[Tensor | None, Tensor | None],
    out: Tensor,
    slots: Tensor | None,
) -> None:
    """Fill `out`, as `logit_rows.row_gradient` describes it."""
    layout, out_layout = (_by_rows(each) for each in layouts)
    width = logits.shape[-1]
    block = min(LARGEST_GRADIENT_BLOCK, segment_size(width))
    blocks = triton.cdiv(width, block)
    launch(
        block_gradient,
        layout[0] * layout[1] * blocks,
        logits.device,
        logits,
        labels,
        slots,
        settings.temperature,
        stats.entropy if upstream[1] is not None else None,
        stats.lse,
        *upstream,
        out,
        *layout[1:],
        *out_layout[2:],
        width,
        settings.columns(width),
        blocks,
        settings.vocab_start,
        settings.labels_end(width),
        settings.ignore_index,
        _scale(settings),
        settings.softcap or 1.0,
        CAPPED=settings.softcap is not None,
        BLOCK=block,
        num_warps=_warps(block),
    )


# ---- ahead of time ------------------------------------------------------------------------------

_TYPES = {
    **dict.fromkeys(("labels", "rows", "slots"), "*i64"),
    **dict.fromkeys(("partials", "temperature", "logprobs", "entropy"), "*fp32"),
    **dict.fromkeys(("grad_logprobs", "grad_entropy"), "*fp32"),
    "lse": "*fp64",
    **dict.fromkeys(("outer_stride", "inner_stride"), "i64"),
    **dict.fromkeys(("out_outer_stride", "out_inner_stride"), "i64"),
    **dict.fromkeys(("scale", "softcap"), "fp32"),
}


def _case(kernel: Any, dtypes: str, warps: int, *absent: str, **flags: Any) -> AotCase:
    """`dtypes`: of the logits and, where there is one, of the gradient; `absent`: tensors."""
    logits, _, out = dtypes.partition(" ")
    types = {**_TYPES, "logits": f"*{logits}", "out": f"*{out}"}
    constants = {**dict.fromkeys(absent), **flags}
    signature = {name: types.get(name, "i32") for name in kernel.arg_names if name not in constants}
    return AotCase(kernel, signature, constants, num_warps=warps)


_PLAIN = ("rows", "temperature")
_SUMS = {"BLOCK": LARGEST_SEGMENT}
_GRADIENT = {"BLOCK": LARGEST_GRADIENT_BLOCK}
AOT_CASES = (
    _case(segment_sums, "bf16", 8, *_PLAIN, ENTROPY=True, CAPPED=False, **_SUMS),
    _case(segment_sums, "fp16", 8, ENTROPY=False, CAPPED=True, **_SUMS),
    _case(segment_sums, "fp32", 8, ENTROPY=True, CAPPED=True, **_SUMS),
    _case(merge_segments, "bf16", 1, *_PLAIN, SHARD=False, CAPPED=False, SEGMENTS=32),
    _case(merge_segments, "fp32", 1, SHARD=True, CAPPED=True, SEGMENTS=32),
    _case(block_gradient, "bf16 bf16", 8, "slots", "temperature", CAPPED=False, **_GRADIENT),
    _case(block_gradient, "fp32 bf16", 8, CAPPED=True, **_GRADIENT),
    _case(block_gradient, "fp16 fp16", 8, "entropy", "grad_entropy", CAPPED=False, **_GRADIENT),
)
