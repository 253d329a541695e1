"""linear_logprobs against fp64 truth on all logits: values, gradients, tokens left out, chunks."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_fast_kernels import linear_logprobs, reference
from tests.kernels.linear_cases import ALL_IMPLS, FAST, IMPLS, close, draw, head, leaves, relative


def truth(inputs, labels, g, h, **options):
    """(logprobs, entropy, gradients) in fp64."""
    wide = [None if x is None else x.double() for x in inputs]
    own = leaves(*wide)
    logprobs, entropy = reference.linear_logprobs(own[0], own[1], labels, bias=own[2], **options)
    (g.double() * logprobs + h.double() * entropy).sum().backward()
    return logprobs, entropy, [None if x is None else x.grad for x in own]


def ours(inputs, labels, g, h, impl, **options):
    own = leaves(*inputs)
    logprobs, entropy = linear_logprobs(own[0], own[1], labels, bias=own[2], impl=impl, **options)
    (g * logprobs + h * entropy).sum().backward()
    return logprobs, entropy, [None if x is None else x.grad for x in own]


@pytest.mark.parametrize("impl", ALL_IMPLS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.7},
        {"softcap": 3.0, "temperature": 1.3},
        {"vocab_size": 290},
        {"chunk_rows": 4},
    ],
    ids=str,
)
def test_values_and_gradients_against_fp64(options, impl):
    hidden, weight, labels = head(11, 24, 301)
    labels = labels % 290
    labels[3] = labels[10] = -100
    inputs = (hidden, weight, draw(301, seed=5))
    g, h = draw(2, 11, seed=6)
    exact_options = {k: v for k, v in options.items() if k != "chunk_rows"}
    want = truth(inputs, labels, g, h, **exact_options)
    got = ours(inputs, labels, g, h, impl, **options)
    close(got[0], want[0], 2e-6)
    close(got[1], want[1], 2e-6)
    for ours_grad, exact in zip(got[2], want[2], strict=True):
        close(ours_grad, exact, 1e-5)


@pytest.mark.parametrize("impl", ALL_IMPLS)
def test_bf16_operands_give_log_probs_of_fp32_logits(impl):
    """bf16 logits would be off by 1e-2; products of bf16 numbers are exact in fp32."""
    hidden, weight, labels = (
        x.bfloat16() if x.is_floating_point() else x for x in head(9, 64, 300)
    )
    g, h = draw(2, 9, seed=6)
    want = truth((hidden, weight, None), labels, g, h)
    got = ours((hidden, weight, None), labels, g, h, impl)
    close(got[0], want[0], 3e-6)
    close(got[1], want[1], 3e-6)
    eager = leaves(hidden, weight)
    logits = (eager[0] @ eager[1].t()).float()
    log_p = torch.log_softmax(logits, -1)
    picked = log_p.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    assert float((picked - want[0]).abs().max()) > 1e-3
    (g * picked - h * (log_p.exp() * log_p).sum(-1)).sum().backward()
    for mine, theirs, exact in zip(got[2][:2], eager, want[2][:2], strict=True):
        assert mine.dtype == torch.bfloat16
        assert relative(mine, exact) <= 1.2 * relative(theirs.grad, exact)


def test_fp32_masters_serve_bf16_hidden_states():
    hidden, weight, labels = head(9, 64, 300)
    low = hidden.bfloat16()
    leaf = weight.clone().requires_grad_()
    logprobs, _ = linear_logprobs(low, leaf, labels)
    logprobs.sum().backward()
    want, _ = reference.linear_logprobs(low.double(), weight.bfloat16().double(), labels)
    close(logprobs, want, 3e-6)
    assert leaf.grad is not None
    assert leaf.grad.dtype == torch.float32


def test_autocast_rounds_operands_and_nothing_else():
    hidden, weight, labels = head(9, 64, 300)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logprobs, entropy = linear_logprobs(hidden, weight, labels)
    exact = reference.linear_logprobs(
        hidden.bfloat16().double(), weight.bfloat16().double(), labels
    )
    close(logprobs, exact[0], 3e-6)
    close(entropy, exact[1], 3e-6)
    full, _ = linear_logprobs(hidden, weight, labels, compute_dtype=torch.float32)
    assert float((full - logprobs).abs().max()) > 1e-4


@pytest.mark.parametrize("impl", ALL_IMPLS)
def test_tokens_left_out_may_hold_nan_and_cost_nothing(impl):
    hidden, weight, labels = head(8, 16, 50)
    labels[::3] = -100
    spoiled = hidden.clone()
    spoiled[::3] = math.nan
    g, h = draw(2, 8, seed=6)
    clean = ours((hidden, weight, None), labels, g, h, impl)
    dirty = ours((spoiled, weight, None), labels, g, h, impl)
    assert torch.equal(clean[0], dirty[0])
    assert torch.equal(clean[2][1], dirty[2][1])
    assert bool((dirty[2][0][::3] == 0).all())
    assert dirty[0][::3].tolist() == [0.0] * 3
    kept = (labels != -100).nonzero().squeeze(1)
    by_rows = ours((spoiled, weight, None), labels, g, h, impl, rows=kept)
    for a, b in zip([*by_rows[:2], *by_rows[2][:2]], [*dirty[:2], *dirty[2][:2]], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("impl", IMPLS)
def test_no_token_at_all(impl):
    for hidden, labels in (
        (draw(4, 16), torch.full((4,), -100)),
        (draw(0, 16), torch.empty(0, dtype=torch.int64)),
    ):
        own = leaves(hidden, draw(7, 16, seed=1), draw(7, seed=2))
        logprobs, entropy = linear_logprobs(own[0], own[1], labels, bias=own[2], impl=impl)
        (logprobs.sum() + entropy.sum()).backward()
        assert logprobs.tolist() == entropy.tolist() == [0.0] * len(labels)
        for x in own:
            assert x.grad is not None
            assert bool((x.grad == 0).all())


@pytest.mark.parametrize("impl", IMPLS)
def test_shapes_strides_and_expanded_inputs(impl):
    hidden, weight, labels = head(12, 16, 40)
    flat, _ = linear_logprobs(hidden, weight, labels, impl=impl)
    grid, entropy = linear_logprobs(
        hidden.view(3, 4, 16), weight, labels.view(3, 4), with_entropy=False, impl=impl
    )
    assert entropy is None
    assert torch.equal(grid.flatten(), flat)
    columns = hidden.t().contiguous().t()
    wide = torch.cat([weight, weight], 1)[:, :16]
    close(linear_logprobs(columns, wide, labels, impl=impl)[0], flat, 1e-6)
    same = hidden[:1].expand(12, 16)
    close(
        linear_logprobs(same, weight, labels[:1].expand(12), impl=impl)[0],
        flat[:1].expand(12),
        1e-6,
    )
    own = leaves(hidden, weight)
    logprobs, entropy = linear_logprobs(*own, labels, impl=impl)
    upstream = draw(12, 3, seed=7)[:, 1]
    got = torch.autograd.grad([logprobs, entropy], own, [upstream, torch.ones(()).expand(12)])
    want = ours((hidden, weight, None), labels, upstream.contiguous(), torch.ones(12), impl)[2]
    close(got[0], want[0], 1e-6)
    close(got[1], want[1], 1e-6)


@pytest.mark.parametrize("impl", IMPLS)
def test_per_row_temperature_equals_scalars(impl):
    hidden, weight, labels = head(4, 16, 40)
    values = torch.tensor([0.5, 0.9, 1.0, 2.0])
    together = linear_logprobs(hidden, weight, labels, temperature=values, chunk_rows=3, impl=impl)
    for i, value in enumerate(values.tolist()):
        alone = linear_logprobs(
            hidden[i : i + 1], weight, labels[i : i + 1], temperature=value, impl=impl
        )
        for joint, single in zip(together, alone, strict=True):
            close(joint[i : i + 1], single, 1e-6)


@pytest.mark.parametrize("impl", IMPLS)
def test_retained_graph_and_frozen_inputs(impl):
    hidden, weight, labels = head(6, 16, 40)
    own = leaves(hidden, weight)
    logprobs, _ = linear_logprobs(*own, labels, impl=impl)
    first = torch.autograd.grad(logprobs.sum(), own, retain_graph=True)
    second = torch.autograd.grad(2 * logprobs.sum(), own)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(2 * a, b)
    frozen = hidden.clone().requires_grad_()
    linear_logprobs(frozen, weight, labels, impl=impl)[0].sum().backward()
    assert torch.equal(frozen.grad, first[0])
    trained = weight.clone().requires_grad_()
    linear_logprobs(hidden, trained, labels, impl=impl)[0].sum().backward()
    assert torch.equal(trained.grad, first[1])


@pytest.mark.parametrize("vocab", [1, 7, 300, 32003, 50257])
def test_vocabularies_of_real_models(vocab):
    hidden, weight, labels = head(3, 8, vocab)
    labels[0], labels[2] = 0, vocab - 1
    got = linear_logprobs(hidden, weight, labels)
    want = reference.linear_logprobs(hidden.double(), weight.double(), labels)
    for a, b in zip(got, want, strict=True):
        close(a, b, 3e-6)


@pytest.mark.skipif(FAST != "cpu", reason="the number of threads is the compiled op's")
def test_same_bits_twice_and_on_any_number_of_threads():
    hidden, weight, labels = head(40, 32, 3000)
    results = []
    try:
        for threads in (1, 1, 2):
            torch.set_num_threads(threads)
            results.append(linear_logprobs(hidden, weight, labels, chunk_rows=16))
    finally:
        torch.set_num_threads(1)
    for a, b in zip(results[0], results[1], strict=True):
        assert torch.equal(a, b)


@given(
    tokens=st.integers(1, 13),
    width=st.integers(1, 33),
    vocab=st.integers(1, 700),
    chunk=st.integers(1, 6),
    bf16=st.booleans(),
    seed=st.integers(0, 2**20),
)
@settings(max_examples=40, deadline=None)
def test_any_shape_matches_fp64(tokens, width, vocab, chunk, bf16, seed):
    hidden, weight, labels = head(tokens, width, vocab, seed)
    if bf16:
        hidden, weight = hidden.bfloat16(), weight.bfloat16()
    g, h = draw(2, tokens, seed=seed)
    want = truth((hidden, weight, None), labels, g, h)
    got = ours((hidden, weight, None), labels, g, h, FAST, chunk_rows=chunk)
    close(got[0], want[0], 1e-5)
    close(got[1], want[1], 1e-5)
    for mine, exact in zip(got[2][:2], want[2][:2], strict=True):
        close(mine, exact, 1e-2 if bf16 else 2e-5)
