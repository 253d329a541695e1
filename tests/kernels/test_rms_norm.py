"""rms_norm: fp64 truth, the rounding of transformers' modules, residuals, strides, errors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from rlhf_fast_kernels import native, rms_norm, triton_support
from rlhf_fast_kernels.rms_norm import prepare, unchecked

EPS = 1e-5
BUILT = native.missing("rms_norm") is None
needs_core = pytest.mark.skipif(not BUILT, reason="no compiled module on this machine")
IMPLS = ["reference", *(["cpu"] if BUILT else [])]
if triton_support.installed() and triton_support.interpreting():
    IMPLS.append("triton")
DTYPES = [torch.float32, torch.bfloat16]


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def truth(x, weight, offset=0.0, eps=EPS):
    wide = x.double()
    rms = (wide.square().mean(-1, keepdim=True) + eps).sqrt()
    return wide / rms * (offset + weight.double())


def module_output(x, weight, offset=0.0, eps=EPS):
    """What transformers computes."""
    kind = GemmaRMSNorm if offset else LlamaRMSNorm
    module = kind(x.shape[-1], eps)
    module.weight = torch.nn.Parameter(weight)
    with torch.no_grad():
        return module(x)


def truncates(impl: str, dtype: torch.dtype) -> bool:
    """Triton's interpreter cuts fp32 to bf16 where a device rounds to nearest."""
    return impl == "triton" and dtype == torch.bfloat16


def assert_as_good(got, x, weight, offset=0.0, impl="cpu"):
    """No further from fp64 than transformers' module is, plus rounding."""
    exact, peer = truth(x, weight, offset), module_output(x, weight, offset)
    unit = torch.finfo(x.dtype).eps * (2 if truncates(impl, x.dtype) else 1)
    assert got.dtype == x.dtype
    allowed = (peer.double() - exact).abs().max() + unit * exact.abs().max()
    assert (got.double() - exact).abs().max() <= allowed
    if (
        x.dtype == torch.bfloat16 and impl != "triton"
    ):  # another order of the sum may flip a rounding here and there
        assert (got != peer).float().mean() < 0.02


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("shape", [(3, 128), (2, 3, 64), (2, 300), (1, 1), (5, 33), (1, 2049)])
def test_against_fp64_and_transformers(impl, dtype, offset, shape):
    x, weight = draw(*shape, dtype=dtype), draw(shape[-1], dtype=dtype, seed=1)
    assert_as_good(rms_norm(x, weight, EPS, offset=offset, impl=impl), x, weight, offset, impl)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [128, 300])
def test_residual_is_added_in_place_and_rounded(impl, dtype, columns):
    x, residual = draw(4, columns, dtype=dtype), 3 * draw(4, columns, dtype=dtype, seed=2)
    weight = draw(columns, dtype=dtype, seed=1)
    total, before = residual + x, x.clone()
    got = rms_norm(x, weight, EPS, residual=residual, impl=impl)
    if truncates(impl, dtype):
        torch.testing.assert_close(residual, total)
        total = residual
    assert torch.equal(residual, total)
    assert torch.equal(x, before)
    assert_as_good(got, total, weight, impl=impl)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_rows_and_heads_of_a_fused_projection(impl, dtype):
    qkv = draw(3, 8 * 16, dtype=dtype).view(3, 8, 16)
    weight = draw(16, dtype=dtype, seed=1)
    heads, rest = qkv[:, :5], qkv[:, 5:].clone()
    x = heads.clone()
    out = rms_norm(heads, weight, EPS, out=heads, impl=impl)  # in place
    assert out is heads
    assert torch.equal(qkv[:, 5:], rest)
    assert_as_good(heads, x, weight, impl=impl)
    wide, kept = draw(4, 40, dtype=dtype), draw(4, 50, dtype=dtype, seed=3)
    total = kept[:, :16] + wide[:, 3:19]
    got = rms_norm(wide[:, 3:19], weight, EPS, residual=kept[:, :16], impl=impl)
    torch.testing.assert_close(kept[:, :16], total)
    assert_as_good(got, kept[:, :16], weight, impl=impl)
    columns = draw(16, 4, dtype=dtype).T
    assert_as_good(rms_norm(columns, weight, EPS, impl=impl), columns, weight, impl=impl)
    expanded = draw(1, 16, dtype=dtype).expand(3, 16)
    assert_as_good(rms_norm(expanded, weight, EPS, impl=impl), expanded, weight, impl=impl)


@pytest.mark.parametrize("impl", IMPLS)
def test_no_rows(impl):
    weight = torch.ones(8)
    assert rms_norm(torch.empty(0, 8), weight, EPS, impl=impl).shape == (0, 8)
    assert rms_norm(torch.empty(0, 2, 8), weight, EPS, impl=impl).shape == (0, 2, 8)


