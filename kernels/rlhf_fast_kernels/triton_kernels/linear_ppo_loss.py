"""What `linear_ppo_loss` needs beside the row kernels: gradients times the upstream gradient."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from rlhf_fast_kernels.triton_support import AotCase, launch

BLOCK = 4096


@triton.jit
def scale_unless_one_kernel(x, factor, size, BLOCK: tl.constexpr):
    scale = tl.load(factor).to(tl.float32)
    # The rule in training: then 2 GB of gradient are neither read nor written.
    if scale == 1.0:
        return
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < size
    value = tl.load(x + offsets, mask=inside, other=0.0).to(tl.float32)
    tl.store(x + offsets, (value * scale).to(x.dtype.element_ty), mask=inside)


def scale_unless_one(x: Tensor, factor: Tensor) -> None:
    """x *= factor [], in place; x is contiguous. The factor is read on the device."""
    if x.numel():
        programs = -(-x.numel() // BLOCK)
        launch(
            scale_unless_one_kernel,
            programs,
            x.device,
            x,
            factor,
            x.numel(),
            BLOCK=BLOCK,
            num_warps=8,
        )


AOT_CASES = tuple(
    AotCase(
        scale_unless_one_kernel,
        {"x": f"*{dtype}", "factor": "*fp32", "size": "i64"},
        {"BLOCK": BLOCK},
        num_warps=8,
    )
    for dtype in ("fp32", "bf16")
)
