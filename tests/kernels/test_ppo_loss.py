"""ppo_loss against fp64 truth and against what PPO's loss must and must not depend on."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_fast_kernels import finalize_metrics, ppo_loss
from tests.kernels.ppo_cases import (
    DTYPES,
    FAST,
    FULL,
    IMPLS,
    LEAVES,
    NAMES,
    assert_same,
    bf16_digit,
    doubles,
    draw,
    one_token,
    run,
    with_exact_kl,
)

# ---- numbers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", [(1,), (17,), (512,), (1300,), (9000,), (3, 401)])
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("kl_gradient", ["k2", "own"])
def test_matches_fp64(shape: tuple[int, ...], estimator: str, kl_gradient: str, impl: str) -> None:
    tensors = draw(shape)
    options = {**FULL, "kl_estimator": estimator, "kl_gradient": kl_gradient}
    want = run(doubles(tensors), impl="reference", **options)
    assert_same(run(tensors, impl=impl, **options), want, 2e-6)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_exact_kl_is_a_term_with_a_gradient(dtype: torch.dtype, impl: str) -> None:
    tensors = with_exact_kl(draw((700,), dtype=dtype))
    tensors["kl"][~tensors["mask"]] = torch.nan
    options = {**FULL, "kl_estimator": "exact"}
    got, grads = run(tensors, 500, impl=impl, **options)
    want = run(doubles(tensors), 500, impl="reference", **options)
    last_digit = 2e-6 if dtype == torch.float32 else bf16_digit(impl)
    assert_same((got, grads), want, last_digit)
    mask = tensors["mask"]
    assert float(got.metrics["kl"]) == pytest.approx(float(tensors["kl"][mask].double().sum()))
    assert grads["kl"].dtype == dtype
    slope = torch.where(mask, FULL["kl_coef"] / 500, 0.0)
    assert torch.allclose(grads["kl"].float(), slope, rtol=last_digit)


@pytest.mark.parametrize("impl", IMPLS)
def test_bf16_inputs_lose_nothing_but_the_last_rounding(impl: str) -> None:
    tensors = draw((700,), dtype=torch.bfloat16)
    want = run(doubles(tensors), impl="reference", **FULL)
    got = run(tensors, impl=impl, **FULL)
    assert got[0].loss.dtype == torch.float32
    assert abs(float(got[0].loss) - float(want[0].loss)) < 1e-6
    for name in LEAVES:
        assert got[1][name].dtype == torch.bfloat16
        exact = want[1][name]
        error = float((got[1][name].double() - exact).abs().max())
        assert error <= bf16_digit(impl) * float(exact.abs().max())


@pytest.mark.parametrize("impl", IMPLS)
def test_error_is_at_most_that_of_eager_fp32(impl: str) -> None:
    """Against the same formulas in eager fp32, on sums that nearly cancel."""
    tensors = draw((20000,))
    tensors["advantages"] -= tensors["advantages"].mean()
    exact = run(doubles(tensors), impl="reference", **FULL)
    eager = run(tensors, impl="reference", **FULL)
    ours = run(tensors, impl=impl, **FULL)
    allowed = abs(float(eager[0].loss) - float(exact[0].loss))
    last_digit = torch.finfo(torch.float32).eps * abs(float(exact[0].loss))
    assert abs(float(ours[0].loss) - float(exact[0].loss)) <= allowed + last_digit
    for name in LEAVES:
        error, theirs = (
            float((x[1][name].double() - exact[1][name]).abs().max()) for x in (ours, eager)
        )
        scale = float(exact[1][name].abs().max())
        assert error <= theirs + torch.finfo(torch.float32).eps * scale


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("part", ["policy", "value", "no weights", "no value clip", "bare"])
def test_parts_may_be_absent(part: str, impl: str) -> None:
    tensors, options = draw((300,)), dict(FULL)
    drop = {
        "policy": ("values", "old_values", "returns"),
        "value": ("logprobs", "old_logprobs", "advantages", "entropy", "ref_logprobs", "weights"),
        "no weights": ("weights",),
        "no value clip": ("old_values",),
        "bare": ("entropy", "ref_logprobs", "weights", "values", "old_values", "returns"),
    }[part]
    for name in drop:
        del tensors[name]
    if part == "no value clip":
        options["value_clip_eps"] = None
    if part == "bare":
        options = {}
    want = run(doubles(tensors), impl="reference", **options)
    got = run(tensors, impl=impl, **options)
    assert_same(got, want, 2e-6)
    assert ("value_loss" in got[0].metrics) == ("values" in tensors)
    assert ("policy_loss" in got[0].metrics) == ("logprobs" in tensors)
    assert ("kl" in got[0].metrics) == ("ref_logprobs" in tensors)
    assert bool(got[0].extrema) == ("logprobs" in tensors)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kl_gradient", ["k2", "own"])
def test_a_metric_without_coefficient_does_not_change_the_loss(impl: str, kl_gradient: str) -> None:
    tensors = draw((300,))
    bare = {k: v for k, v in tensors.items() if k not in ("entropy", "ref_logprobs")}
    with_metrics, without = run(tensors, impl=impl, kl_gradient=kl_gradient), run(bare, impl=impl)
    assert float(with_metrics[0].loss) == pytest.approx(float(without[0].loss), abs=1e-7)
    assert torch.allclose(with_metrics[1]["logprobs"], without[1]["logprobs"], atol=1e-9)
    assert float(with_metrics[0].metrics["kl"]) > 0


# ---- what must not matter -----------------------------------------------------------------------


@pytest.mark.parametrize("impl", IMPLS)
def test_masked_slots_change_nothing_whatever_they_hold(impl: str) -> None:
    tensors = draw((40, 33))
    spoiled = {name: x.clone() for name, x in tensors.items()}
    outside = ~tensors["mask"]
    for name, value in zip(NAMES, [torch.nan, torch.inf, -torch.inf] * 3, strict=True):
        spoiled[name][outside] = value
    got, want = run(spoiled, impl=impl, **FULL), run(tensors, impl=impl, **FULL)
    assert torch.equal(got[0].loss, want[0].loss)
    for name, value in want[0].metrics.items():
        assert torch.equal(got[0].metrics[name], value), name
    for name, grad in want[1].items():
        assert torch.equal(got[1][name], grad)
        assert bool((grad[outside] == 0).all())


@pytest.mark.parametrize("impl", IMPLS)
def test_padding_packing_and_row_order_do_not_matter(impl: str) -> None:
    tensors = draw((12, 50))
    order = torch.randperm(12, generator=torch.Generator().manual_seed(3))
    want = run(tensors, impl=impl, **FULL)
    shuffled = {name: x[order] for name, x in tensors.items()}
    packed = {name: x[tensors["mask"]] for name, x in tensors.items()}
    junk = {name: torch.full((12, 9), torch.nan) for name in NAMES}
    junk["mask"] = torch.zeros(12, 9, dtype=torch.bool)
    left = {name: torch.cat([junk[name], x], dim=1) for name, x in tensors.items()}
    right = {name: torch.cat([x, junk[name]], dim=1) for name, x in tensors.items()}
    pick = {
        "shuffled": (shuffled, lambda g: g[order.argsort()]),
        "left": (left, lambda g: g[:, 9:]),
        "right": (right, lambda g: g[:, :-9]),
    }
    for given_, undo in pick.values():
        got = run(given_, impl=impl, **FULL)
        assert_same((got[0], {k: undo(v) for k, v in got[1].items()}), want, 1e-6)
    got = run(packed, impl=impl, **FULL)
    kept = {k: v[tensors["mask"]] for k, v in want[1].items()}
    assert_same(got, (want[0], kept), 1e-6)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("pieces", [2, 5])
def test_microbatch_split_does_not_matter(pieces: int, impl: str) -> None:
    tensors = draw((20, 30))
    tensors["mask"][4:8] = False  # one microbatch without a single token
    count = int(tensors["mask"].sum())
    whole, grads = run(tensors, impl=impl, **FULL)
    loss, sums, parts = 0.0, dict.fromkeys(whole.metrics, 0.0), []
    for rows in torch.arange(20).chunk(pieces):
        out, grad = run({k: x[rows] for k, x in tensors.items()}, count, impl=impl, **FULL)
        loss += float(out.loss)
        sums = {k: sums[k] + float(v) for k, v in out.metrics.items()}
        parts.append(grad)
    assert loss == pytest.approx(float(whole.loss), abs=1e-6)
    for name, value in whole.metrics.items():
        assert sums[name] == pytest.approx(float(value), rel=1e-5, abs=1e-4)
    for name in LEAVES:
        joined = torch.cat([g[name] for g in parts])
        assert float((joined - grads[name]).abs().max()) <= 1e-6 * float(grads[name].abs().max())


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_and_expanded_inputs(impl: str, dtype: torch.dtype) -> None:
    tensors = draw((31, 21), dtype=dtype)
    strided = {
        name: torch.empty(21, 62, dtype=x.dtype)[:, ::2].t().copy_(x) for name, x in tensors.items()
    }
    assert not strided["logprobs"].is_contiguous()
    assert_same(run(strided, impl=impl, **FULL), run(tensors, impl=impl, **FULL), 1e-6)
    tensors["advantages"] = tensors["advantages"][:, :1].expand(31, 21)
    dense = {**tensors, "advantages": tensors["advantages"].contiguous()}
    assert_same(run(tensors, impl=impl, **FULL), run(dense, impl=impl, **FULL), 1e-6)


@pytest.mark.skipif(FAST != "cpu", reason="eager PyTorch promises no such thing")
def test_result_is_the_same_bits_for_any_number_of_threads() -> None:
    tensors, before = draw((40001,)), torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            results.append(run(tensors, impl="cpu", **FULL))
    finally:
        torch.set_num_threads(before)
    for out, grads in results[1:]:
        assert torch.equal(out.loss, results[0][0].loss)
        assert all(torch.equal(v, results[0][0].metrics[k]) for k, v in out.metrics.items())
        assert all(torch.equal(v, results[0][1][k]) for k, v in grads.items())


@given(
    shape=st.one_of(
        st.tuples(st.integers(0, 1100)), st.tuples(st.integers(1, 9), st.integers(1, 140))
    ),
    seed=st.integers(0, 2**31),
    low=st.floats(0.0, 0.5),
    high=st.floats(0.0, 0.5),
    dual=st.one_of(st.none(), st.floats(1.05, 5.0)),
    estimator=st.sampled_from(["k1", "k2", "k3"]),
    own=st.booleans(),
    eps=st.one_of(st.none(), st.floats(0.01, 1.0)),
)
@settings(max_examples=60, deadline=None)
def test_any_shape_and_setting_matches_fp64(
    shape: tuple[int, ...],
    seed: int,
    low: float,
    high: float,
    dual: float | None,
    estimator: str,
    own: bool,
    eps: float | None,
) -> None:
    tensors = draw(shape, seed)
    options: dict[str, Any] = {
        **FULL,
        "clip_eps_low": low,
        "clip_eps_high": high,
        "dual_clip": dual,
        "kl_estimator": estimator,
        "kl_gradient": "own" if own else "k2",
        "value_clip_eps": eps,
    }
    got = run(tensors, impl=FAST, **options)
    # fp64 of the fp32 bounds: a ratio within rounding of the band's edge may fall on either side.
    want = run(tensors, impl="reference", **options)
    loss = abs(float(got[0].loss) - float(want[0].loss))
    assert loss <= 2e-6 * (1 + abs(float(want[0].loss)))
    for name in LEAVES:
        off = (got[1][name] - want[1][name]).abs() > 1e-5 * want[1][name].abs() + 1e-6
        assert int(off.sum()) <= 1


# ---- PPO's own rules ----------------------------------------------------------------------------


@pytest.mark.parametrize("impl", IMPLS)
def test_first_minibatch_has_ratio_exactly_one(impl: str) -> None:
    tensors = draw((500,))
    tensors = {k: tensors[k] for k in ("logprobs", "advantages", "mask")}
    tensors["old_logprobs"] = tensors["logprobs"].clone()
    out, grads = run(tensors, impl=impl)
    count = float(out.metrics["tokens"])
    assert float(out.metrics["ratio"]) == float(out.metrics["ratio_squared"]) == count
    assert float(out.extrema["ratio_max"]) == 1.0
    assert float(out.extrema["negative_ratio_min"]) == -1.0
    for name in ("approx_kl_k1", "approx_kl_k2", "approx_kl_k3", "clip_low", "clip_high"):
        assert float(out.metrics[name]) == 0.0
    expected = torch.where(tensors["mask"], -tensors["advantages"], 0) / count
    assert torch.allclose(grads["logprobs"], expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    ("advantage", "ratio", "slope", "counted"),
    [
        (1.0, 1.1, -1.1, None),
        (1.0, 1.4, 0.0, "clip_high"),
        (1.0, 0.5, -0.5, None),
        (-1.0, 1.4, 1.4, None),
        (-1.0, 0.5, 0.0, "clip_low"),
        (-1.0, 4.0, 0.0, "clip_dual"),
        (0.0, 4.0, 0.0, None),
    ],
)
def test_gradient_vanishes_exactly_where_the_clip_wins(
    advantage: float, ratio: float, slope: float, counted: str | None, impl: str
) -> None:
    tensors = one_token(logprobs=math.log(ratio), old_logprobs=0.0, advantages=advantage)
    out, grads = run(tensors, impl=impl, dual_clip=3.0)
    assert float(grads["logprobs"]) == pytest.approx(slope, abs=1e-6)
    for name in ("clip_low", "clip_high", "clip_dual"):
        assert float(out.metrics[name]) == float(name == counted)


@pytest.mark.parametrize("impl", IMPLS)
def test_log_ratio_is_clamped_before_the_exponential(impl: str) -> None:
    tensors = one_token(logprobs=100.0, old_logprobs=0.0, advantages=-1.0)
    out, grads = run(tensors, impl=impl)
    assert float(out.loss) == pytest.approx(math.exp(20.0), rel=1e-6)
    assert float(grads["logprobs"]) == 0.0
    out, _ = run(tensors, impl=impl, log_ratio_clamp=2.0)
    assert float(out.loss) == pytest.approx(math.exp(2.0), rel=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    ("value", "loss", "slope"),
    [(1.1, 0.5 * 0.9**2, -0.9), (1.5, 0.5 * 0.8**2, 0.0), (0.5, 0.5 * 1.5**2, -1.5)],
)
def test_value_loss_is_clipped_around_the_old_value(
    value: float, loss: float, slope: float, impl: str
) -> None:
    tensors = one_token(values=value, old_values=1.0, returns=2.0)
    out, grads = run(tensors, impl=impl, value_clip_eps=0.2)
    assert float(out.loss) == pytest.approx(loss, rel=1e-6)
    assert float(grads["values"]) == pytest.approx(slope, abs=1e-6)
    assert float(out.metrics["value_clip"]) == float(slope == 0.0)


def exact_kl_case() -> tuple[torch.Tensor, torch.Tensor]:
    """Policy logits (a leaf) and reference log-probs over a vocabulary of five, in fp64."""
    generator = torch.Generator().manual_seed(11)
    logits = torch.randn(5, generator=generator).double().requires_grad_()
    reference_log_p = torch.log_softmax(torch.randn(5, generator=generator).double(), -1)
    return logits, reference_log_p


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("kl_gradient", ["k2", "own"])
def test_kl_term_by_enumeration(estimator: str, kl_gradient: str) -> None:
    """Expectation over all tokens of a tiny vocabulary, weighted by the policy's probabilities."""
    logits, ref = exact_kl_case()
    log_p = torch.log_softmax(logits, -1)
    p = log_p.detach().exp()
    value, slope = 0.0, torch.zeros(5, dtype=torch.float64)
    for token in range(5):
        out = ppo_loss(
            logprobs=log_p[token : token + 1],
            old_logprobs=log_p[token : token + 1].detach(),
            advantages=torch.zeros(1, dtype=torch.float64),
            ref_logprobs=ref[token : token + 1],
            mask=torch.tensor([True]),
            normalizer=1,
            kl_coef=1.0,
            kl_estimator=estimator,
            kl_gradient=kl_gradient,
            impl="reference",
        )
        value += float(p[token] * out.metrics["kl"])
        slope += p[token] * torch.autograd.grad(out.loss, logits, retain_graph=True)[0]
    reverse = (log_p.exp() * (log_p - ref)).sum()
    forward = (ref.exp() * (ref - log_p)).sum()
    if estimator != "k2":  # unbiased
        assert value == pytest.approx(float(reverse), rel=1e-12)
    zero = torch.zeros_like(logits)
    wanted = {
        "k1": zero,
        "k2": torch.autograd.grad(reverse, logits, retain_graph=True)[0],
        "k3": torch.autograd.grad(forward, logits)[0],
    }["k2" if kl_gradient == "k2" else estimator]
    assert torch.allclose(slope, wanted, atol=1e-12)


