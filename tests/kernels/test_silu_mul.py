"""silu_mul: fp64 truth, PyTorch's rounding, extremes, strides, errors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import silu

from rlhf_fast_kernels import native, silu_mul, triton_support
from rlhf_fast_kernels.silu_mul import prepare, unchecked

BUILT = native.missing("silu_mul") is None
needs_core = pytest.mark.skipif(not BUILT, reason="no compiled module on this machine")
IMPLS = ["reference", *(["cpu"] if BUILT else [])]
if triton_support.installed() and triton_support.interpreting():
    IMPLS.append("triton")
DTYPES = [torch.float32, torch.bfloat16]


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return (4 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


def eager(gate_up):
    gate, up = gate_up.chunk(2, dim=-1)
    return silu(gate) * up


def assert_as_good(got, gate_up, impl="cpu"):
    """Element by element: PyTorch's error against fp64, plus a few roundings of the element."""
    exact, peer = eager(gate_up.double()), eager(gate_up)
    unit = torch.finfo(gate_up.dtype).eps
    assert got.dtype == gate_up.dtype
    truncates = impl == "triton" and gate_up.dtype == torch.bfloat16  # the interpreter; no device
    allowed = (peer.double() - exact).abs() + 3 * unit * exact.abs() + 1e-30
    assert ((got.double() - exact).abs() <= allowed).all()
    if (
        gate_up.dtype == torch.bfloat16 and not truncates
    ):  # another exponential may flip a rounding here and there
        assert (got != peer).float().mean() < 0.02


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 256), (1, 2), (4, 66), (2, 2600), (1, 9000)])
def test_against_fp64_and_eager(impl, dtype, shape):
    gate_up = draw(*shape, dtype=dtype)
    got = silu_mul(gate_up, impl=impl)
    assert got.shape == (shape[0], shape[1] // 2)
    assert_as_good(got, gate_up, impl)


@pytest.mark.parametrize("impl", IMPLS)
def test_over_the_range_of_the_exponential(impl):
    gate = torch.cat([torch.linspace(-84, 100, 20001), torch.linspace(-1e-3, 1e-3, 2001)])
    gate_up = torch.cat([gate, torch.ones_like(gate)]).unsqueeze(0)
    exact = silu(gate.double())
    error = (silu_mul(gate_up, impl=impl)[0].double() - exact).abs() / exact.abs().clamp(min=1e-38)
    assert error.max() < 6e-7


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_extremes(impl, dtype):
    inf, nan = float("inf"), float("nan")
    gate = torch.tensor([-inf, -3e38, -1e4, -90.0, 0.0, 90.0, 1e4, inf, nan], dtype=dtype)
    gate_up = torch.cat([gate, torch.ones_like(gate)]).unsqueeze(0)
    got, want = silu_mul(gate_up, impl=impl)[0], silu(gate)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-30, equal_nan=True)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_strides_and_in_place(impl, dtype):
    wide = draw(4, 90, dtype=dtype)
    assert_as_good(silu_mul(wide[:, 5:75], impl=impl), wide[:, 5:75], impl)
    turned = draw(70, 4, dtype=dtype).T
    assert_as_good(silu_mul(turned, impl=impl), turned, impl)
    gate_up, before = wide[:, :80], wide.clone()
    out = silu_mul(gate_up, out=gate_up[:, :40], impl=impl)
    assert_as_good(out, before[:, :80], impl)
    assert torch.equal(wide[:, 40:], before[:, 40:])
    target = torch.zeros(4, 50, dtype=dtype)
    silu_mul(before[:, :80], out=target[:, 3:43], impl=impl)
    assert torch.equal(target[:, 3:43], out)
    assert not target[:, :3].any()
    assert not target[:, 43:].any()


@pytest.mark.parametrize("impl", IMPLS)
def test_empty(impl):
    assert silu_mul(torch.empty(0, 8), impl=impl).shape == (0, 4)
    assert silu_mul(torch.empty(3, 0), impl=impl).shape == (3, 0)


@needs_core
@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_for_any_threads_and_neighbours(dtype):
    gate_up = draw(60, 1400, dtype=dtype)
    one = silu_mul(gate_up, impl="cpu")
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(silu_mul(gate_up, impl="cpu"), one)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(silu_mul(gate_up[37:38], impl="cpu")[0], one[37])


@needs_core
def test_unchecked_and_prepared_calls():
    gate_up, out = draw(4, 64), torch.empty(4, 32)
    unchecked(gate_up, out)
    assert torch.equal(out, silu_mul(gate_up))
    call = prepare(gate_up, out)
    gate_up.mul_(2)
    call()
    assert torch.equal(out, silu_mul(gate_up))


@needs_core
@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(0, 9),
    columns=st.integers(0, 140),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_shapes(rows, columns, dtype, seed):
    gate_up = draw(rows, 2 * columns, dtype=dtype, seed=seed)
    got = silu_mul(gate_up, impl="cpu")
    torch.testing.assert_close(got, silu_mul(gate_up, impl="reference"))


def test_fp64_runs_in_the_reference():
    gate_up = draw(3, 20, dtype=torch.float64)
    assert torch.equal(silu_mul(gate_up), eager(gate_up))


@pytest.mark.parametrize(
    ("gate_up", "out", "error", "message"),
    [
        (torch.zeros(8), None, ValueError, "gate_up has shape"),
        (torch.zeros(2, 7), None, ValueError, r"expected \[N, 2 I\]"),
        (torch.zeros(2, 8, dtype=torch.int64), None, TypeError, "floating point"),
        (torch.zeros(2, 8), torch.zeros(2, 8), ValueError, "out has shape"),
        (torch.zeros(2, 8), torch.zeros(4, 2).T, ValueError, "adjacent"),
        (torch.zeros(2, 8), torch.zeros(2, 4).half(), TypeError, "out is torch.float16"),
        (torch.zeros(2, 8), torch.zeros(2, 4, device="meta"), ValueError, "on meta"),
    ],
)
def test_bad_inputs(gate_up, out, error, message):
    with pytest.raises(error, match=f"silu_mul.*{message}"):
        silu_mul(gate_up, out=out)
