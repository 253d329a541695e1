"""The CUDA kernel of GAE on a device: against fp64, with every layout that it reads."""

from __future__ import annotations

import math

import pytest
import torch

from rlhf_fast_kernels import gae, rewards_and_gae
from tests.kernels.gae_cases import GAMMA, LAMBDA, draw, gae_by_definition, holes

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("columns", [1, 31, 128, 129, 1024, 1025, 5000])
@pytest.mark.parametrize("density", [0.05, 0.9, 1.0])
def test_gae_equals_its_definition(dtype, columns, density):
    rewards, values = draw(9, columns, dtype=dtype), draw(9, columns, seed=1, dtype=dtype)
    mask, bootstrap = holes(9, columns, density), draw(9, seed=2, dtype=dtype)
    mask[4] = False
    rewards = torch.where(mask, rewards, math.nan)
    truth = gae_by_definition(rewards, values, mask, GAMMA, LAMBDA, bootstrap)
    got = gae(
        *(x.cuda() for x in (rewards, values, mask)),
        gamma=GAMMA,
        gae_lambda=LAMBDA,
        bootstrap=bootstrap.cuda(),
        impl="cuda",
    )
    for x, y in zip(got, truth, strict=True):
        torch.testing.assert_close(x.cpu().double(), y, rtol=1e-5, atol=2e-5)
        assert torch.equal(x.cpu()[~mask], torch.zeros(int((~mask).sum())))


@pytest.mark.parametrize("kl_estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("per_token", [True, False])
def test_strided_and_packed_layouts_equal_the_reference(kl_estimator, per_token):
    lengths = torch.tensor([0, 3, 700, 1, 64])
    old, ref, values = (draw(700, 5, seed=i).cuda().t() for i in range(3))
    scores = (draw(5, 700, seed=4) if per_token else draw(5, seed=4)).cuda()
    inside = (torch.arange(700) < lengths[:, None]).cuda()
    mask = holes(5, 700).cuda() & inside
    options = {"kl_coef": 0.1, "kl_estimator": kl_estimator, "gamma": GAMMA, "gae_lambda": LAMBDA}
    padded = rewards_and_gae(old, ref, values, scores, mask, **options, impl="cuda")
    wanted = rewards_and_gae(old, ref, values, scores, mask, **options, impl="reference")
    packed = rewards_and_gae(
        *(x[inside] for x in (old, ref, values)),
        scores[inside] if per_token else scores,
        mask[inside],
        **options,
        cu_seqlens=torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).cuda(),
        impl="cuda",
    )
    for x, y, z in zip(padded, wanted, packed, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=2e-5)
        torch.testing.assert_close(x[inside], z, rtol=1e-5, atol=2e-5)


def test_it_runs_on_the_current_stream_and_in_a_graph():
    rewards, values = draw(8, 256).cuda(), draw(8, 256, seed=1).cuda()
    mask = torch.ones(8, 256, dtype=torch.bool, device="cuda")
    options = {"gamma": GAMMA, "gae_lambda": LAMBDA, "impl": "cuda"}
    expected = gae(rewards, values, mask, **options)[0].clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        advantages, _ = gae(rewards, values, mask, **options)
    advantages.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(advantages, expected)