@pytest.mark.parametrize("impl", IMPLS)
def test_all_masked_is_an_exact_zero_with_a_graph(impl: str) -> None:
    tensors = draw((64,))
    tensors = {k: torch.full_like(x, torch.nan) for k, x in tensors.items() if k != "mask"}
    tensors["mask"] = torch.zeros(64, dtype=torch.bool)
    for normalizer in (100, 0, torch.tensor(0.0)):
        out, grads = run(tensors, normalizer, impl=impl, **FULL)
        assert float(out.loss) == 0.0
        assert all(float(v) == 0.0 for v in out.metrics.values())
        assert all(float(v) == -math.inf for v in out.extrema.values())
        assert len(grads) == 3
        assert all(bool((g == 0).all()) for g in grads.values())
        means = finalize_metrics(out.metrics, out.extrema)
        assert means["policy_loss"] == means["value_loss"] == 0.0


# ---- metrics ------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", IMPLS)
def test_finalized_metrics_are_the_means_of_their_definitions(impl: str) -> None:
    tensors = draw((6, 300))
    out, _ = run(tensors, impl=impl, **FULL)
    means = finalize_metrics(out.metrics, out.extrema)
    x = {k: v[tensors["mask"]].double() for k, v in tensors.items()}
    delta = x["logprobs"] - x["old_logprobs"]
    ratio = delta.exp()
    residual = x["returns"] - x["values"]
    expected = {
        "tokens": len(delta),
        "value_tokens": len(delta),
        "ratio": ratio.mean(),
        "ratio_variance": ratio.var(correction=0),
        "ratio_max": ratio.max(),
        "ratio_min": ratio.min(),
        "approx_kl_k1": -delta.mean(),
        "approx_kl_k2": 0.5 * delta.square().mean(),
        "approx_kl_k3": (ratio - 1 - delta).mean(),
        "entropy": x["entropy"].mean(),
        "returns": x["returns"].mean(),
        "returns_variance": x["returns"].var(correction=0),
        "explained_variance": 1 - residual.var(correction=0) / x["returns"].var(correction=0),
        "clip_fraction_low": ((x["advantages"] < 0) & (ratio < 0.8)).double().mean(),
        "clip_fraction_high": ((x["advantages"] > 0) & (ratio > 1.28)).double().mean(),
        "clip_fraction_dual": ((x["advantages"] < 0) & (ratio > 1.7)).double().mean(),
    }
    for name, value in expected.items():
        assert means[name] == pytest.approx(float(value), rel=2e-5, abs=2e-6), name
    parts = means["clip_fraction_low"] + means["clip_fraction_high"]
    assert means["clip_fraction"] == pytest.approx(parts)
    total = (
        means["policy_loss"]
        + 0.3 * means["value_loss"]
        + 0.1 * means["kl"]
        - 0.01 * means["entropy"]
    )
    assert float(out.loss) == pytest.approx(total, rel=1e-5)


def test_constant_returns_have_no_explained_variance() -> None:
    tensors = one_token(values=0.5, old_values=0.5, returns=1.0)
    out, _ = run(tensors)
    assert math.isnan(finalize_metrics(out.metrics)["explained_variance"])
