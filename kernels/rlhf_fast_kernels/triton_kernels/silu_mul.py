"""Triton kernel of `silu_mul`: a part of a row a program."""

import triton
import triton.language as tl

from rlhf_fast_kernels.triton_support import AotCase

BLOCK = 1024
NUM_WARPS = 4


def parts_of(columns: int) -> int:
    """Programs a row."""
    return -(-columns // BLOCK)


@triton.jit
def silu_mul_kernel(gate_up, out, parts, columns, row_stride, out_row_stride, BLOCK: tl.constexpr):
    item = tl.program_id(0).to(tl.int64)
    row = item // parts
    column = (item - row * parts) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    dtype = out.dtype.element_ty
    gate = tl.load(gate_up + row * row_stride + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * row_stride + columns + column, mask=inside, other=0.0)
    active = (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32)
    y = active * up.to(tl.float32)
    tl.store(out + row * out_row_stride + column, y.to(dtype), mask=inside)


AOT_CASES = tuple(
    AotCase(
        silu_mul_kernel,
        {"gate_up": dtype, "out": dtype, "parts": "i32", "columns": "i32"}
        | {"row_stride": "i64", "out_row_stride": "i64"},
        {"BLOCK": BLOCK},
        num_warps=NUM_WARPS,
        multiples_of_16=("gate_up", "out", "columns", "row_stride", "out_row_stride"),
    )
    for dtype in ("*bf16", "*fp32")
)
