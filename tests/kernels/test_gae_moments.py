"""The moments of the advantages that `rewards_and_gae` forms in its own pass."""

from __future__ import annotations

import math

import pytest
import torch

from rlhf_fast_kernels import masked_moments, merge_moments, whiten
from tests.kernels.gae_cases import IMPLS, draw, fused_with_moments, holes, inputs


def moments_by_definition(advantages, mask):
    rows = []
    for x, valid in zip(advantages.double(), mask, strict=True):
        chosen = x[valid]
        mean = chosen.mean() if len(chosen) else torch.zeros((), dtype=torch.float64)
        rows.append(torch.stack([mean * 0 + len(chosen), mean, (chosen - mean).square().sum()]))
    return torch.stack(rows)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("columns", [1, 5, 64, 65, 600])
@pytest.mark.parametrize("density", [0.05, 0.8, 1.0])
@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_moments_equal_their_definition(impl, columns, density, offset):
    """With lambda 0 an offset of the rewards is one of the advantages."""
    old, ref, values = (draw(5, columns, seed=i) for i in range(3))
    mask = holes(5, columns, density)
    mask[2] = False
    scores = draw(5, columns, seed=4) + offset
    out = fused_with_moments(old, ref, values, scores, mask, impl, gae_lambda=0.0)
    wanted = moments_by_definition(out.advantages, mask)
    assert out.moments.dtype == torch.float64
    torch.testing.assert_close(out.moments[:, :2], wanted[:, :2], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(out.moments[:, 2], wanted[:, 2], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("impl", IMPLS)
def test_whitening_by_them_is_whitening(impl):
    *floats, scores, mask = inputs()
    out = fused_with_moments(*floats, scores, mask, impl)
    merged = merge_moments(out.moments)
    torch.testing.assert_close(merged, masked_moments(out.advantages, mask), rtol=1e-12, atol=1e-9)
    for unbiased in (True, False):
        got = whiten(out.advantages, mask, stats=out.moments, unbiased=unbiased, impl=impl)
        wanted = whiten(out.advantages, mask, unbiased=unbiased, impl="reference")
        torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("offsets_dtype", [torch.int32, torch.int64])
def test_packed_moments_are_those_of_the_segments(impl, offsets_dtype):
    *floats, scores, mask = inputs(4, 100)
    lengths = torch.tensor([100, 0, 1, 37])
    inside = torch.arange(100) < lengths[:, None]
    padded = fused_with_moments(*floats, scores, mask & inside, impl)
    packed = fused_with_moments(
        *(x[inside] for x in floats),
        scores,
        mask[inside],
        impl,
        cu_seqlens=torch.tensor([0, 100, 100, 101, 138], dtype=offsets_dtype),
    )
    torch.testing.assert_close(packed.moments, padded.moments, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_row_has_the_same_bits_whatever_rows_stand_beside(impl):
    *floats, scores, mask = inputs()
    whole = fused_with_moments(*floats, scores, mask, impl)
    alone = fused_with_moments(*(x[2:3] for x in floats), scores[2:3], mask[2:3], impl)
    for x, y in zip(whole, alone, strict=True):
        assert torch.equal(x[2:3], y)
    again = fused_with_moments(*floats, scores, mask, impl)
    assert all(torch.equal(x, y) for x, y in zip(whole, again, strict=True))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", [(0, 7), (3, 0), (0, 0), (2, 9)])
def test_rows_without_tokens_have_zeros(impl, shape):
    x, mask = torch.full(shape, math.nan), torch.zeros(shape, dtype=torch.bool)
    out = fused_with_moments(x, x, x, torch.zeros(shape[0]), mask, impl)
    assert torch.equal(out.moments, torch.zeros(shape[0], 3, dtype=torch.float64))
    assert torch.equal(
        whiten(out.advantages, mask, stats=out.moments, impl=impl), torch.zeros(shape)
    )


def test_fp64_inputs_give_fp64_moments():
    *floats, scores, mask = (x if x.dtype == torch.bool else x.double() for x in inputs())
    out = fused_with_moments(*floats, scores, mask, None)
    torch.testing.assert_close(out.moments, moments_by_definition(out.advantages, mask))
