"""Moments and whitening on a device: CUDA C++ and Triton against fp64, and no wait of the host."""

from __future__ import annotations

import math

import pytest
import torch

from rlhf_fast_kernels import masked_moments, rewards_and_gae, triton_support, whiten
from tests.kernels.test_whiten import by_definition, draw

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
IMPLS = ["cuda", *(["triton"] if triton_support.installed() else [])]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(7, 3000), (50_000,), (3, 5), (900, 2048)])
@pytest.mark.parametrize("shift_mean", [True, False])
@pytest.mark.parametrize("unbiased", [True, False])
def test_whiten_equals_its_definition(impl, dtype, shape, shift_mean, unbiased):
    x, mask = draw(*shape, mean=2.0)
    x = x.to(dtype)
    options = {"shift_mean": shift_mean, "unbiased": unbiased}
    wanted = by_definition(x, mask, **options)
    poisoned, on_device = torch.where(mask, x, math.nan).cuda(), mask.cuda()
    layouts = [(poisoned, on_device)]
    if x.dim() == 2:
        layouts.append((poisoned.t().contiguous().t(), on_device))
    for a, b in layouts:
        got = whiten(a, b, **options, impl=impl)
        torch.testing.assert_close(got.cpu().double(), wanted, rtol=1e-6, atol=1e-6)
        assert torch.equal(got, whiten(a, b, **options, impl=impl))
        count, mean, m2 = masked_moments(a, b, impl=impl).tolist()
        chosen = x.double()[mask]
        assert count == len(chosen)
        assert mean == pytest.approx(float(chosen.mean()), abs=1e-11)
        assert m2 == pytest.approx(float((chosen - chosen.mean()).square().sum()), rel=1e-10)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0,)])
def test_empty_tensors_are_legal(impl, shape):
    x, mask = torch.zeros(shape).cuda(), torch.zeros(shape, dtype=torch.bool).cuda()
    assert whiten(x, mask, impl=impl).shape == shape
    assert masked_moments(x, mask, impl=impl).tolist() == [0, 0, 0]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("rows", [5, 700])
def test_two_launches_make_whitened_advantages_and_the_host_never_waits(impl, rows):
    old, ref, values = (draw(rows, 300, seed=i)[0].cuda() for i in range(3))
    mask, scores = draw(rows, 300)[1].cuda(), draw(rows, seed=5)[0].cuda()

    def step():
        out = rewards_and_gae(
            *(old, ref, values, scores, mask), kl_coef=0.1, gamma=1.0, gae_lambda=0.95, impl=impl
        )
        return out.advantages, whiten(out.advantages, mask, stats=out.moments, impl=impl)

    step()  # compiles, if that is still to do
    torch.cuda.set_sync_debug_mode("error")
    try:
        advantages, whitened = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    wanted = by_definition(advantages.cpu(), mask.cpu())
    torch.testing.assert_close(whitened.cpu().double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("impl", IMPLS)
def test_it_runs_in_a_graph(impl):
    x, mask = (t.cuda() for t in draw(8, 256))
    expected = whiten(x, mask, impl=impl).clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        whitened = whiten(x, mask, impl=impl)
    whitened.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(whitened, expected)