@pytest.mark.parametrize("impl", IMPLS)
def test_zeros_and_a_row_of_nan(impl):
    x = draw(3, 40)
    x[0] = 0.0
    x[1, 7] = float("nan")
    y = rms_norm(x, torch.ones(40), EPS, impl=impl)
    assert torch.equal(y[0], torch.zeros(40))
    assert y[1].isnan().all()
    assert_as_good(y[2:], x[2:], torch.ones(40), impl=impl)


@needs_core
@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_for_any_threads_and_neighbours(dtype):
    x, weight = draw(300, 200, dtype=dtype), draw(200, dtype=dtype, seed=1)
    one = rms_norm(x, weight, EPS, impl="cpu")
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(rms_norm(x, weight, EPS, impl="cpu"), one)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(rms_norm(x[137:138], weight, EPS, impl="cpu")[0], one[137])


@needs_core
def test_unchecked_and_prepared_calls():
    x, weight, residual = draw(4, 64), draw(64, seed=1), draw(4, 64, seed=2)
    other, want_residual = residual.clone(), residual.clone()
    want = rms_norm(x, weight, EPS, residual=want_residual)
    out = torch.empty(4, 64)
    unchecked(x, weight, EPS, residual, 0.0, out)
    assert torch.equal(out, want)
    assert torch.equal(residual, want_residual)
    call = prepare(x, weight, EPS, other, 0.0, out)
    out.zero_()
    call()
    assert torch.equal(out, want)
    x.mul_(2)
    call()
    assert torch.equal(out, rms_norm(x, weight, EPS, residual=want_residual))


@needs_core
@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(0, 9),
    columns=st.integers(1, 140),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_shapes(rows, columns, dtype, seed):
    x, weight = draw(rows, columns, dtype=dtype, seed=seed), draw(columns, dtype=dtype, seed=1)
    got = rms_norm(x, weight, EPS, impl="cpu")
    torch.testing.assert_close(got, rms_norm(x, weight, EPS, impl="reference"))


def test_fp64_runs_in_the_reference():
    x, weight = draw(3, 20, dtype=torch.float64), draw(20, dtype=torch.float64, seed=1)
    torch.testing.assert_close(rms_norm(x, weight, EPS), truth(x, weight))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(8)}, ValueError, "x has shape"),
        ({"x": torch.zeros(2, 8, dtype=torch.int64)}, TypeError, "floating point"),
        ({"weight": torch.zeros(7)}, ValueError, "weight has shape"),
        ({"weight": torch.zeros(16)[::2]}, ValueError, "contiguous"),
        ({"weight": torch.zeros(8).bfloat16()}, TypeError, "weight is torch.bfloat16"),
        ({"residual": torch.zeros(3, 8)}, ValueError, "residual has shape"),
        ({"residual": torch.zeros(1, 8).expand(2, 8)}, ValueError, "residual"),
        ({"residual": torch.zeros(8, 2).T}, ValueError, "adjacent"),
        ({"residual": torch.zeros(2, 8).half()}, TypeError, "residual is torch.float16"),
        ({"out": torch.zeros(2, 7)}, ValueError, "out has shape"),
        ({"out": torch.zeros(2, 8).double()}, TypeError, "out is torch.float64"),
        ({"out": torch.zeros(2, 8, device="meta")}, ValueError, "out is on meta"),
    ],
)
def test_bad_inputs(change, error, message):
    arguments = {"x": torch.zeros(2, 8), "weight": torch.zeros(8), "eps": EPS, **change}
    with pytest.raises(error, match=f"rms_norm.*{message}"):
        rms_norm(**arguments)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_fp32_residual_and_weight_between_bf16_tensors(impl, offset):
    x, residual, weight = draw(4, 96).bfloat16(), draw(4, 96, seed=2), draw(96, seed=1)
    total = residual + x.float()
    out = torch.empty_like(x)
    got = rms_norm(x, weight, EPS, residual=residual, offset=offset, out=out, impl=impl)
    assert got is out
    torch.testing.assert_close(residual, total, atol=0, rtol=2**-23)
    exact = truth(total, weight, offset)
    unit = torch.finfo(torch.bfloat16).eps * (1 if impl == "triton" else 0.5)
    assert ((out.double() - exact).abs() <= unit * exact.abs() + 1e-6).all()
    first = rms_norm(total, weight, EPS, offset=offset, out=torch.empty_like(x), impl=impl)
    torch.testing.assert_close(first, out, atol=0, rtol=2**-7)


def test_types_that_do_not_fit_are_named():
    x, weight = draw(2, 8).bfloat16(), draw(8)
    for residual, out in ((None, x), (x.clone(), x), (draw(2, 8).double(), x)):
        with pytest.raises(TypeError, match="rms_norm"):
            rms_norm(x, weight, EPS, residual=residual, out=out)
    with pytest.raises(TypeError, match="rms_norm"):
        rms_norm(x, weight.bfloat16(), EPS, out=draw(2, 8))
