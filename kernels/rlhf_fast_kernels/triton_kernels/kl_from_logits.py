"""Triton kernels of `kl_from_logits`: one program a row, one sweep over both sides.

The sums are those of csrc/cpu/kl_from_logits.cpp, fp32 a lane: K, whose terms are not negative,
keeps the digits of a small KL, and the plain form serves distributions that peak far apart.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from rlhf_fast_kernels.kl_rows import KLRowSettings, KLRowStats
from rlhf_fast_kernels.triton_support import AotCase, launch

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# In powers of two; fp32 leaves less room than the CPU's fp64 sums.
FAR_APART = tl.constexpr(60.0)
PROBE = tl.constexpr(256)


def block_size(columns: int) -> int:
    """Entries of a side at once: two loads and five lane sums of 8 fp32 a thread at 256 threads."""
    return min(2048, max(64, triton.next_power_of_2(columns)))


@triton.jit
def _scaled(x, scale, softcap, CAPPED: tl.constexpr):
    """y = z log2(e); -inf stays -inf."""
    if CAPPED:
        bounded = softcap * (2.0 * tl.sigmoid(2.0 * (x / softcap)) - 1.0)
        return bounded * scale
    return x * scale


@triton.jit
def _power(t):
    """2^t, exactly 0 below the normal numbers; NaN gives NaN."""
    return tl.where(t < -125.0, 0.0, tl.exp2(t))


@triton.jit
def _small_term(d):
    """exp(-d) - 1 + d for |d| < 0.5: Taylor, error below one fp32 ulp."""
    x = -d
    p = x * (1.0 / 40320.0) + (1.0 / 5040.0)
    p = p * x + (1.0 / 720.0)
    p = p * x + (1.0 / 120.0)
    p = p * x + (1.0 / 24.0)
    p = p * x + (1.0 / 6.0)
    p = p * x + 0.5
    return p * x * x


@triton.jit
def _log1p_plus(excess, mean, terms):
    """log(1 + excess) + mean with excess = terms - mean, without cancellation near 0."""
    x = excess
    series = x * (-1.0 / 6.0) + (1.0 / 5.0)
    series = series * x - (1.0 / 4.0)
    series = series * x + (1.0 / 3.0)
    series = series * x - (1.0 / 2.0)
    near = terms + series * x * x
    return tl.where(tl.abs(x) < 0.02, near, tl.log(1.0 + x) + mean)


@triton.jit
def _read_scale(temperature, row, scale, PER_ROW: tl.constexpr):
    if PER_ROW:
        return LOG2E / tl.load(temperature + row)
    return LOG2E / scale


@triton.jit
def kl_forward_kernel(
    logits,
    ref_logits,
    mask,
    temperature,
    kl,
    lse,
    ref_lse,
    stride,
    ref_stride,
    mask_stride,
    columns,
    temperature_scalar,
    softcap,
    ref_softcap,
    CAPPED: tl.constexpr,
    REF_CAPPED: tl.constexpr,
    PER_ROW: tl.constexpr,
    MASKED: tl.constexpr,
    SHARD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    if MASKED:
        if tl.load(mask + row * mask_stride) == 0:
            tl.store(kl + row, 0.0)
            tl.store(lse + row, 0.0)
            tl.store(ref_lse + row, 0.0)
            return
    scale = _read_scale(temperature, row, temperature_scalar, PER_ROW)
    lanes = tl.arange(0, BLOCK)
    x_row = logits + row * stride
    ref_row = ref_logits + row * ref_stride

    # The centre of z - q: its mean over the first entries where it is a number.
    inside = (lanes < columns) & (lanes < PROBE)
    x = tl.load(x_row + lanes, mask=inside, other=float("-inf")).to(tl.float32)
    ref_x = tl.load(ref_row + lanes, mask=inside, other=float("-inf")).to(tl.float32)
    d = _scaled(x, scale, softcap, CAPPED) - _scaled(ref_x, scale, ref_softcap, REF_CAPPED)
    finite = inside & (d - d == 0.0)
    used = tl.sum(tl.where(finite, 1.0, 0.0), 0)
    centre = tl.sum(tl.where(finite, d, 0.0), 0) / tl.maximum(used, 1.0)

    shift = tl.full((), float("-inf"), tl.float32)
    ref_shift = tl.full((), float("-inf"), tl.float32)
    farthest = tl.full((), 0.0, tl.float32)
    sums = tl.zeros((BLOCK,), tl.float32)
    ref_sums = tl.zeros((BLOCK,), tl.float32)
    weighted = tl.zeros((BLOCK,), tl.float32)
    terms = tl.zeros((BLOCK,), tl.float32)
    for begin in range(0, columns, BLOCK):
        offsets = begin + lanes
        inside = offsets < columns
        x = tl.load(x_row + offsets, mask=inside, other=float("-inf")).to(tl.float32)
        ref_x = tl.load(ref_row + offsets, mask=inside, other=float("-inf")).to(tl.float32)
        # After the softcap, which would make the padding finite.
        y = tl.where(inside, _scaled(x, scale, softcap, CAPPED), float("-inf"))
        ref_y = tl.where(inside, _scaled(ref_x, scale, ref_softcap, REF_CAPPED), float("-inf"))
        highest = tl.maximum(shift, tl.max(y, 0))
        ref_highest = tl.maximum(ref_shift, tl.max(ref_y, 0))
        base = tl.where(highest == float("-inf"), 0.0, highest)
        ref_base = tl.where(ref_highest == float("-inf"), 0.0, ref_highest)
        # A sum that is still empty must not become 0 * NaN.
        down = tl.where(shift == float("-inf"), 0.0, tl.exp2(shift - base))
        ref_down = tl.where(ref_shift == float("-inf"), 0.0, tl.exp2(ref_shift - ref_base))
        shift, ref_shift = highest, ref_highest
        apart = ref_base + centre - base
        # Entries of the reference before the first of p have no scale to be held against.
        unscaled = (highest == float("-inf")) & (ref_highest > float("-inf"))
        farthest = tl.where(unscaled, float("inf"), tl.maximum(farthest, tl.abs(apart)))
        ratio = tl.exp2(tl.minimum(tl.maximum(apart, -FAR_APART), FAR_APART))
        p = _power(y - base)
        ref_p = _power(ref_y - ref_base)
        d = ((y - ref_y) - centre) * LN2
        by_p = tl.where(p == 0.0, 0.0, p * d)
        small = tl.abs(d) < 0.5
        term = tl.where(small, p * _small_term(d), ref_p * ratio - p + by_p)
        sums = sums * down + p
        ref_sums = ref_sums * ref_down + ref_p
        weighted = tl.where(down == 0.0, 0.0, weighted * down) + by_p
        terms = tl.where(down == 0.0, 0.0, terms * down) + term

    total = tl.sum(sums, 0)
    row_lse = (shift + tl.log2(total)) * LN2
    row_ref_lse = (ref_shift + tl.log2(tl.sum(ref_sums, 0))) * LN2
    mean = tl.sum(weighted, 0) / total
    gap = mean + centre * LN2
    if SHARD:
        value = gap
    else:
        all_terms = tl.sum(terms, 0) / total
        excess = all_terms - mean
        near = (farthest < FAR_APART) & (excess > -0.9) & (excess - excess == 0.0)
        value = tl.where(near, _log1p_plus(excess, mean, all_terms), gap - row_lse + row_ref_lse)
        value = tl.where(value < 0.0, 0.0, value)
    tl.store(kl + row, value)
    tl.store(lse + row, row_lse)
    tl.store(ref_lse + row, row_ref_lse)


@triton.jit
def kl_backward_kernel(
    logits,
    ref_logits,
    mask,
    temperature,
    kl,
    lse,
    ref_lse,
    grad_kl,
    out,
    stride,
    ref_stride,
    out_stride,
    mask_stride,
    columns,
    width,
    temperature_scalar,
    softcap,
    ref_softcap,
    CAPPED: tl.constexpr,
    REF_CAPPED: tl.constexpr,
    PER_ROW: tl.constexpr,
    MASKED: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    upstream = tl.load(grad_kl + row).to(tl.float32)
    if MASKED:
        upstream = tl.where(tl.load(mask + row * mask_stride) == 0, 0.0, upstream)
    lanes = tl.arange(0, BLOCK)
    out_row = out + row * out_stride
    if upstream == 0.0:
        if not ACCUMULATE:
            for begin in range(0, width, BLOCK):
                offsets = begin + lanes
                nothing = tl.zeros((BLOCK,), tl.float32).to(out.dtype.element_ty)
                tl.store(out_row + offsets, nothing, mask=offsets < width)
        return
    scale = _read_scale(temperature, row, temperature_scalar, PER_ROW)
    row_lse = tl.load(lse + row).to(tl.float32)
    offset = row_lse - tl.load(ref_lse + row).to(tl.float32) + tl.load(kl + row).to(tl.float32)
    factor = upstream * scale * LN2
    x_row = logits + row * stride
    ref_row = ref_logits + row * ref_stride
    for begin in range(0, width, BLOCK):
        offsets = begin + lanes
        inside = offsets < columns
        x = tl.load(x_row + offsets, mask=inside, other=float("-inf")).to(tl.float32)
        ref_x = tl.load(ref_row + offsets, mask=inside, other=float("-inf")).to(tl.float32)
        y = tl.where(inside, _scaled(x, scale, softcap, CAPPED), float("-inf"))
        ref_y = _scaled(ref_x, scale, ref_softcap, REF_CAPPED)
        p = _power(y - row_lse * LOG2E)
        value = p * ((y - ref_y) * LN2 - offset) * factor
        if CAPPED:
            t = y / (scale * softcap)
            value = value * (1.0 - t * t)
        value = tl.where(p == 0.0, 0.0, value)
        if ACCUMULATE:
            value += tl.load(out_row + offsets, mask=inside, other=0.0).to(tl.float32)
            tl.store(out_row + offsets, value.to(out.dtype.element_ty), mask=inside)
        else:
            tl.store(out_row + offsets, value.to(out.dtype.element_ty), mask=offsets < width)


def _flags(settings: KLRowSettings, mask: Tensor | None) -> dict[str, bool]:
    return {
        "CAPPED": settings.softcap is not None,
        "REF_CAPPED": settings.ref_softcap is not None,
        "PER_ROW": settings.temperature is not None,
        "MASKED": mask is not None,
    }


def forward(
    logits: Tensor,
    ref_logits: Tensor,
    settings: KLRowSettings,
    stats: KLRowStats,
    shard: bool,
    mask: Tensor | None,
) -> None:
    """Fill `stats` of rows [n, V]; see `kl_rows.kl_row_stats`."""
    launch(
        kl_forward_kernel,
        logits.shape[0],
        logits.device,
        *(logits, ref_logits, mask, settings.temperature, *stats),
        *(logits.stride(0), ref_logits.stride(0), 0 if mask is None else mask.stride(0)),
        *(settings.columns(logits.shape[1]), settings.scale),
        *(settings.softcap or 1.0, settings.ref_softcap or 1.0),
        **_flags(settings, mask),
        SHARD=shard,
        BLOCK=block_size(logits.shape[1]),
        num_warps=8,
    )


def backward(
    logits: Tensor,
    ref_logits: Tensor,
    settings: KLRowSettings,
    stats: KLRowStats,
    grad_kl: Tensor,
    out: Tensor,
    accumulate: bool,
    mask: Tensor | None,
) -> None:
    """Write or add the gradient; see `kl_rows.kl_row_gradient`."""
    launch(
        kl_backward_kernel,
        logits.shape[0],
        logits.device,
        *(logits, ref_logits, mask, settings.temperature, *stats, grad_kl, out),
        *(logits.stride(0), ref_logits.stride(0), out.stride(0)),
        *(0 if mask is None else mask.stride(0), settings.columns(logits.shape[1]), out.shape[1]),
        *(settings.scale, settings.softcap or 1.0, settings.ref_softcap or 1.0),
        **_flags(settings, mask),
        ACCUMULATE=accumulate,
        BLOCK=block_size(logits.shape[1]),
        num_warps=8,
    )


def _cases() -> tuple[AotCase, ...]:
    shared = dict.fromkeys(("kl", "lse", "ref_lse"), "*fp64")
    shared |= dict.fromkeys(("stride", "ref_stride", "mask_stride"), "i64")
    shared |= {"columns": "i32"}
    shared |= dict.fromkeys(("temperature_scalar", "softcap", "ref_softcap"), "fp32")
    found = []
    for dtype in ("bf16", "fp32"):
        for capped in (False, True):
            flags = {"CAPPED": capped, "REF_CAPPED": capped, "PER_ROW": False, "MASKED": False}
            absent = {"mask": None, "temperature": None, "BLOCK": 2048}
            signature = {"logits": f"*{dtype}", "ref_logits": f"*{dtype}", **shared}
            found.append(
                AotCase(
                    kl_forward_kernel, signature, {**absent, **flags, "SHARD": False}, num_warps=8
                )
            )
            more = {
                "kl": "*fp32",
                "grad_kl": "*fp32",
                "out": f"*{dtype}",
                "out_stride": "i64",
                "width": "i32",
            }
            found.append(
                AotCase(
                    kl_backward_kernel,
                    {**signature, **more},
                    {**absent, **flags, "ACCUMULATE": True},
                    num_warps=8,
                )
            )
    return tuple(found)


AOT_CASES = _cases()
