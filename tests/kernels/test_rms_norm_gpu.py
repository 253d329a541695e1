"""rms_norm in Triton on a device: fp64, transformers' roundings, heads, no wait of the host."""

from __future__ import annotations

import pytest
import torch

from rlhf_fast_kernels import rms_norm
from tests.kernels.test_rms_norm import DTYPES, EPS, assert_as_good, draw

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("columns", [1, 128, 300, 4096, 16384])
def test_with_residual(dtype, offset, columns):
    x, residual = draw(37, columns, dtype=dtype), draw(37, columns, dtype=dtype, seed=2)
    weight = draw(columns, dtype=dtype, seed=1)
    total, kept = residual + x, residual.cuda()
    got = rms_norm(x.cuda(), weight.cuda(), EPS, residual=kept, offset=offset)
    assert torch.equal(kept.cpu(), total)
    assert_as_good(got.cpu(), total, weight, offset)


@pytest.mark.parametrize("dtype", DTYPES)
def test_heads_in_place(dtype):
    qkv = draw(50, 8, 128, dtype=dtype)
    weight = draw(128, dtype=dtype, seed=1)
    on_device = qkv.cuda()
    heads = on_device[:, :5]
    rms_norm(heads, weight.cuda(), EPS, out=heads, impl="triton")
    assert torch.equal(on_device[:, 5:].cpu(), qkv[:, 5:])
    assert_as_good(heads.cpu(), qkv[:, :5], weight)


def test_rows_too_wide():
    with pytest.raises(ValueError, match="at most 16384"):
        rms_norm(torch.zeros(1, 20000).cuda(), torch.zeros(20000).cuda(), EPS, impl="triton")


def test_the_host_does_not_wait():
    x, weight = draw(8, 64).cuda(), draw(64, seed=1).cuda()
    rms_norm(x, weight, EPS)
    torch.cuda.set_sync_debug_mode("error")
    try:
        rms_norm(x, weight, EPS)
    finally:
        torch.cuda.set_sync_debug_mode("default")
