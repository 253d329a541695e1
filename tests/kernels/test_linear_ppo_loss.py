"""linear_ppo_loss against fp64 truth on all logits: loss, metrics, gradients, chunks, exact KL."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_fast_kernels import linear_logprobs, linear_ppo_loss, ppo_loss
from tests.kernels.linear_cases import (
    ALL_IMPLS,
    FAST,
    IMPLS,
    SETTINGS,
    close,
    doubles,
    draw,
    head,
    leaves,
    per_token,
    reference_loss,
    relative,
)

TOKENS, WIDTH, VOCAB = 13, 24, 301


def problem(tokens=TOKENS, width=WIDTH, vocab=VOCAB, seed=0):
    hidden, weight, labels = head(tokens, width, vocab, seed)
    mask = torch.arange(tokens) % 4 != 1
    return hidden, weight, labels, mask, per_token(tokens, vocab, seed + 10)


def ours(hidden, weight, labels, mask, tensors, bias=None, impl=FAST, **more):
    own = leaves(hidden, weight, bias)
    options = {"mask": mask, "normalizer": float(mask.sum()), **SETTINGS, **tensors, **more}
    out = linear_ppo_loss(own[0], own[1], labels, bias=own[2], impl=impl, **options)
    out.loss.backward()
    return out, [None if x is None else x.grad for x in own]


def truth(hidden, weight, labels, mask, tensors, bias=None, **more):
    own = leaves(hidden, weight, bias, dtype=torch.float64)
    loss, sums, peaks = reference_loss(
        own[0],
        own[1],
        labels,
        mask,
        {**doubles(tensors), "normalizer": float(mask.sum())},
        bias=own[2],
        **more,
    )
    loss.backward()
    return loss, sums, peaks, [None if x is None else x.grad for x in own]


def compare(got, want, tolerance=1e-5):
    out, grads = got
    loss, sums, peaks, exact = want
    close(out.loss, loss, tolerance)
    for name, value in out.metrics.items():
        close(value, sums[name], 5 * tolerance)
    for name, value in out.extrema.items():
        close(value, peaks[name], 5 * tolerance)
    for mine, theirs in zip(grads, exact, strict=True):
        if theirs is not None:
            close(mine, theirs, tolerance)


@pytest.mark.parametrize("impl", ALL_IMPLS)
@pytest.mark.parametrize(
    "more",
    [
        {},
        {"temperature": 0.7, "kl_estimator": "k1"},
        {"softcap": 3.0, "kl_estimator": "k2", "kl_gradient": "own"},
        {"entropy_coef": 0.0, "kl_coef": 0.0, "dual_clip": None},
    ],
    ids=str,
)
def test_loss_metrics_and_gradients_against_fp64(more, impl):
    case = problem()
    bias = draw(VOCAB, seed=5)
    want = truth(*case, bias=bias, **more)
    for chunk in (None, 3):
        compare(ours(*case, bias=bias, impl=impl, chunk_rows=chunk, **more), want)


@pytest.mark.parametrize("impl", IMPLS)
def test_equals_the_two_step_form(impl):
    """linear_logprobs, then ppo_loss: same loss, same gradients, 8 instead of 6 T H V."""
    hidden, weight, labels, mask, tensors = problem()
    out, grads = ours(hidden, weight, labels, mask, tensors, impl=impl)
    own = leaves(hidden, weight)
    kept = torch.where(mask, labels, -100)
    logprobs, entropy = linear_logprobs(*own, kept, impl=impl)
    two = ppo_loss(
        logprobs=logprobs,
        entropy=entropy,
        mask=mask,
        normalizer=float(mask.sum()),
        impl=impl,
        **SETTINGS,
        **tensors,
    )
    two.loss.backward()
    close(out.loss, two.loss, 1e-6)
    close(out.logprobs, logprobs, 1e-6)
    close(out.entropy, entropy, 1e-6)
    assert out.metrics.keys() == two.metrics.keys()
    for name, value in two.metrics.items():
        close(out.metrics[name], value, 1e-5)
    for mine, leaf in zip(grads[:2], own, strict=True):
        close(mine, leaf.grad, 1e-6)


@pytest.mark.parametrize("impl", ALL_IMPLS)
def test_exact_kl_over_the_whole_vocabulary(impl):
    hidden, weight, labels, mask, tensors = problem()
    ref = (draw(TOKENS, 10, seed=20), draw(VOCAB, 10, seed=21, scale=0.6), draw(VOCAB, seed=22))
    tensors = {k: v for k, v in tensors.items() if k != "ref_logprobs"}
    more = {"kl_estimator": "exact", "temperature": 0.8, "kl_coef": 0.3}
    want = truth(
        hidden, weight, labels, mask, {**tensors, "ref_logprobs": None},
        reference_head=tuple(x.double() for x in ref), **more,
    )  # fmt: skip
    named = dict(zip(("ref_hidden", "ref_weight", "ref_bias"), ref, strict=True))
    for chunk in (None, 4):
        got = ours(
            hidden, weight, labels, mask, tensors, impl=impl, chunk_rows=chunk, **named, **more
        )
        compare(got, want)
        assert float(got[0].metrics["kl"]) > 0


@pytest.mark.parametrize("impl", IMPLS)
def test_bf16_gradients_are_no_worse_than_eager(impl):
    hidden, weight, labels, mask, tensors = problem(32, 64, 500)
    hidden, weight = hidden.bfloat16(), weight.bfloat16()
    want = truth(hidden, weight, labels, mask, tensors)
    got = ours(hidden, weight, labels, mask, tensors, impl=impl)
    eager = leaves(hidden, weight)
    logits = (eager[0] @ eager[1].t()).float()
    log_p = torch.log_softmax(logits, -1)
    loss = ppo_loss(
        logprobs=log_p.gather(-1, labels.unsqueeze(-1)).squeeze(-1),
        entropy=-(log_p.exp() * log_p).sum(-1),
        mask=mask,
        normalizer=float(mask.sum()),
        impl="reference",
        **SETTINGS,
        **tensors,
    ).loss
    loss.backward()
    assert abs(float(got[0].loss) - float(want[0])) <= abs(float(loss) - float(want[0])) + 1e-5
    for mine, theirs, exact in zip(got[1][:2], eager, want[3][:2], strict=True):
        assert relative(mine, exact) <= 1.2 * relative(theirs.grad, exact)


@pytest.mark.parametrize("impl", ALL_IMPLS)
def test_masked_tokens_change_nothing_whatever_they_hold(impl):
    hidden, weight, labels, mask, tensors = problem()
    clean = ours(hidden, weight, labels, mask, tensors, impl=impl)
    spoiled = hidden.clone()
    spoiled[~mask] = math.nan
    dirt = {k: torch.where(mask, v, math.nan) for k, v in tensors.items()}
    wild = torch.where(mask, labels, 10**9)
    dirty = ours(spoiled, weight, wild, mask, dirt, impl=impl)
    assert torch.equal(clean[0].loss, dirty[0].loss)
    assert torch.equal(clean[1][1], dirty[1][1])
    assert torch.equal(clean[1][0], dirty[1][0])
    assert bool((dirty[1][0][~mask] == 0).all())
    assert bool((dirty[0].logprobs[~mask] == 0).all())


@pytest.mark.parametrize("impl", IMPLS)
def test_rows_and_ignored_labels_say_the_same_as_a_mask(impl):
    hidden, weight, labels, mask, tensors = problem()
    want = ours(hidden, weight, labels, mask, tensors, impl=impl)
    own = leaves(hidden, weight)
    shared = {"normalizer": float(mask.sum()), "impl": impl, **SETTINGS, **tensors}
    for how in (
        {"labels": labels, "rows": mask.nonzero().squeeze(1).int()},
        {"labels": torch.where(mask, labels, -100)},
    ):
        own = leaves(hidden, weight)
        out = linear_ppo_loss(*own, **how, **shared)
        out.loss.backward()
        assert torch.equal(out.loss, want[0].loss)
        assert torch.equal(own[0].grad, want[1][0])
        assert torch.equal(own[1].grad, want[1][1])


@pytest.mark.parametrize("impl", IMPLS)
def test_splitting_a_batch_adds_up(impl):
    """The normalizer is the whole step's: gradients of parts are parts of the gradient."""
    hidden, weight, labels, mask, tensors = problem()
    out, (d_hidden, d_weight, _) = ours(hidden, weight, labels, mask, tensors, impl=impl)
    loss, summed = 0.0, torch.zeros_like(weight)
    for part in (slice(0, 5), slice(5, 6), slice(6, 13)):
        pieces = {k: v[part] for k, v in tensors.items()}
        o, (h, w, _) = ours(
            hidden[part], weight, labels[part], mask[part], pieces, impl=impl,
            normalizer=float(mask.sum()),
        )  # fmt: skip
        loss += float(o.loss)
        summed += w
        close(h, d_hidden[part], 1e-6)
    assert math.isclose(loss, float(out.loss), rel_tol=1e-5, abs_tol=1e-6)
    close(summed, d_weight, 1e-6)


