"""linear_small: fp64 truth in all of its ways, strides, threads, neighbours, errors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_fast_kernels import linear_small, native
from rlhf_fast_kernels.linear_small import prepare, unchecked

BUILT = native.missing("linear_small") is None
needs_core = pytest.mark.skipif(not BUILT, reason="no compiled module on this machine")
IMPLS = ["reference", *(["cpu"] if BUILT else [])]


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def assert_exact(got, x, weight, bias=None, residual=None):
    """Against fp64, within the bound of an fp32 sum of K products (and what is added)."""
    exact = x.double() @ weight.double().T
    size = x.double().abs() @ weight.double().abs().T
    for term in (bias, residual):
        if term is not None:
            exact, size = exact + term.double(), size + term.double().abs()
    unit = torch.finfo(torch.float32).eps
    assert ((got.double() - exact).abs() <= 0.5 * unit * size * (4 + x.shape[1] ** 0.5)).all()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("rows", [1, 2, 3, 7, 8, 16, 17, 32, 33, 81])
@pytest.mark.parametrize(
    ("inner", "columns"), [(96, 288), (1100, 33), (16, 8), (33, 41), (5, 3), (1, 1)]
)
def test_against_fp64(impl, rows, inner, columns):
    x, weight = draw(rows, inner), draw(columns, inner, seed=1)
    bias, residual = draw(columns, seed=2), draw(rows, columns, seed=3)
    assert_exact(linear_small(x, weight, impl=impl), x, weight)
    kept = residual.clone()
    assert_exact(linear_small(x, weight, bias, residual, impl=impl), x, weight, bias, residual)
    assert torch.equal(residual, kept)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("rows", [3, 20, 40])
def test_strides_and_the_residual_in_place(impl, rows):
    wide, fused, target = draw(rows, 90), draw(50, 64, seed=1), draw(rows, 70, seed=2)
    x, weight = wide[:, 7:40], fused[:, :33]
    residual, before = target[:, 4:54], target.clone()
    out = linear_small(x, weight, residual=residual, out=residual, impl=impl)
    assert out is residual
    assert_exact(residual, x, weight, residual=before[:, 4:54])
    assert torch.equal(target[:, :4], before[:, :4])
    assert torch.equal(target[:, 54:], before[:, 54:])
    turned = draw(33, rows).T
    assert_exact(linear_small(turned, weight, impl=impl), turned, weight)
    one = draw(1, 33).expand(rows, 33)
    assert_exact(linear_small(one, weight, impl=impl), one, weight)


@pytest.mark.parametrize("impl", IMPLS)
def test_empty(impl):
    assert linear_small(torch.empty(0, 8), draw(5, 8), impl=impl).shape == (0, 5)
    assert linear_small(draw(3, 8), torch.empty(0, 8), impl=impl).shape == (3, 0)
    for rows in (3, 12):
        assert not linear_small(torch.empty(rows, 0), torch.empty(4, 0), impl=impl).any()


@needs_core
@pytest.mark.parametrize(("rows", "few"), [(4, 1), (31, 9), (90, 33)])
def test_same_bits_for_any_threads_and_neighbours(rows, few):
    x, weight = draw(rows, 600), draw(700, 600, seed=1)
    one = linear_small(x, weight, impl="cpu")
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(linear_small(x, weight, impl="cpu"), one)
    finally:
        torch.set_num_threads(threads)
    # As few as take the same way through the code.
    assert torch.equal(linear_small(x[rows - few :], weight, impl="cpu"), one[rows - few :])
    noisy = x.clone()
    noisy[0] = float("nan")
    got = linear_small(noisy, weight, impl="cpu")
    assert got[0].isnan().all()
    assert torch.equal(got[1:], one[1:])


@needs_core
@pytest.mark.parametrize("value", [float("inf"), float("nan"), 3.4e38, -3.4e38])
def test_the_largest_numbers_inf_and_nan_stay_in_their_lines(value):
    x, weight = draw(70, 600), draw(100, 600, seed=1)
    bias, residual = draw(100, seed=2), draw(70, 100, seed=3)
    weight[:, 40] *= 1e-3  # what is multiplied with the largest numbers
    x[:, 555] *= 1e-3
    x[33, 40] = x[33, 555] = weight[7, 555] = 0.0
    clean = linear_small(x, weight, bias, residual, impl="cpu")
    x[33, 40] = weight[7, 555] = value
    got = linear_small(x, weight, bias, residual, impl="cpu")
    want = linear_small(x, weight, bias, residual, impl="reference")
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-3, equal_nan=True)
    touched = torch.zeros(70, 100, dtype=torch.bool)
    touched[33], touched[:, 7] = True, True
    assert torch.equal(got[~touched], clean[~touched])


@needs_core
@pytest.mark.parametrize("rows", [2, 9, 40])
def test_unchecked_and_prepared_calls(rows):
    x, weight, bias = draw(rows, 64), draw(40, 64, seed=1), draw(40, seed=2)
    residual, out = draw(rows, 40, seed=3), torch.empty(rows, 40)
    want = linear_small(x, weight, bias, residual)
    unchecked(x, weight, bias, residual, out)
    assert torch.equal(out, want)
    call = prepare(x, weight, bias, residual, out)
    out.zero_()
    call()
    assert torch.equal(out, want)


@needs_core
@settings(max_examples=80, deadline=None)
@given(
    rows=st.integers(0, 80),
    inner=st.integers(0, 70),
    columns=st.integers(0, 100),
    seed=st.integers(0, 99),
)
def test_shapes(rows, inner, columns, seed):
    x, weight = draw(rows, inner, seed=seed), draw(columns, inner, seed=seed + 1)
    assert_exact(linear_small(x, weight, impl="cpu"), x, weight)


def test_other_dtypes_run_in_the_reference():
    for dtype in (torch.float64, torch.bfloat16):
        x, weight = draw(3, 8).to(dtype), draw(5, 8, seed=1).to(dtype)
        assert torch.equal(linear_small(x, weight), x @ weight.T)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(8)}, ValueError, "x has shape"),
        ({"x": torch.zeros(2, 8, dtype=torch.int64)}, TypeError, "floating point"),
        ({"weight": torch.zeros(5, 7)}, ValueError, "weight has shape"),
        ({"weight": torch.zeros(8, 5).T}, ValueError, "weight has shape .* adjacent"),
        ({"weight": torch.zeros(5, 8).double()}, TypeError, "weight is torch.float64"),
        ({"bias": torch.zeros(8)}, ValueError, "bias has shape"),
        ({"bias": torch.zeros(10)[::2]}, ValueError, "bias has shape"),
        ({"residual": torch.zeros(2, 8)}, ValueError, "residual has shape"),
        ({"out": torch.zeros(5, 2).T}, ValueError, "out has shape"),
        ({"out": torch.zeros(2, 5, device="meta")}, ValueError, "out is on meta"),
    ],
)
def test_bad_inputs(change, error, message):
    arguments = {"x": torch.zeros(2, 8), "weight": torch.zeros(5, 8), **change}
    with pytest.raises(error, match=f"linear_small.*{message}"):
        linear_small(**arguments)
