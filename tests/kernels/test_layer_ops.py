"""SwiGLU, rotation and the trained RMSNorm: values and gradients against fp64, bits, errors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_fast_kernels import native
from rlhf_fast_kernels.layer_ops import rotary, swiglu, trained_rms_norm
from rlhf_fast_kernels.reference import layer_ops as reference

needs_core = pytest.mark.skipif(
    native.missing("swiglu", "rotary", "rms_norm_backward") is not None, reason="no compiled module"
)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# name: (op, plain form, inputs with a gradient, inputs without)
CASES: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], list[Tensor], list[Any]]] = {
    "swiglu": (swiglu, reference.swiglu, [normal(9, 700), normal(9, 700, seed=1)], []),
    "swiglu short": (swiglu, reference.swiglu, [normal(3), normal(3, seed=1)], []),
    "rotary": (rotary, reference.rotary, [normal(70, 5, 24)], [normal(70, 24), normal(70, 24)]),
    "rotary wide": (rotary, reference.rotary, [normal(7, 2, 128)], [normal(7, 128)] * 2),
    "rotary view": (
        *(rotary, reference.rotary, [normal(5, 70, 24).transpose(0, 1)]),
        [normal(70, 24), normal(70, 24)],
    ),
    "norm": (trained_rms_norm, reference.trained_rms_norm, [normal(300, 96), normal(96)], [1e-6]),
    "norm of heads": (
        *(trained_rms_norm, reference.trained_rms_norm),
        *([normal(40, 6, 21), normal(21)], [1e-5]),
    ),
}


def run(function: Callable[..., Tensor], inputs: list[Tensor], others: list[Any]) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = function(*leaves, *others)
    above = normal(*out.shape, seed=7).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, above)]


def double(values: list[Any]) -> list[Any]:
    return [x.double() if isinstance(x, Tensor) else x for x in values]


@needs_core
@pytest.mark.parametrize("name", CASES)
def test_no_further_from_fp64_than_eager(name: str) -> None:
    op, plain, inputs, others = CASES[name]
    got, peer = run(op, inputs, others), run(plain, inputs, others)
    exact = run(plain, double(inputs), double(others))
    for x, y, z in zip(got, peer, exact, strict=True):
        assert x.shape == z.shape
        error, allowed = (float((w.double() - z).abs().max()) for w in (x, y))
        assert error <= allowed + 4 * torch.finfo(torch.float32).eps * float(z.abs().max())


@needs_core
@pytest.mark.parametrize("name", ["swiglu", "rotary", "norm"])
def test_the_same_bits_for_any_threads(name: str) -> None:
    op, _, inputs, others = CASES[name]
    inputs = [torch.cat([x] * 40) if x.dim() > 1 else x for x in inputs]
    others = [torch.cat([x] * 40) if isinstance(x, Tensor) else x for x in others]
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = run(op, inputs, others)
        torch.set_num_threads(3)
        three = run(op, inputs, others)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(x, y) for x, y in zip(one, three, strict=True))


@needs_core
def test_extremes_of_swiglu() -> None:
    gate = torch.tensor([-torch.inf, -1e4, -100.0, -0.0, 100.0, 1e4, torch.nan])
    up = torch.full_like(gate, 2.0)
    got, want = run(swiglu, [gate, up], []), run(reference.swiglu, [gate, up], [])
    for x, y in zip(got, want, strict=True):
        # Far out ours decays no further than e^-85; PyTorch's has NaN where inf meets 0.
        torch.testing.assert_close(x[1:], y[1:], rtol=1e-5, atol=1e-30, equal_nan=True)


@needs_core
@pytest.mark.parametrize("name", ["swiglu", "rotary", "norm"])
def test_a_second_derivative_is_refused(name: str) -> None:
    op, _, inputs, others = CASES[name]
    leaves = [x.detach().requires_grad_() for x in inputs]
    with pytest.raises(RuntimeError, match="gradients of its gradients"):
        torch.autograd.grad(op(*leaves, *others).sum(), leaves, create_graph=True)


@pytest.mark.parametrize("name", ["swiglu", "rotary", "norm"])
def test_under_compile(name: str) -> None:
    op, _, inputs, others = CASES[name]
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    for x, y in zip(run(compiled, inputs, others), run(op, inputs, others), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: swiglu(normal(3, 4), normal(3, 5)), "swiglu: gate .* expected one shape"),
        (lambda: swiglu(normal(3, 4), normal(3, 4).double()), "swiglu: gate .* expected one shape"),
        (lambda: rotary(normal(3, 2, 5), normal(3, 5), normal(3, 5)), "rotary: x is .* D even"),
        (lambda: rotary(normal(3, 2, 4), normal(3, 4), normal(3, 2)), "rotary: sin is"),
        (lambda: trained_rms_norm(normal(3, 4), normal(5), 1e-6), r"expected \[..., H\]"),
    ],
)
def test_bad_arguments(call: Callable[[], Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