@pytest.mark.parametrize("impl", IMPLS)
def test_upstream_scale_retained_graph_and_accumulation(impl):
    hidden, weight, labels, mask, tensors = problem()
    want = ours(hidden, weight, labels, mask, tensors, impl=impl)[1]
    own = leaves(hidden, weight)
    out = linear_ppo_loss(
        *own, labels, mask=mask, normalizer=float(mask.sum()), impl=impl, **SETTINGS, **tensors
    )
    out.loss.backward(retain_graph=True)
    out.loss.backward(retain_graph=True)
    (3.0 * out.loss).backward()
    close(own[0].grad, 5 * want[0], 1e-6)
    close(own[1].grad, 5 * want[1], 1e-6)
    with torch.no_grad():
        quiet = linear_ppo_loss(
            *own, labels, mask=mask, normalizer=float(mask.sum()), impl=impl, **SETTINGS, **tensors
        )
    assert not quiet.loss.requires_grad
    assert torch.equal(quiet.loss, out.loss.detach())


@pytest.mark.parametrize("impl", IMPLS)
def test_weight_gradient_into_a_callers_buffer(impl):
    hidden, weight, labels, mask, tensors = problem()
    want = ours(hidden, weight, labels, mask, tensors, impl=impl)[1]
    buffer = torch.ones(VOCAB, WIDTH)
    own = leaves(hidden, weight)
    options = {"mask": mask, "normalizer": float(mask.sum()), "impl": impl, **SETTINGS, **tensors}
    out = linear_ppo_loss(*own, labels, weight_out=buffer, grad_scale=2.0, **options)
    out.loss.backward(retain_graph=True)
    assert own[1].grad is None
    close(buffer, 1 + 2 * want[1], 1e-6)
    close(own[0].grad, 2 * want[0], 1e-6)
    with pytest.raises(RuntimeError, match="backward can run once"):
        out.loss.backward()
    out = linear_ppo_loss(*own, labels, weight_out=buffer, **options)
    with pytest.raises(RuntimeError, match=r"grad_scale=0\.5"):
        (out.loss / 2).backward()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("empty", [True, False])
