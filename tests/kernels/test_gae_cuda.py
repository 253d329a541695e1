"""The CUDA and Triton kernels of GAE on a device: against fp64, with every layout they read."""

from __future__ import annotations

import math

import pytest
import torch

from rlhf_fast_kernels import gae, rewards_and_gae, triton_support
from tests.kernels.gae_cases import GAMMA, LAMBDA, draw, gae_by_definition, holes
from tests.kernels.test_gae_moments import moments_by_definition

IMPLS = ["cuda", *(["triton"] if triton_support.installed() else [])]

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("columns", [1, 31, 128, 129, 2048, 2052, 5000])
@pytest.mark.parametrize("density", [0.05, 0.9, 1.0])
def test_gae_equals_its_definition(impl, dtype, columns, density):
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
        impl=impl,
    )
    for x, y in zip(got, truth, strict=True):
        torch.testing.assert_close(x.cpu().double(), y, rtol=1e-5, atol=2e-5)
        assert torch.equal(x.cpu()[~mask], torch.zeros(int((~mask).sum())))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kl_estimator", ["k1", "k2", "k3", "exact"])
@pytest.mark.parametrize("per_token", [True, False])
@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("offsets_dtype", [torch.int32, torch.int64])
def test_padded_and_packed_layouts_equal_the_reference(
    impl, kl_estimator, per_token, transposed, offsets_dtype
):
    lengths = torch.tensor([0, 3, 700, 1, 64])
    old, ref, values = (draw(700, 5, seed=i).cuda().t() for i in range(3))
    if not transposed:
        old, ref, values = (x.contiguous() for x in (old, ref, values))
    scores = (draw(5, 700, seed=4) if per_token else draw(5, seed=4)).cuda()
    inside = (torch.arange(700) < lengths[:, None]).cuda()
    mask = holes(5, 700).cuda() & inside
    options = {"kl_coef": 0.1, "kl_estimator": kl_estimator, "gamma": GAMMA, "gae_lambda": LAMBDA}
    exact = kl_estimator == "exact"

    def run(name, old, ref, values, scores, mask, **more):
        source = (old, None, values, scores, mask) if exact else (old, ref, values, scores, mask)
        kl = ref.abs() if exact else None
        return rewards_and_gae(*source, kl=kl, reward_clip=1.0, **options, **more, impl=name)

    padded = run(impl, old, ref, values, scores, mask)
    wanted = run("reference", old, ref, values, scores, mask)
    offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to("cuda", offsets_dtype)
    packed = run(
        impl,
        *(x[inside] for x in (old, ref, values)),
        scores[inside] if per_token else scores,
        mask[inside],
        cu_seqlens=offsets,
    )
    for x, y, z in zip(padded[:4], wanted[:4], packed[:4], strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=2e-5)
        torch.testing.assert_close(x[inside], z, rtol=1e-5, atol=2e-5)
    truth = moments_by_definition(padded.advantages.cpu(), mask.cpu())
    torch.testing.assert_close(padded.moments.cpu(), truth, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(packed.moments, padded.moments, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("impl", IMPLS)
def test_the_same_bits_twice_and_whatever_rows_stand_beside(impl):
    old, ref, values = (draw(300, 3000, seed=i).cuda() for i in range(3))
    mask, scores = holes(300, 3000).cuda(), draw(300, seed=5).cuda()
    options = {"kl_coef": 0.1, "kl_estimator": "k3", "gamma": GAMMA, "gae_lambda": LAMBDA}
    first = rewards_and_gae(old, ref, values, scores, mask, **options, impl=impl)
    again = rewards_and_gae(old, ref, values, scores, mask, **options, impl=impl)
    few = [x[7:9] for x in (old, ref, values, scores, mask)]
    alone = rewards_and_gae(*few, **options, impl=impl)
    for x, y, z in zip(first, again, alone, strict=True):
        assert torch.equal(x, y)
        assert torch.equal(x[7:9], z)


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
