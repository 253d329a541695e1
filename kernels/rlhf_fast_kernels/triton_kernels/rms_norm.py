"""Triton kernel of `rms_norm`: a row a program, held in registers."""

import triton
import triton.language as tl

from rlhf_fast_kernels.triton_support import AotCase

WIDEST = 16384  # columns that a program holds without spilling


def settings(columns: int) -> dict[str, int]:
    """Launch settings: 16 elements a thread, fewer in short rows."""
    block = max(32, triton.next_power_of_2(columns))
    return {"BLOCK": block, "num_warps": min(32, max(1, block // 512))}


@triton.jit
def rms_norm_kernel(
    x,
    weight,
    residual,
    out,
    inner,
    columns,
    x_outer,
    x_inner,
    residual_outer,
    residual_inner,
    out_outer,
    out_inner,
    eps,
    offset,
    OFFSET: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    outer = row // inner
    within = row - outer * inner
    column = tl.arange(0, BLOCK)
    inside = column < columns
    dtype = weight.dtype.element_ty  # of the residual too; x and out may be narrower
    w = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    y = tl.load(x + outer * x_outer + within * x_inner + column, mask=inside, other=0.0)
    y = y.to(tl.float32)
    if residual is not None:
        at = residual + outer * residual_outer + within * residual_inner + column
        y += tl.load(at, mask=inside, other=0.0).to(tl.float32)
        narrow = y.to(dtype)
        tl.store(at, narrow, mask=inside)
        y = narrow.to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(y * y, axis=0) / columns + eps)
    if OFFSET:
        y = y * scale * (offset + w)
    else:
        y = (y * scale).to(dtype).to(tl.float32) * w
    out += outer * out_outer + within * out_inner
    tl.store(out + column, y.to(out.dtype.element_ty), mask=inside)


_STRIDES = dict.fromkeys(
    ("x_outer", "x_inner", "residual_outer", "residual_inner", "out_outer", "out_inner"), "i64"
)


def _case(
    dtype: str, columns: int, residual: bool, offset: bool, stream: str | None = None
) -> AotCase:
    chosen, stream = settings(columns), stream or dtype
    signature = {"x": dtype, "weight": stream, "out": dtype, "inner": "i32", "columns": "i32"}
    signature |= {**_STRIDES, "eps": "fp32", "offset": "fp32"}
    constants = {"OFFSET": offset, "BLOCK": chosen["BLOCK"]}
    if residual:
        signature["residual"] = stream
    else:
        constants["residual"] = None
    return AotCase(
        rms_norm_kernel,
        signature,
        constants,
        num_warps=chosen["num_warps"],
        multiples_of_16=("x", "weight", "out", "columns", "x_outer", "out_outer"),
    )


AOT_CASES = (
    _case("*bf16", 128, False, False),
    _case("*bf16", 4096, True, False),
    _case("*fp32", 4096, True, False),
    _case("*bf16", 8192, True, True),
    _case("*bf16", 8192, True, False, "*fp32"),
    _case("*fp32", WIDEST, True, False),
)