def test_nothing_to_learn_from(empty, impl):
    hidden, weight, labels, mask, tensors = problem(0 if empty else 6)
    out, grads = ours(
        hidden, weight, labels, torch.zeros_like(mask), tensors, impl=impl, normalizer=0.0
    )
    assert float(out.loss) == 0.0
    assert all(bool((g == 0).all()) for g in grads if g is not None)
    assert float(out.metrics["tokens"]) == 0.0


@pytest.mark.parametrize("impl", IMPLS)
def test_a_tensor_may_be_the_normalizer(impl):
    hidden, weight, labels, mask, tensors = problem()
    want = ours(hidden, weight, labels, mask, tensors, impl=impl)
    got = ours(hidden, weight, labels, mask, tensors, impl=impl, normalizer=mask.sum())
    assert torch.equal(want[0].loss, got[0].loss)
    assert torch.equal(want[1][1], got[1][1])


def test_frozen_head_or_frozen_trunk():
    hidden, weight, labels, mask, tensors = problem()
    want = ours(hidden, weight, labels, mask, tensors)[1]
    options = {"mask": mask, "normalizer": float(mask.sum()), **SETTINGS, **tensors}
    leaf = hidden.clone().requires_grad_()
    linear_ppo_loss(leaf, weight, labels, **options).loss.backward()
    assert torch.equal(leaf.grad, want[0])
    leaf = weight.clone().requires_grad_()
    linear_ppo_loss(hidden, leaf, labels, **options).loss.backward()
    assert torch.equal(leaf.grad, want[1])


@given(
    tokens=st.integers(1, 12),
    width=st.integers(1, 20),
    vocab=st.integers(2, 400),
    chunk=st.integers(1, 5),
    seed=st.integers(0, 2**20),
)
@settings(max_examples=30, deadline=None)
def test_any_shape_matches_fp64(tokens, width, vocab, chunk, seed):
    case = problem(tokens, width, vocab, seed)
    case[3][0] = True
    compare(ours(*case, chunk_rows=chunk), truth(*case), 3e-5)
