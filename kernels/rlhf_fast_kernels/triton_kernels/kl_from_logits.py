"""Triton kernels of the exact KL of rows of logits; the maths is in `kl_from_logits.py`.

Forward: a row is a list of segments, cut by the vocabulary alone. One program reads one segment of
both sides, once, and holds it in registers, so the segment's own log-sum-exps are known before its
log-ratios are formed: its KL needs no provisional centre. A second kernel merges a row's segments
by the chain rule of the KL, in their order. So one row alone fills as many multiprocessors as it
has segments, and its bits do not depend on how many rows stand beside it.

Backward: one program reads one block of both sides and writes its gradient, perhaps in place.

Differences of logits are formed before anything is multiplied or shifted: between close policies
they are exact.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlhf_fast_kernels.kl_settings import KLRowSettings, KLRowStats
from rlhf_fast_kernels.triton_kernels.logprobs_from_logits import Layout, _row_start, _tanh
from rlhf_fast_kernels.triton_support import AotCase, launch

LARGEST_BLOCK = 4096  # two logits, and what comes of them, for 16 entries a thread
FIELDS = 6  # a segment's maxima, sums, difference of their logarithms, and KL


# ---- parts of kernels ---------------------------------------------------------------------------


@triton.jit
def _inverse_temperature(temperature, row, scale):
    if temperature is None:
        return scale
    else:  # noqa: RET505 (without it the compiler meets two types of result)
        return 1.0 / tl.load(temperature + row).to(tl.float32)


@triton.jit
def _beyond(v):
    """exp(v) - 1 - v for |v| < 0.5: its series, to 3e-8."""
    p = 2.4801587e-5 * v + 1.9841270e-4
    p = p * v + 1.3888889e-3
    p = p * v + 8.3333333e-3
    p = p * v + 4.1666667e-2
    p = p * v + 1.6666667e-1
    p = p * v + 0.5
    return p * v * v


@triton.jit
def _finite_or_zero(x):
    return tl.where(x == -float("inf"), 0.0, x)


@triton.jit
def _divergence(p, q, v):
    """Sum of p (exp(v) - 1 - v) with q = p exp(v), and what that of q - p has gone astray from 0.

    v may be anything where p is 0.
    """
    close = tl.abs(v) < 0.5
    by_p = tl.where(p == 0.0, 0.0, p * v)
    terms = tl.where(close, p * _beyond(tl.where(close, v, 0.0)), q - p - by_p)
    rise = tl.sum(terms + by_p, axis=0)
    return tl.sum(terms, axis=0), tl.where(tl.abs(rise) < 0.001, rise, 0.0)


# ---- kernels ------------------------------------------------------------------------------------


@triton.jit
def segment_divergence(
    logits,
    ref_logits,
    mask,
    temperature,
    partials,
    inner,
    outer_stride,
    inner_stride,
    ref_outer_stride,
    ref_inner_stride,
    columns,
    segments,
    scale,
    softcap,
    ref_softcap,
    CAPPED: tl.constexpr,
    REF_CAPPED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    row = (program // segments).to(tl.int64)
    segment = program % segments
    if mask is not None and tl.load(mask + row) == 0:
        return
    column = segment * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    at = _row_start(row, inner, outer_stride, inner_stride) + column
    ref_at = _row_start(row, inner, ref_outer_stride, ref_inner_stride) + column
    x = tl.load(logits + at, mask=inside, other=-float("inf")).to(tl.float32)
    ref = tl.load(ref_logits + ref_at, mask=inside, other=-float("inf")).to(tl.float32)
    if CAPPED:
        x = tl.where(inside, softcap * _tanh(x / softcap), -float("inf"))
    if REF_CAPPED:
        ref = tl.where(inside, ref_softcap * _tanh(ref / ref_softcap), -float("inf"))
    inverse = _inverse_temperature(temperature, row, scale)
    factor = inverse * 1.4426950408889634
    top = tl.max(x, axis=0)
    ref_top = tl.max(ref, axis=0)
    shift, ref_shift = _finite_or_zero(top), _finite_or_zero(ref_top)
    power = tl.exp2((x - shift) * factor)
    ref_power = tl.exp2((ref - ref_shift) * factor)
    total = tl.sum(power, axis=0)
    ref_total = tl.sum(ref_power, axis=0)
    # log q - log p of the segment's own distributions, whose sums may be empty.
    p = power / tl.where(total == 0.0, 1.0, total)
    q = ref_power / tl.where(ref_total == 0.0, 1.0, ref_total)
    centre = tl.log(tl.where((total == 0.0) | (ref_total == 0.0), 1.0, total / ref_total))
    v = ((ref - x) - (ref_shift - shift)) * inverse + centre
    divergence, rise = _divergence(p, q, v)
    impossible = (ref == -float("inf")) & (x > -float("inf"))
    infinite = tl.max(tl.where(impossible, 1, 0), axis=0) > 0
    sound = (total == total) & (ref_total == ref_total)
    divergence = tl.where(infinite & sound, float("inf"), divergence)
    divergence = tl.where(total == 0.0, 0.0, divergence)
    partials += row * 6 * segments + segment
    tl.store(partials, top)
    tl.store(partials + segments, total)
    tl.store(partials + 2 * segments, ref_top)
    tl.store(partials + 3 * segments, ref_total)
    tl.store(partials + 4 * segments, divergence)
    # q must sum to 1: this takes the rounding of the two sums out of their difference.
    tl.store(partials + 5 * segments, centre - rise)


@triton.jit
def merge_segments(
    mask,
    temperature,
    partials,
    kl,
    lse,
    ref_lse,
    segments,
    scale,
    SHARD: tl.constexpr,
    SEGMENTS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    if mask is not None and tl.load(mask + row) == 0:
        tl.store(kl + row, 0.0)
        tl.store(lse + row, 0.0)
        tl.store(ref_lse + row, 0.0)
        return
    segment = tl.arange(0, SEGMENTS)
    real = segment < segments
    partials += row * 6 * segments + segment
    tops = tl.load(partials, mask=real, other=-float("inf"))
    sums = tl.load(partials + segments, mask=real, other=0.0)
    ref_tops = tl.load(partials + 2 * segments, mask=real, other=-float("inf"))
    ref_sums = tl.load(partials + 3 * segments, mask=real, other=0.0)
    own = tl.load(partials + 4 * segments, mask=real, other=0.0)
    own_centre = tl.load(partials + 5 * segments, mask=real, other=0.0)
    inverse = tl.full((), 1.0, tl.float32) * _inverse_temperature(temperature, row, scale)
    factor = inverse * 1.4426950408889634
    shift, ref_shift = _finite_or_zero(tl.max(tops, 0)), _finite_or_zero(tl.max(ref_tops, 0))
    share = sums * tl.exp2((tops - shift) * factor)
    ref_share = ref_sums * tl.exp2((ref_tops - ref_shift) * factor)
    total, ref_total = tl.sum(share, axis=0), tl.sum(ref_share, axis=0)
    p = share / tl.where(total == 0.0, 1.0, total)
    q = ref_share / tl.where(ref_total == 0.0, 1.0, ref_total)
    centre = tl.log(tl.where((total == 0.0) | (ref_total == 0.0), 1.0, total / ref_total))
    apart = ((ref_tops - tops) - (ref_shift - shift)) * inverse - own_centre
    _, rise = _divergence(p, q, apart + centre)
    centre -= rise
    between, _ = _divergence(p, q, apart + centre)
    result = tl.sum(tl.where(p == 0.0, 0.0, p * own), axis=0) + between
    # p log(p / q) of a segment without any q is infinite, which `own` says already.
    infinite = tl.max(tl.where((own == float("inf")) & (sums > 0.0), 1, 0), axis=0) > 0
    sound = (total == total) & (ref_total == ref_total)
    result = tl.where(infinite & sound, float("inf"), tl.maximum(result, 0.0))
    result = tl.where(sound, result, float("nan"))
    if SHARD:
        result = tl.where(total == 0.0, 0.0, result)
        result = tl.where((total > 0.0) & (ref_total == 0.0), float("inf"), result)
    else:
        result = tl.where((total == 0.0) | (ref_total == 0.0), float("nan"), result)
    tl.store(kl + row, result)
    ln2 = tl.full((), 0.6931471805599453, tl.float64)
    scaled = factor.to(tl.float64) * ln2
    log_total = tl.log2(total).to(tl.float64) * ln2
    log_share = shift.to(tl.float64) * scaled + log_total
    tl.store(lse + row, log_share)
    # From the same centre as the log-ratios: the gradient of a small KL needs the difference.
    exact = (shift - ref_shift).to(tl.float64) * inverse.to(tl.float64) + centre.to(tl.float64)
    separate = ref_shift.to(tl.float64) * scaled + tl.log2(ref_total).to(tl.float64) * ln2
    empty = (total == 0.0) | (ref_total == 0.0)
    tl.store(ref_lse + row, tl.where(empty, separate, log_share - exact))


@triton.jit
def block_gradient(
    logits,
    ref_logits,
    temperature,
    kl,
    lse,
    ref_lse,
    grad_kl,
    out,
    inner,
    outer_stride,
    inner_stride,
    ref_outer_stride,
    ref_inner_stride,
    out_outer_stride,
    out_inner_stride,
    width,
    columns,
    blocks,
    scale,
    softcap,
    ref_softcap,
    CAPPED: tl.constexpr,
    REF_CAPPED: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    row = (program // blocks).to(tl.int64)
    column = program % blocks * BLOCK + tl.arange(0, BLOCK)
    out += _row_start(row, inner, out_outer_stride, out_inner_stride) + column
    g = tl.load(grad_kl + row)
    if g == 0.0:
        if not ACCUMULATE:
            tl.store(out, tl.zeros((BLOCK,), out.dtype.element_ty), mask=column < width)
        return
    inverse = _inverse_temperature(temperature, row, scale)
    factor = inverse * 1.4426950408889634
    # lse in units of the logits, and the centre of the log-ratios, as sums of two fp32 numbers.
    log2e = tl.full((), 1.4426950408889634, tl.float64)
    exact = tl.load(lse + row)
    scaled = exact * log2e / factor.to(tl.float64)
    shift = scaled.to(tl.float32)
    rest = (scaled - shift.to(tl.float64)).to(tl.float32) * factor
    difference = exact - tl.load(ref_lse + row)
    centre = difference.to(tl.float32)
    divergence = tl.load(kl + row)
    subtrahend = (difference - centre.to(tl.float64)).to(tl.float32) + divergence

    inside = column < columns
    at = _row_start(row, inner, outer_stride, inner_stride) + column
    ref_at = _row_start(row, inner, ref_outer_stride, ref_inner_stride) + column
    x = tl.load(logits + at, mask=inside, other=-float("inf")).to(tl.float32)
    ref = tl.load(ref_logits + ref_at, mask=inside, other=-float("inf")).to(tl.float32)
    if CAPPED:
        bounded = _tanh(x / softcap)
        x = softcap * bounded
    if REF_CAPPED:
        ref = ref_softcap * _tanh(ref / ref_softcap)
    p = tl.exp2((x - shift) * factor - rest)
    # Written as inf - inf: a row whose KL is infinite has no gradient.
    grad = p * ((((x - ref) * inverse - centre) - subtrahend) + (divergence - divergence))
    grad *= g * inverse
    if CAPPED:
        grad *= 1.0 - bounded * bounded
    grad = tl.where(inside & (p != 0.0), grad, 0.0)
    if ACCUMULATE:
        grad += tl.load(out, mask=column < width, other=0.0).to(tl.float32)
    tl.store(out, grad.to(out.dtype.element_ty), mask=column < width)


# ---- launches -----------------------------------------------------------------------------------


def block_size(columns: int) -> int:
    """From the vocabulary alone: it decides the order of the sums, and so their bits."""
    return max(256, min(LARGEST_BLOCK, triton.next_power_of_2(columns)))


def _warps(block: int) -> int:
    return 8 if block >= 4096 else 4


def _numbers(settings: KLRowSettings) -> tuple[float, float, float]:
    return 1.0 / settings.scale, settings.softcap or 1.0, settings.ref_softcap or 1.0


def _flags(settings: KLRowSettings) -> dict[str, bool]:
    return {
        "CAPPED": settings.softcap is not None,
        "REF_CAPPED": settings.ref_softcap is not None,
    }


def _strides(layouts: list[Layout]) -> tuple[int, ...]:
    """(rows an outer one, strides...); rows at single strides compile without a division."""
    outer, inner = layouts[0][:2]
    if outer == 1:
        return 1, *(stride for layout in layouts for stride in (layout[3], 0))
    return inner, *(stride for layout in layouts for stride in layout[2:])


def forward(
    logits: Tensor,
    ref_logits: Tensor,
    layouts: list[Layout],
    settings: KLRowSettings,
    mask: Tensor | None,
    stats: KLRowStats,
    shard: bool,
) -> None:
    """Fill `stats`, as `kl_rows.kl_row_stats` describes it."""
    columns, rows = settings.columns(logits.shape[-1]), stats.kl.numel()
    block = block_size(columns)
    segments = triton.cdiv(columns, block)
    partials = torch.empty((rows, FIELDS, segments), dtype=torch.float32, device=logits.device)
    mask = None if mask is None else mask.view(torch.uint8)
    numbers = _numbers(settings)
    if segments > 0:
        launch(
            segment_divergence,
            rows * segments,
            logits.device,
            *(logits, ref_logits, mask, settings.temperature, partials),
            *(*_strides(layouts), columns, segments, *numbers),
            **_flags(settings),
            BLOCK=block,
            num_warps=_warps(block),
        )
    launch(
        merge_segments,
        rows,
        logits.device,
        *(mask, settings.temperature, partials, *stats, segments, numbers[0]),
        SHARD=shard,
        SEGMENTS=triton.next_power_of_2(max(segments, 1)),
        num_warps=1,
    )


def backward(
    logits: Tensor,
    ref_logits: Tensor,
    layouts: list[Layout],
    settings: KLRowSettings,
    stats: KLRowStats,
    grad_kl: Tensor,
    out: Tensor,
    accumulate: bool,
) -> None:
    """Fill `out`, as `kl_rows.kl_row_gradient` describes it."""
    width = logits.shape[-1]
    block = block_size(width)
    blocks = triton.cdiv(width, block)
    launch(
        block_gradient,
        grad_kl.numel() * blocks,
        logits.device,
        *(logits, ref_logits, settings.temperature, *stats, grad_kl, out),
        *(*_strides(layouts), width, settings.columns(width), blocks, *_numbers(settings)),
        **_flags(settings),
        ACCUMULATE=accumulate,
        BLOCK=block,
        num_warps=_warps(block),
    )


# ---- ahead of time ------------------------------------------------------------------------------

_PLACE = {
    "inner": "i32",
    **dict.fromkeys(
        ("outer_stride", "inner_stride", "ref_outer_stride", "ref_inner_stride"), "i64"
    ),
    **dict.fromkeys(("scale", "softcap", "ref_softcap"), "fp32"),
    "columns": "i32",
}
_STATS = {"kl": "*fp32", "lse": "*fp64", "ref_lse": "*fp64"}


def _forward_case(actor: str, reference: str, *, full: bool) -> AotCase:
    signature = {
        **_PLACE,
        "logits": f"*{actor}",
        "ref_logits": f"*{reference}",
        "partials": "*fp32",
        "segments": "i32",
    }
    constants: dict[str, object] = {"CAPPED": full, "REF_CAPPED": full, "BLOCK": LARGEST_BLOCK}
    for name, kind in (("mask", "*u8"), ("temperature", "*fp32")):
        (signature if full else constants)[name] = kind if full else None
    return AotCase(segment_divergence, signature, constants, num_warps=8)


def _merge_case(*, shard: bool) -> AotCase:
    signature = {"mask": "*u8", "segments": "i32", "scale": "fp32", **_STATS}
    signature |= dict.fromkeys(("temperature", "partials"), "*fp32")
    return AotCase(merge_segments, signature, {"SHARD": shard, "SEGMENTS": 64}, num_warps=1)


def _gradient_case(actor: str, reference: str, out: str, *, full: bool) -> AotCase:
    signature = {
        **_PLACE,
        "logits": f"*{actor}",
        "ref_logits": f"*{reference}",
        "grad_kl": "*fp32",
        "out": f"*{out}",
        **_STATS,
        **dict.fromkeys(("out_outer_stride", "out_inner_stride"), "i64"),
        **dict.fromkeys(("width", "blocks"), "i32"),
    }
    flags = dict.fromkeys(("CAPPED", "REF_CAPPED", "ACCUMULATE"), full)
    constants: dict[str, object] = {**flags, "BLOCK": LARGEST_BLOCK}
    (signature if full else constants)["temperature"] = "*fp32" if full else None
    return AotCase(block_gradient, signature, constants, num_warps=8)


AOT_CASES = (
    _forward_case("bf16", "bf16", full=False),
    _forward_case("fp32", "bf16", full=True),
    _forward_case("fp16", "fp16", full=True),
    _merge_case(shard=False),
    _merge_case(shard=True),
    _gradient_case("bf16", "bf16", "bf16", full=False),
    _gradient_case("fp32", "bf16", "fp32", full=True),
    _gradient_case("fp16", "fp16", "bf16", full=False),
)
