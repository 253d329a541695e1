"""Masked moments and whitening against fp64, their merging over ranks, and every edge."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from rlhf_fast_kernels import masked_moments, merge_moments, native, triton_support, whiten

TRITON = triton_support.installed() and triton_support.interpreting()
IMPLS = [
    "reference",
    *(["cpu"] if native.missing("whiten") is None else []),
    *(["triton"] if TRITON else []),
]


def draw(*shape, seed=0, mean=0.0, density=0.7):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator) + mean
    return x, torch.rand(*shape, generator=generator) < density


def by_definition(x, mask, *, shift_mean=True, unbiased=False, eps=1e-8):
    chosen = x.double()[mask]
    mean = chosen.mean()
    y = (x.double() - mean) / (chosen.var(unbiased=unbiased) + eps).sqrt()
    return torch.where(mask, y if shift_mean else y + mean, 0.0)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shift_mean", [True, False])
@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("shape", [(7, 3000), (50_000,), (3, 5)])
def test_whiten_equals_its_definition(impl, dtype, shift_mean, unbiased, shape):
    x, mask = draw(*shape, mean=2.0)
    x = x.to(dtype)
    options = {"shift_mean": shift_mean, "unbiased": unbiased}
    got = whiten(x, mask, **options, impl=impl)
    assert got.dtype == torch.float32
    torch.testing.assert_close(
        got.double(), by_definition(x, mask, **options), rtol=3e-7, atol=3e-7
    )
    assert torch.equal(got[~mask], torch.zeros_like(got[~mask]))


@pytest.mark.parametrize("impl", IMPLS)
def test_a_mean_far_from_zero_costs_no_digits(impl):
    x, mask = draw(64, 512, mean=1e6)
    got = whiten(x, mask, impl=impl)
    torch.testing.assert_close(got.double(), by_definition(x, mask), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
@given(
    rows=st.integers(0, 4),
    columns=st.integers(0, 40),
    density=st.sampled_from([0.0, 0.1, 0.6, 1.0]),
    seed=st.integers(0, 999),
)
@settings(max_examples=50, deadline=None)
def test_moments_on_drawn_shapes(impl, rows, columns, density, seed):
    x, mask = draw(rows, columns, seed=seed, density=density)
    count, mean, m2 = masked_moments(x, mask, impl=impl).tolist()
    chosen = x.double()[mask]
    assert count == chosen.numel()
    expected = float(chosen.mean()) if chosen.numel() else 0.0
    assert mean == pytest.approx(expected, abs=1e-12)
    assert m2 == pytest.approx(float((chosen - expected).square().sum()), abs=1e-10)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("count", [0, 1])
@pytest.mark.parametrize("shift_mean", [True, False])
@pytest.mark.parametrize("unbiased", [True, False])
def test_without_spread_the_result_is_x_minus_mean(impl, count, shift_mean, unbiased):
    x, mask = torch.full((3, 20), math.nan), torch.zeros(3, 20, dtype=torch.bool)
    if count:
        x[1, 4], mask[1, 4] = 5.0, True
    got = whiten(x, mask, shift_mean=shift_mean, unbiased=unbiased, impl=impl)
    expected = torch.zeros(3, 20)
    expected[1, 4] = 0.0 if shift_mean or not count else 5.0
    assert torch.equal(got, expected)


@pytest.mark.parametrize("impl", IMPLS)
def test_constant_input_whitens_to_zero(impl):
    x = torch.full((4, 30), 3.0)
    assert torch.equal(whiten(x, None, impl=impl), torch.zeros(4, 30))


@pytest.mark.parametrize("impl", IMPLS)
def test_nan_in_masked_slots_and_strides_change_nothing(impl):
    x, mask = draw(9, 700)
    base = whiten(x, mask, impl=impl)
    assert torch.equal(base, whiten(torch.where(mask, x, math.nan), mask, impl=impl))
    strided = torch.stack([x, x], dim=2)[:, :, 1]
    assert torch.equal(base, whiten(strided, mask.t().contiguous().t(), impl=impl))
    assert torch.equal(base.flatten(), whiten(x.flatten(), mask.flatten(), impl=impl))


@pytest.mark.parametrize("impl", IMPLS)
def test_merged_moments_of_ranks_whiten_like_one_rank(impl):
    x, mask = draw(8, 900, mean=-4.0)
    mask[6:] = False
    whole = whiten(x, mask, impl=impl)
    parts = [masked_moments(x[i : i + 2], mask[i : i + 2], impl=impl) for i in (0, 2, 4, 6)]
    stats = merge_moments(torch.stack(parts))
    torch.testing.assert_close(stats, masked_moments(x, mask), rtol=1e-12, atol=1e-9)
    for dtype in (torch.float64, torch.float32):
        shards = [
            whiten(x[i : i + 2], mask[i : i + 2], stats=stats.to(dtype), impl=impl)
            for i in (0, 2, 4, 6)
        ]
        torch.testing.assert_close(torch.cat(shards), whole, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("sets", [1, 3, 600])
def test_moments_of_many_sets_are_merged_where_they_lie(impl, sets):
    x, mask = draw(sets, 7, mean=3.0)
    parts = torch.cat([masked_moments(x[i], mask[i], impl="reference")[None] for i in range(sets)])
    got = whiten(x, mask, stats=parts, unbiased=True, impl=impl)
    torch.testing.assert_close(
        got.double(), by_definition(x, mask, unbiased=True), rtol=1e-6, atol=1e-6
    )
    torch.testing.assert_close(
        merge_moments(parts), masked_moments(x, mask), rtol=1e-12, atol=1e-12
    )


def test_no_sets_merge_to_nothing():
    assert merge_moments(torch.zeros(0, 3)).tolist() == [0, 0, 0]


@pytest.mark.skipif(
    native.missing("whiten") is not None, reason="eager PyTorch promises no such thing"
)
def test_nothing_depends_on_the_number_of_threads():
    x, mask = draw(300, 1000, mean=1.0)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append((masked_moments(x, mask), whiten(x, mask)))
    finally:
        torch.set_num_threads(before)
    for moments, whitened in results[1:]:
        assert torch.equal(moments, results[0][0])
        assert torch.equal(whitened, results[0][1])


def test_mistakes_name_the_argument():
    x, mask = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(TypeError, match=r"mask must be bool, got torch\.int64"):
        whiten(x, mask.long())
    with pytest.raises(ValueError, match=r"mask has shape \(2, 2\)"):
        whiten(x, mask[:, :2])
    with pytest.raises(ValueError, match=r"x has shape \(1, 2, 3\)"):
        whiten(x[None], mask[None])
    with pytest.raises(TypeError, match="x must be floating point"):
        masked_moments(x.long(), mask)
    with pytest.raises(ValueError, match=r"stats has shape \(2,\).*expected \[3\] or \[W, 3\]"):
        whiten(x, mask, stats=torch.zeros(2))
    with pytest.raises(ValueError, match=r"stats has shape \(\)"):
        whiten(x, mask, stats=torch.zeros(()))
    with pytest.raises(ValueError, match=r"moments has shape \(3,\)"):
        merge_moments(torch.zeros(3))


def test_torch_compile_agrees():
    x, mask = draw(4, 100)
    compiled = torch.compile(
        lambda x, mask: whiten(x, mask, unbiased=True), fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(compiled(x, mask), whiten(x, mask, unbiased=True))


def test_opcheck():
    x, mask = draw(4, 10)
    torch.library.opcheck(torch.ops.rlhf_fast.masked_moments.default, (x, mask, None))
    torch.library.opcheck(
        torch.ops.rlhf_fast.whiten.default, (x, mask, True, False, 1e-8, None, None)
    )
    stats = torch.tensor([[3.0, 0.5, 1.0], [4.0, 0.25, 2.0]])
    torch.library.opcheck(
        torch.ops.rlhf_fast.whiten.default, (x, mask, False, True, 1e-8, stats, None)
    )
