"""Triton kernels of `masked_moments` and `whiten`.

Chunks of CHUNK elements in row-major order, a program each, two passes in registers (mean, then
squared deviations); the moments of the chunks, or of the sets that were given, are merged by every
program of the second launch in one and the same order. Above MERGE_INLINE sets a launch of one
program merges them first.
"""

import triton
import triton.language as tl

from rlhf_fast_kernels.triton_support import AotCase

CHUNK = 2048
MERGE_BLOCK = 256
MERGE_INLINE = 512
NUM_WARPS = 4


@triton.jit
def _load(
    x, mask, first, elements, columns, x_row, x_column, mask_row, mask_column, BLOCK: tl.constexpr
):
    """(element numbers, whether they count, values with 0 where they do not) of one chunk."""
    at = first + tl.arange(0, BLOCK)
    valid = at < elements
    row = at // columns
    column = at - row * columns
    if mask is not None:
        kept = tl.load(mask + row * mask_row + column * mask_column, mask=valid, other=0)
        valid = valid & (kept != 0)
    value = tl.load(x + row * x_row + column * x_column, mask=valid, other=0.0)
    return at, valid, value.to(tl.float32).to(tl.float64)


@triton.jit
def _merged(stats, sets, BLOCK: tl.constexpr):
    """(count, mean, m2) of the union of disjoint sets."""
    lanes = tl.arange(0, BLOCK)
    counts = tl.zeros([BLOCK], tl.float64)
    sums = tl.zeros([BLOCK], tl.float64)
    for first in range(0, sets, BLOCK):
        inside = first + lanes < sets
        at = stats + 3 * (first + lanes)
        count = tl.load(at, mask=inside, other=0.0)
        counts += count
        sums += count * tl.load(at + 1, mask=inside, other=0.0)
    total = tl.sum(counts, axis=0)
    mean = tl.sum(sums, axis=0) / tl.where(total > 0, total, 1.0)
    squares = tl.zeros([BLOCK], tl.float64)
    for first in range(0, sets, BLOCK):
        inside = first + lanes < sets
        at = stats + 3 * (first + lanes)
        count = tl.load(at, mask=inside, other=0.0)
        difference = tl.load(at + 1, mask=inside, other=0.0) - mean
        squares += tl.load(at + 2, mask=inside, other=0.0) + count * difference * difference
    return total, mean, tl.sum(squares, axis=0)


@triton.jit
def moments_kernel(
    x,
    mask,
    partials,
    elements,
    columns,
    x_row,
    x_column,
    mask_row,
    mask_column,
    BLOCK: tl.constexpr,
):
    chunk = tl.program_id(0).to(tl.int64)
    _, valid, value = _load(
        x, mask, chunk * BLOCK, elements, columns, x_row, x_column, mask_row, mask_column, BLOCK
    )
    count = tl.sum(valid.to(tl.int32), axis=0).to(tl.float64)
    mean = tl.sum(value, axis=0) / tl.where(count > 0, count, 1.0)
    deviation = tl.where(valid, value - mean, 0.0)
    tl.store(partials + 3 * chunk, count)
    tl.store(partials + 3 * chunk + 1, mean)
    tl.store(partials + 3 * chunk + 2, tl.sum(deviation * deviation, axis=0))


@triton.jit
def merge_kernel(stats, out, sets, BLOCK: tl.constexpr):
    count, mean, m2 = _merged(stats, sets, BLOCK)
    tl.store(out, count)
    tl.store(out + 1, mean)
    tl.store(out + 2, m2)


@triton.jit
def whiten_kernel(
    x,
    mask,
    stats,
    out,
    elements,
    columns,
    x_row,
    x_column,
    mask_row,
    mask_column,
    sets,
    eps,
    SHIFT_MEAN: tl.constexpr,
    UNBIASED: tl.constexpr,
    MERGE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    count, mean, m2 = _merged(stats, sets, MERGE)
    spread = count > 1
    divisor = count - 1 if UNBIASED else count
    variance = m2 / tl.where(spread, divisor, 1.0)
    scale = tl.where(spread, 1.0 / tl.sqrt(variance + eps), 1.0)
    first = tl.program_id(0).to(tl.int64) * BLOCK
    at, valid, value = _load(
        x, mask, first, elements, columns, x_row, x_column, mask_row, mask_column, BLOCK
    )
    y = (value - mean) * scale
    if not SHIFT_MEAN:
        y += mean
    tl.store(out + at, tl.where(valid, y, 0.0).to(tl.float32), mask=at < elements)


_LAYOUT = dict.fromkeys(
    ("elements", "columns", "x_row", "x_column", "mask_row", "mask_column"), "i64"
)
_FLAGS = {"SHIFT_MEAN": True, "UNBIASED": False, "MERGE": MERGE_BLOCK, "BLOCK": CHUNK}
AOT_CASES = (
    *(
        AotCase(
            moments_kernel,
            {"x": x, "mask": "*i1", "partials": "*fp64", **_LAYOUT},
            {"BLOCK": CHUNK},
            num_warps=NUM_WARPS,
        )
        for x in ("*fp32", "*bf16")
    ),
    AotCase(
        merge_kernel,
        {"stats": "*fp64", "out": "*fp64", "sets": "i32"},
        {"BLOCK": MERGE_BLOCK},
        num_warps=NUM_WARPS,
    ),
    *(
        AotCase(
            whiten_kernel,
            {"x": x, "mask": "*i1", "stats": "*fp64", "out": "*fp32", **_LAYOUT}
            | {"sets": "i32", "eps": "fp32"},
            _FLAGS,
            num_warps=NUM_WARPS,
        )
        for x in ("*fp32", "*bf16")
    ),
)
