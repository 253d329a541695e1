"""silu_mul in Triton on a device: fp64, PyTorch's roundings, strides, no wait of the host."""

from __future__ import annotations

import pytest
import torch

from rlhf_fast_kernels import silu_mul
from tests.kernels.test_silu_mul import DTYPES, assert_as_good, draw

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 2), (37, 600), (64, 28672)])
def test_against_fp64_and_eager(dtype, shape):
    gate_up = draw(*shape, dtype=dtype)
    assert_as_good(silu_mul(gate_up.cuda()).cpu(), gate_up)


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_and_in_place(dtype):
    wide = draw(40, 3000, dtype=dtype)
    on_device = wide.cuda()
    gate_up = on_device[:, 8:2808]
    out = silu_mul(gate_up, out=gate_up[:, :1400], impl="triton")
    assert_as_good(out.cpu(), wide[:, 8:2808])
    assert torch.equal(on_device[:, 1408:].cpu(), wide[:, 1408:])


def test_the_host_does_not_wait():
    gate_up = draw(8, 64).cuda()
    silu_mul(gate_up)
    torch.cuda.set_sync_debug_mode("error")
    try:
        silu_mul(gate_up)
    finally:
        torch.cuda.set_sync_debug_mode("default")
