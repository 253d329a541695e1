"""linear_kl against fp64 truth on all logits."""

from __future__ import annotations

import math

import pytest
import torch

from rlhf_fast_kernels import linear_kl, linear_logprobs, reference
from tests.kernels.linear_cases import ALL_IMPLS, FAST, IMPLS, close, draw, head, leaves, relative

TOKENS, WIDTH, REF_WIDTH, VOCAB = 11, 24, 10, 301


def problem():
    hidden, weight, _ = head(TOKENS, WIDTH, VOCAB)
    ref_hidden, ref_weight, _ = head(TOKENS, REF_WIDTH, VOCAB, seed=30)
    return hidden, weight, ref_hidden, ref_weight


def ours(tensors, upstream, impl, biases=(None, None), **options):
    own = leaves(*tensors[:2], biases[0])
    kl = linear_kl(*own[:2], *tensors[2:], bias=own[2], ref_bias=biases[1], impl=impl, **options)
    (upstream * kl).sum().backward()
    return kl, [None if x is None else x.grad for x in own]


def truth(tensors, upstream, biases=(None, None), **options):
    own = leaves(*tensors[:2], biases[0], dtype=torch.float64)
    wide = [x.double() for x in tensors[2:]]
    ref_bias = None if biases[1] is None else biases[1].double()
    if "softcap" in options:
        options["ref_softcap"] = options["softcap"]
    kl = reference.linear_kl(*own[:2], *wide, bias=own[2], ref_bias=ref_bias, **options)
    (upstream.double() * kl).sum().backward()
    return kl, [None if x is None else x.grad for x in own]


@pytest.mark.parametrize("impl", ALL_IMPLS)
@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.7}, {"softcap": 3.0}, {"vocab_size": 280}], ids=str
)
def test_values_and_gradients_against_fp64(options, impl):
    tensors, upstream = problem(), draw(TOKENS, seed=7)
    biases = (draw(VOCAB, seed=8), draw(VOCAB, seed=9))
    mask = torch.arange(TOKENS) % 3 != 1
    want = truth(tensors, upstream, biases, mask=mask, **options)
    for chunk in (None, 4):
        got = ours(tensors, upstream, impl, biases, mask=mask, chunk_rows=chunk, **options)
        close(got[0], want[0], 3e-6)
        assert bool((got[0][~mask] == 0).all())
        for mine, exact in zip(got[1], want[1], strict=True):
            close(mine, exact, 1e-5)


@pytest.mark.parametrize("impl", ALL_IMPLS)
def test_a_policy_that_is_the_reference_has_no_kl(impl):
    hidden, weight, _ = head(TOKENS, WIDTH, VOCAB)
    kl, grads = ours((hidden, weight, hidden, weight), torch.ones(TOKENS), impl)
    assert float(kl.abs().max()) <= 1e-6
    assert float(grads[0].abs().max()) <= 1e-6


@pytest.mark.parametrize("impl", ALL_IMPLS[1:])
def test_a_policy_that_has_barely_moved(impl):
    """KLs of 1e-5, where a run spends its first steps, keep two digits in fp32."""
    hidden, weight, _ = head(TOKENS, WIDTH, VOCAB)
    moved = hidden + 2e-3 * draw(TOKENS, WIDTH, seed=9)
    upstream = torch.ones(TOKENS)
    want = truth((moved, weight, hidden, weight), upstream)
    got = ours((moved, weight, hidden, weight), upstream, impl)
    assert float(want[0].max()) < 1e-4
    assert float((got[0] - want[0]).abs().max()) <= 0.02 * float(want[0].max())
    assert relative(got[1][0], want[1][0]) <= 1e-2


@pytest.mark.parametrize("impl", ALL_IMPLS)
def test_is_the_mean_of_the_log_ratio(impl):
    """By its definition: E over the policy's tokens of log p - log q, every token enumerated."""
    hidden, weight, ref_hidden, ref_weight = problem()
    kl = linear_kl(hidden[:2], weight, ref_hidden[:2], ref_weight, impl=impl)
    every = torch.arange(VOCAB)
    for row in range(2):
        one = hidden[row].expand(VOCAB, WIDTH), ref_hidden[row].expand(VOCAB, REF_WIDTH)
        logp, _ = linear_logprobs(one[0], weight, every, impl="reference")
        logq, _ = linear_logprobs(one[1], ref_weight, every, impl="reference")
        assert math.isclose(float((logp.exp() * (logp - logq)).sum()), float(kl[row]), rel_tol=1e-4)


@pytest.mark.parametrize("impl", ALL_IMPLS)
def test_masked_tokens_may_hold_nan(impl):
    tensors, upstream = problem(), draw(TOKENS, seed=7)
    mask = torch.arange(TOKENS) % 3 != 1
    clean = ours(tensors, upstream, impl, mask=mask)
    spoiled = [x.clone() for x in tensors]
    for x in (spoiled[0], spoiled[2]):
        x[~mask] = math.nan
    dirty = ours(spoiled, upstream, impl, mask=mask)
    assert torch.equal(clean[0], dirty[0])
    assert torch.equal(clean[1][1], dirty[1][1])
    assert bool((dirty[1][0][~mask] == 0).all())


def test_bf16_and_retained_graph():
    tensors = [x.bfloat16() for x in problem()]
    upstream = draw(TOKENS, seed=7)
    want = truth(tensors, upstream)
    own = leaves(*tensors[:2])
    kl = linear_kl(*own, *tensors[2:], impl=FAST)
    close(kl, want[0], 3e-6)
    first = torch.autograd.grad((upstream * kl).sum(), own, retain_graph=True)
    second = torch.autograd.grad((upstream * kl).sum(), own)
    for a, b, exact in zip(first, second, want[1][:2], strict=True):
        assert torch.equal(a, b)
        assert relative(a, exact) <= 4e-3


@pytest.mark.parametrize("impl", IMPLS)
def test_no_token_at_all(impl):
    hidden, weight, ref_hidden, ref_weight = problem()
    mask = torch.zeros(TOKENS, dtype=torch.bool)
    kl, grads = ours((hidden, weight, ref_hidden, ref_weight), torch.ones(TOKENS), impl, mask=mask)
    assert kl.tolist() == [0.0] * TOKENS
    assert all(bool((g == 0).all()) for g in grads if g is not None)
