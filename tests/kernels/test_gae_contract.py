"""What GAE promises besides numbers: what changes nothing, messages, torch.library."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from rlhf_fast_kernels import gae, whiten
from tests.kernels.gae_cases import (
    GAMMA,
    IMPLS,
    LAMBDA,
    draw,
    fused,
    fused_with_moments,
    inputs,
)

# ---- invariances --------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", IMPLS)
def test_nan_in_masked_slots_changes_nothing(impl):
    *floats, scores, mask = inputs()
    poisoned = [torch.where(mask, x, math.nan) for x in floats]
    for x, y in zip(
        fused(*floats, scores, mask, impl), fused(*poisoned, scores, mask, impl), strict=True
    ):
        assert torch.equal(x, y)


@pytest.mark.parametrize("impl", IMPLS)
def test_row_order_and_padding_amount_change_nothing(impl):
    *floats, scores, mask = inputs()
    base = fused(*floats, scores, mask, impl)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    permuted = fused(*(x[order] for x in floats), scores[order], mask[order], impl)
    wider = [torch.nn.functional.pad(x, (0, 45), value=math.nan) for x in floats]
    padded = fused(*wider, scores, torch.nn.functional.pad(mask, (0, 45)), impl)
    for x, y, z in zip(base, permuted, padded, strict=True):
        assert torch.equal(x[order], y)
        torch.testing.assert_close(x, z[:, :130], rtol=1e-6, atol=1e-6)
        assert torch.equal(z[:, 130:], torch.zeros(6, 45))


@pytest.mark.parametrize("impl", IMPLS)
def test_left_padding_changes_nothing(impl):
    *floats, scores, mask = inputs()
    left = [torch.nn.functional.pad(x, (19, 0), value=math.nan) for x in floats]
    for x, y in zip(
        fused(*floats, scores, mask, impl),
        fused(*left, scores, torch.nn.functional.pad(mask, (19, 0)), impl),
        strict=True,
    ):
        torch.testing.assert_close(x, y[:, 19:], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
def test_strided_transposed_and_expanded_inputs_are_read_where_they_lie(impl):
    *floats, scores, mask = inputs()
    base = fused(*floats, scores, mask, impl)
    transposed = [x.t().contiguous().t() for x in floats]
    sliced = [torch.stack([x, x + 1], dim=2)[:, :, 0] for x in floats]
    for variant in (transposed, sliced):
        strided_mask = mask.t().contiguous().t()
        strided_scores = torch.stack([scores, scores], dim=1)[:, 0]
        got = fused(*variant, strided_scores, strided_mask, impl)
        for x, y in zip(base, got, strict=True):
            assert torch.equal(x, y)
    row = [x[:1].expand(4, -1) for x in floats]
    got = fused(*row, scores[:1].expand(4), mask[:1].expand(4, -1), impl)
    for x, y in zip(base, got, strict=True):
        assert torch.equal(x[:1].expand(4, -1), y)
    constant = torch.tensor(0.25).expand(6, 130)
    for x, y in zip(
        fused(constant, floats[1], constant, scores, mask, impl),
        fused(constant.contiguous(), floats[1], constant.contiguous(), scores, mask, impl),
        strict=True,
    ):
        assert torch.equal(x, y)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("offsets_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("per_token", [True, False])
def test_packed_equals_padded(impl, offsets_dtype, per_token):
    lengths = [5, 0, 300, 1, 77]
    *floats, scores, mask = inputs(5, 300)
    inside = torch.arange(300) < torch.tensor(lengths)[:, None]
    mask = mask & inside
    scores = draw(5, 300, seed=3) if per_token else scores[:5]
    bootstrap = draw(5, seed=8)
    padded = fused(*floats, scores, mask, impl, bootstrap=bootstrap)
    offsets = torch.tensor([0, *np.cumsum(lengths)], dtype=offsets_dtype)
    packed = fused(
        *(x[inside] for x in floats),
        scores[inside] if per_token else scores,
        mask[inside],
        impl,
        bootstrap=bootstrap,
        cu_seqlens=offsets,
    )
    for x, y in zip(padded, packed, strict=True):
        torch.testing.assert_close(x[inside], y, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
def test_packed_without_a_mask_counts_every_token(impl):
    rewards, values = draw(40), draw(40, seed=1)
    offsets = torch.tensor([0, 7, 40])
    options = {"gamma": GAMMA, "gae_lambda": LAMBDA, "cu_seqlens": offsets, "impl": impl}
    without = gae(rewards, values, None, **options)
    with_mask = gae(rewards, values, torch.ones(40, dtype=torch.bool), **options)
    for x, y in zip(without, with_mask, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", [(0, 7), (3, 0), (0, 0)])
def test_empty_batches_and_rows_are_legal(impl, shape):
    x, mask = torch.zeros(shape), torch.zeros(shape, dtype=torch.bool)
    for y in fused(x, x, x, torch.zeros(shape[0]), mask, impl):
        assert y.shape == shape
    packed = gae(
        *(torch.zeros(0), torch.zeros(0), None),
        gamma=1.0,
        gae_lambda=1.0,
        cu_seqlens=torch.tensor([0, 0]),
        impl=impl,
    )
    assert packed[0].shape == (0,)


@pytest.mark.parametrize("impl", IMPLS)
def test_all_masked_batch_is_exactly_zero(impl):
    poison = torch.full((4, 50), math.nan)
    mask = torch.zeros(4, 50, dtype=torch.bool)
    for x in fused(poison, poison, poison, torch.full((4,), math.nan), mask, impl):
        assert torch.equal(x, torch.zeros(4, 50))


@pytest.mark.parametrize("impl", IMPLS)
def test_returns_with_gamma_lambda_one_are_rewards_to_go_plus_bootstrap(impl):
    rewards, values, bootstrap = draw(3, 100), draw(3, 100, seed=1), draw(3, seed=2)
    mask = torch.ones(3, 100, dtype=torch.bool)
    _, returns = gae(
        rewards, values, mask, gamma=1.0, gae_lambda=1.0, bootstrap=bootstrap, impl=impl
    )
    to_go = rewards.double().flip(1).cumsum(1).flip(1) + bootstrap.double()[:, None]
    torch.testing.assert_close(returns.double(), to_go, rtol=1e-5, atol=2e-5)


def test_nothing_depends_on_the_number_of_threads():
    *floats, scores, mask = inputs(40, 1700)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(fused_with_moments(*floats, scores, mask, None))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for x, y in zip(results[0], other, strict=True):
            assert torch.equal(x, y)


# ---- the interface ------------------------------------------------------------------------------


def test_gradients_do_not_flow():
    values = draw(3, 20).requires_grad_()
    out = fused(values, values, values, torch.zeros(3), torch.ones(3, 20, dtype=torch.bool), None)
    assert not any(x.requires_grad for x in out)


M = torch.ones(2, 3, dtype=torch.bool)
X = torch.zeros(2, 3)
MISTAKES = {
    "rewards shape": ((X[:, :2], X, M), {}, ValueError, r"rewards has shape \(2, 2\).*\(2, 3\)"),
    "values 1-D": ((X, X[0], M), {}, ValueError, r"values has shape \(3,\).*\[S, R\]"),
    "values 2-D packed": ((X, X, M), {"cu_seqlens": torch.tensor([0, 6])}, ValueError, r"\[N\]"),
    "mask dtype": ((X, X, M.float()), {}, TypeError, "mask must be bool, got torch.float32"),
    "mask shape": ((X, X, M[:1]), {}, ValueError, r"mask has shape \(1, 3\)"),
    "mask missing": ((X, X, None), {}, ValueError, "mask is needed"),
    "integer rewards": ((X.long(), X, M), {}, TypeError, "rewards must be floating point"),
    "bootstrap": ((X, X, M), {"bootstrap": X[0]}, ValueError, r"bootstrap has shape \(3,\)"),
    "offsets dtype": (
        (X[0], X[0], None),
        {"cu_seqlens": torch.tensor([0.0, 3.0])},
        TypeError,
        "cu_seqlens must be int32 or int64",
    ),
    "offsets end": (
        (X[0], X[0], None),
        {"cu_seqlens": torch.tensor([0, 2])},
        ValueError,
        r"rise from 0 to the number of tokens \(3\), got \[0, 2\]",
    ),
    "offsets fall": (
        (X[0], X[0], None),
        {"cu_seqlens": torch.tensor([0, 3, 1, 3])},
        ValueError,
        "must rise",
    ),
    "device": ((X.to("meta"), X, M), {}, ValueError, "rewards is on meta, values are on cpu"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_names_the_argument_and_what_was_expected(name):
    arguments, options, kind, message = MISTAKES[name]
    with pytest.raises(kind, match=message):
        gae(*arguments, gamma=1.0, gae_lambda=1.0, **options)


def test_mistakes_in_the_fused_op_name_the_argument():
    with pytest.raises(ValueError, match="kl_estimator must be one of"):
        fused(X, X, X, X[:, 0], M, None, kl_estimator="k4")
    with pytest.raises(ValueError, match=r"scores has shape \(3,\)"):
        fused(X, X, X, X[0], M, None)
    with pytest.raises(ValueError, match="log_ratio_clamp must be positive"):
        fused(X, X, X, X[:, 0], M, None, log_ratio_clamp=0.0)
    with pytest.raises(ValueError, match="reward_clip must be positive, got -1"):
        fused(X, X, X, X[:, 0], M, None, reward_clip=-1)
    with pytest.raises(ValueError, match=r"ref_logprobs has shape \(2, 2\)"):
        fused(X, X[:, :2], X, X[:, 0], M, None)
    with pytest.raises(ValueError, match=r"gamma must lie in \[0, 1\], got 1.5"):
        fused(X, X, X, X[:, 0], M, None, gamma=1.5)
    with pytest.raises(ValueError, match=r"gae_lambda must lie in \[0, 1\], got nan"):
        gae(X, X, M, gamma=1.0, gae_lambda=math.nan)


def test_an_exact_kl_goes_with_its_name_alone():
    exact = {"kl": X, "kl_estimator": "exact"}
    with pytest.raises(ValueError, match=r"go together; kl is absent, kl_estimator is 'exact'"):
        fused(X, None, X, X[:, 0], M, None, kl_estimator="exact")
    with pytest.raises(ValueError, match=r"go together; kl is given, kl_estimator is 'k3'"):
        fused(X, None, X, X[:, 0], M, None, kl=X)
    with pytest.raises(ValueError, match="not both"):
        fused(X, X, X, X[:, 0], M, None, **exact)
    with pytest.raises(ValueError, match="log_ratio_clamp bounds the log ratio"):
        fused(X, None, X, X[:, 0], M, None, log_ratio_clamp=5.0, **exact)
    with pytest.raises(ValueError, match=r"kl has shape \(3,\)"):
        fused(X, None, X, X[:, 0], M, None, kl=X[0], kl_estimator="exact")


def test_torch_compile_calls_the_registered_op_and_agrees():
    *floats, scores, mask = inputs(3, 64)
    graphs = []

    def backend(module, _example):
        graphs.append(module)
        return module.forward

    def run(old, ref, values, scores, mask):
        return fused_with_moments(old, ref, values, scores, mask, None, reward_clip=0.5)

    compiled = torch.compile(run, fullgraph=True, backend=backend, dynamic=True)
    for columns in (64, 40):
        cut = [x[:, :columns].clone() for x in (*floats, mask)]
        arguments = *cut[:3], scores, cut[3]
        for x, y in zip(compiled(*arguments), run(*arguments), strict=True):
            assert torch.equal(x, y)
    assert len(graphs) == 1
    assert "rewards_and_gae" in graphs[0].code


def test_a_compiled_step_whitens_by_the_moments_of_the_same_pass():
    *floats, scores, mask = inputs(3, 64)

    def step(*x):
        out = fused_with_moments(*x, None)
        return whiten(out.advantages, x[-1], stats=out.moments)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*floats, scores, mask), step(*floats, scores, mask))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype):
    *floats, scores, mask = inputs(3, 20)
    floats = [x.to(dtype) for x in floats]
    torch.library.opcheck(
        torch.ops.rlhf_fast.gae.default,
        (floats[0], floats[1], mask, GAMMA, LAMBDA, None, None, None),
    )
    torch.library.opcheck(
        torch.ops.rlhf_fast.rewards_and_gae.default,
        (
            *(floats[0], floats[1], None, floats[2], scores, mask, 0.1, "k3", True, None, 0.5),
            *(GAMMA, LAMBDA, scores, None, None),
        ),
    )
    offsets = torch.tensor([0, 7, 7, 20], dtype=torch.int32)
    packed = [x[0] for x in floats]
    torch.library.opcheck(
        torch.ops.rlhf_fast.rewards_and_gae.default,
        (
            *(packed[0], None, packed[1], packed[2], scores, None, 0.1, "exact", True, None, None),
            *(GAMMA, LAMBDA, None, offsets, None),
        ),
    )
