"""GAE and the fused reward op against their definitions in fp64."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from rlhf_fast_kernels import gae, rewards_and_gae
from tests.kernels.gae_cases import (
    GAMMA,
    IMPLS,
    LAMBDA,
    assert_as_exact_as_eager,
    draw,
    gae_by_definition,
    holes,
    trailing,
)

MASKS = {"full": lambda s, r: torch.ones(s, r, dtype=torch.bool), "tail": trailing, "holes": holes}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize(
    ("gamma", "gae_lambda"), [(1.0, 1.0), (0.99, 0.95), (1.0, 0.0), (0.0, 0.5)]
)
def test_gae_equals_its_definition(impl, dtype, kind, gamma, gae_lambda):
    rewards, values = draw(4, 300, seed=1, dtype=dtype), draw(4, 300, seed=2, dtype=dtype)
    mask = MASKS[kind](4, 300)
    got = gae(rewards, values, mask, gamma=gamma, gae_lambda=gae_lambda, impl=impl)
    eager = gae(rewards, values, mask, gamma=gamma, gae_lambda=gae_lambda, impl="reference")
    truth = gae_by_definition(rewards, values, mask, gamma, gae_lambda)
    for x, y, z in zip(got, truth, eager, strict=True):
        assert x.dtype == torch.float32
        assert not x.requires_grad
        assert torch.equal(x[~mask], torch.zeros_like(x[~mask]))
        assert_as_exact_as_eager(x, y, z)


@pytest.mark.parametrize("impl", IMPLS)
@given(
    rows=st.integers(0, 5),
    columns=st.integers(0, 70),
    density=st.sampled_from([0.0, 0.3, 0.9, 1.0]),
    gamma=st.floats(0, 1),
    gae_lambda=st.floats(0, 1),
    seed=st.integers(0, 1000),
    with_bootstrap=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_gae_on_drawn_shapes(impl, rows, columns, density, gamma, gae_lambda, seed, with_bootstrap):
    rewards, values = draw(rows, columns, seed=seed), draw(rows, columns, seed=seed + 1)
    mask = holes(rows, columns, density, seed)
    bootstrap = draw(rows, seed=seed + 2) if with_bootstrap else None
    got = gae(
        rewards, values, mask, gamma=gamma, gae_lambda=gae_lambda, bootstrap=bootstrap, impl=impl
    )
    truth = gae_by_definition(rewards, values, mask, gamma, gae_lambda, bootstrap)
    for x, y in zip(got, truth, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("impl", IMPLS)
def test_fp64_inputs_give_the_definition_in_fp64(impl):
    rewards, values = draw(3, 50, seed=1).double(), draw(3, 50, seed=2).double()
    mask = holes(3, 50)
    got = gae(rewards, values, mask, gamma=GAMMA, gae_lambda=LAMBDA)
    for x, y in zip(got, gae_by_definition(rewards, values, mask, GAMMA, LAMBDA), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


# ---- the fused op -------------------------------------------------------------------------------


def rewards_by_definition(
    old, ref, scores, mask, *, kl_coef, kl_estimator, in_reward, clamp=None, clip=math.inf
):
    scores = scores.clamp(-clip, clip)
    d = old.double() - ref.double()
    if clamp is not None:
        d = d.clamp(-clamp, clamp)
    kl = {"k1": d, "k2": d * d / 2, "k3": torch.expm1(-d) + d}[kl_estimator]
    kl = torch.where(mask, kl, 0.0)
    rewards = -kl_coef * kl if in_reward else torch.zeros_like(kl)
    if scores.dim() == 2:
        return rewards + torch.where(mask, scores.double(), 0.0), kl
    for s in range(mask.shape[0]):
        at = mask[s].nonzero().flatten()
        if len(at):
            rewards[s, at[-1]] += float(scores[s])
    return rewards, kl


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kl_estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("in_reward", [True, False])
@pytest.mark.parametrize("per_token", [True, False])
def test_rewards_and_gae_equal_their_definition(impl, dtype, kl_estimator, in_reward, per_token):
    old, ref, values = (draw(4, 150, seed=i, dtype=dtype) for i in range(3))
    scores = draw(4, 150, seed=4, dtype=dtype) if per_token else draw(4, seed=4, dtype=dtype)
    mask, bootstrap = holes(4, 150), draw(4, seed=5, dtype=dtype)
    mask[3] = False
    kinds = {"kl_coef": 0.07, "kl_estimator": kl_estimator}

    def run(name):
        return rewards_and_gae(
            *(old, ref, values, scores, mask),
            **kinds,
            kl_in_reward=in_reward,
            gamma=GAMMA,
            gae_lambda=LAMBDA,
            bootstrap=bootstrap,
            impl=name,
        )

    rewards, kl = rewards_by_definition(old, ref, scores, mask, **kinds, in_reward=in_reward)
    advantages, returns = gae_by_definition(rewards, values, mask, GAMMA, LAMBDA, bootstrap)
    truth = {"rewards": rewards, "kl": kl, "advantages": advantages, "returns": returns}
    got, eager = run(impl), run("reference")
    for name, expected in truth.items():
        x = getattr(got, name)
        assert x.dtype == torch.float32
        assert torch.equal(x[~mask], torch.zeros_like(x[~mask])), name
        assert_as_exact_as_eager(x, expected, getattr(eager, name))


@pytest.mark.parametrize("impl", IMPLS)
def test_k3_keeps_its_digits_where_the_policies_nearly_agree(impl):
    d = torch.logspace(-4, math.log10(60.0), 400)
    d = torch.cat([d, -d]).view(1, -1)
    zero, mask = torch.zeros_like(d), torch.ones_like(d, dtype=torch.bool)
    out = rewards_and_gae(
        *(d, zero, zero, torch.zeros(1), mask),
        kl_coef=1.0,
        kl_estimator="k3",
        gamma=1.0,
        gae_lambda=1.0,
        impl=impl,
    )
    exact = torch.expm1(-d.double()) + d.double()
    # The reference subtracts two nearly equal fp32 numbers below |d| = 0.1; the others do not.
    relative = ((out.kl.double() - exact) / exact).abs()
    assert relative.max() < (1e-2 if impl == "reference" else 1e-5)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kl_estimator", ["k1", "k2", "k3"])
def test_clamp_bounds_the_log_ratio_and_extremes_overflow_to_infinity(impl, kl_estimator):
    old = torch.tensor([[-1e30, 50.0, -50.0, 0.0, -200.0, math.nan]])
    ref, mask = torch.zeros_like(old), torch.tensor([[True] * 5 + [False]])
    zeros = torch.zeros_like(old)

    def kl(clamp):
        return rewards_and_gae(
            *(old, ref, zeros, torch.zeros(1), mask),
            kl_coef=0.1,
            kl_estimator=kl_estimator,
            log_ratio_clamp=clamp,
            gamma=1.0,
            gae_lambda=1.0,
            impl=impl,
        ).kl

    _, exact = rewards_by_definition(
        *(old, ref, torch.zeros(1), mask),
        kl_coef=0.1,
        kl_estimator=kl_estimator,
        in_reward=True,
        clamp=20.0,
    )
    torch.testing.assert_close(kl(20.0).double(), exact, rtol=1e-6, atol=1e-6)
    free = kl(None)
    assert free[0, 5] == 0
    assert free[0, 4] == {"k1": -200.0, "k2": 20000.0, "k3": math.inf}[kl_estimator]


@pytest.mark.parametrize("impl", IMPLS)
def test_no_reference_means_no_kl(impl):
    values, scores, mask = draw(3, 40), draw(3, seed=1), holes(3, 40)
    out = rewards_and_gae(
        values, None, values, scores, mask, kl_coef=0.5, gamma=1.0, gae_lambda=0.9, impl=impl
    )
    assert torch.equal(out.kl, torch.zeros(3, 40))
    torch.testing.assert_close(out.rewards.sum(1), torch.where(mask.any(1), scores, 0.0))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("per_token", [True, False])
def test_the_clip_bounds_the_score_and_not_the_penalty(impl, per_token):
    old, ref, values = (3 * draw(4, 90, seed=i) for i in range(3))
    scores, mask = 5 * (draw(4, 90, seed=4) if per_token else draw(4, seed=4)), holes(4, 90)
    settings = {"kl_coef": 2.0, "kl_estimator": "k2"}
    out = rewards_and_gae(
        *(old, ref, values, scores, mask),
        **settings,
        reward_clip=1.5,
        gamma=GAMMA,
        gae_lambda=LAMBDA,
        impl=impl,
    )
    rewards, _ = rewards_by_definition(old, ref, scores, mask, **settings, in_reward=True, clip=1.5)
    assert rewards.abs().max() > 1.5
    torch.testing.assert_close(out.rewards.double(), rewards, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("in_reward", [True, False])
def test_an_exact_kl_takes_the_place_of_the_estimate(impl, dtype, in_reward):
    kl, values = draw(5, 200, dtype=dtype).abs(), draw(5, 200, seed=1, dtype=dtype)
    scores, mask = draw(5, seed=2, dtype=dtype), holes(5, 200)
    out = rewards_and_gae(
        *(values, None, values, scores, mask),
        kl=torch.where(mask, kl, math.nan).t().contiguous().t(),
        kl_coef=0.3,
        kl_estimator="exact",
        kl_in_reward=in_reward,
        gamma=GAMMA,
        gae_lambda=LAMBDA,
        impl=impl,
    )
    assert torch.equal(out.kl, torch.where(mask, kl.float(), 0.0))
    rewards, _ = rewards_by_definition(
        kl, torch.zeros_like(kl), scores, mask, kl_coef=0.3, kl_estimator="k1", in_reward=in_reward
    )
    torch.testing.assert_close(out.rewards.double(), rewards, rtol=1e-6, atol=1e-6)
    advantages, _ = gae_by_definition(rewards, values, mask, GAMMA, LAMBDA)
    torch.testing.assert_close(out.advantages.double(), advantages, rtol=1e-5, atol=1e-5)
