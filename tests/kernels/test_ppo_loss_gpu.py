"""ppo_loss on a CUDA device: CUDA C++ and Triton against fp64, and that the host never waits."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from rlhf_fast_kernels import dispatch, ppo_loss
from rlhf_fast_kernels.ppo_arguments import OP
from tests.kernels.ppo_cases import (
    DTYPES,
    FULL,
    LEAVES,
    NAMES,
    assert_same,
    doubles,
    draw,
    run,
    with_exact_kl,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(params=["cuda", "triton"])
def impl(request: pytest.FixtureRequest) -> str:
    """One that this machine has; the absence of CUDA C++ in a build is no failure."""
    try:
        dispatch.choose(OP, request.param, torch.zeros(1, device="cuda"))
    except RuntimeError as problem:
        pytest.skip(str(problem))
    return str(request.param)


@contextmanager
def no_synchronisation() -> Iterator[None]:
    """A call that makes the host wait for the device raises."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def on_device(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: x.cuda() for name, x in tensors.items()}


def to_host(result: Any) -> Any:
    out, grads = result
    moved = out._replace(
        loss=out.loss.detach().cpu(),
        metrics={name: x.cpu() for name, x in out.metrics.items()},
        extrema={name: x.cpu() for name, x in out.extrema.items()},
    )
    return moved, {name: x.cpu() for name, x in grads.items()}


@pytest.mark.parametrize("shape", [(0,), (1,), (1023,), (1025,), (7, 401), (300_001,)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_fp64(shape: tuple[int, ...], dtype: torch.dtype, impl: str) -> None:
    tensors = draw(shape, dtype=dtype)
    want = run(doubles(tensors), impl="reference", **FULL)
    got = to_host(run(on_device(tensors), impl=impl, **FULL))
    assert_same(got, want, 2e-6 if dtype == torch.float32 else 2**-8)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "exact"])
@pytest.mark.parametrize("kl_gradient", ["k2", "own"])
def test_every_kl(estimator: str, kl_gradient: str, impl: str) -> None:
    tensors = with_exact_kl(draw((5000,))) if estimator == "exact" else draw((5000,))
    options = {**FULL, "kl_estimator": estimator, "kl_gradient": kl_gradient}
    want = run(doubles(tensors), impl="reference", **options)
    assert_same(to_host(run(on_device(tensors), impl=impl, **options)), want, 2e-6)


@pytest.mark.parametrize("absent", [NAMES[6:], NAMES[:6], ("weights",), ("old_values",)])
def test_parts_may_be_absent(absent: tuple[str, ...], impl: str) -> None:
    tensors = {name: x for name, x in draw((3000,)).items() if name not in absent}
    options = {**FULL, "value_clip_eps": None if "old_values" in absent else 0.2, "dual_clip": None}
    if "logprobs" in absent:
        options |= {"kl_coef": 0.0, "entropy_coef": 0.0}
    want = run(doubles(tensors), impl="reference", **options)
    assert_same(to_host(run(on_device(tensors), impl=impl, **options)), want, 2e-6)


def test_strided_unaligned_and_mixed_inputs(impl: str) -> None:
    tensors = on_device(draw((64, 65)))
    want = to_host(run(tensors, impl=impl, **FULL))
    strided = {name: x.t().contiguous().t() for name, x in tensors.items()}
    assert_same(to_host(run(strided, impl=impl, **FULL)), want, 1e-6)
    flat = {name: torch.cat([x.flatten()[:1], x.flatten()]) for name, x in tensors.items()}
    shifted = {name: x[1:].view(64, 65) for name, x in flat.items()}
    assert_same(to_host(run(shifted, impl=impl, **FULL)), want, 1e-6)


def test_masked_slots_change_nothing(impl: str) -> None:
    tensors = on_device(draw((40, 133)))
    spoiled = {name: x.clone() for name, x in tensors.items()}
    for name, value in zip(NAMES, [torch.nan, torch.inf, -torch.inf] * 3, strict=True):
        spoiled[name][~tensors["mask"]] = value
    got, want = run(spoiled, impl=impl, **FULL), run(tensors, impl=impl, **FULL)
    assert torch.equal(got[0].loss, want[0].loss)
    assert all(torch.equal(got[0].metrics[name], x) for name, x in want[0].metrics.items())
    assert all(torch.equal(got[1][name], x) for name, x in want[1].items())
    tensors["mask"][:] = False
    out, grads = run(tensors, 0, impl=impl, **FULL)
    assert [float(x) for x in (out.loss, *out.metrics.values())] == [0.0] * 20
    assert [float(x) for x in out.extrema.values()] == [-math.inf] * 2
    assert all(bool((x == 0).all()) for x in grads.values())


def test_the_same_bits_every_time(impl: str) -> None:
    tensors = on_device(draw((200_000,)))
    first = run(tensors, impl=impl, **FULL)
    for _ in range(20):
        again = run(tensors, impl=impl, **FULL)
        assert torch.equal(again[0].loss, first[0].loss)
        assert all(torch.equal(x, first[0].metrics[name]) for name, x in again[0].metrics.items())
        assert all(torch.equal(x, first[1][name]) for name, x in again[1].items())


@pytest.mark.parametrize("count", [5000, torch.tensor(5000), torch.tensor(5000.0)])
def test_the_host_never_waits(count: Any, impl: str) -> None:
    tensors = on_device(draw((7000,)))
    normalizer = count.cuda() if isinstance(count, torch.Tensor) else count
    leaves = {name: tensors[name].clone().requires_grad_() for name in LEAVES}
    with no_synchronisation():
        out = ppo_loss(**{**tensors, **leaves}, normalizer=normalizer, impl=impl, **FULL)
        (out.loss * 3.0).backward(retain_graph=True)
        out.loss.backward()
    want = run(tensors, 5000, impl="reference", **FULL)[1]
    for name, leaf in leaves.items():
        assert leaf.grad is not None
        torch.testing.assert_close(leaf.grad, 4.0 * want[name], rtol=1e-4, atol=1e-8)


def test_forward_and_backward_in_a_graph(impl: str) -> None:
    tensors = on_device(draw((9000,)))
    leaf = tensors["logprobs"].clone().requires_grad_()
    arguments = {**tensors, "logprobs": leaf, "normalizer": tensors["mask"].sum(), "impl": impl}

    def step() -> tuple[torch.Tensor, torch.Tensor]:
        loss = ppo_loss(**arguments, **FULL).loss
        return loss, torch.autograd.grad(loss, leaf)[0]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())  # which makes the normalizer
    with torch.cuda.stream(stream):
        want = [x.clone() for x in step()]  # compiles outside of the capture
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step()
    for x in got:
        x.detach().zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))


def test_torch_compile(impl: str) -> None:
    tensors = on_device(draw((4000,)))

    def loss(logprobs: torch.Tensor) -> torch.Tensor:
        changed = {**tensors, "logprobs": logprobs * 1.0}
        return ppo_loss(**changed, normalizer=tensors["mask"].sum(), impl=impl, **FULL).loss

    results = []
    for function in (loss, torch.compile(loss, fullgraph=True)):
        leaf = tensors["logprobs"].clone().requires_grad_()
        function(leaf).backward()
        assert leaf.grad is not None
        results.append(leaf.grad)
    torch.testing.assert_close(results[0], results[1])
