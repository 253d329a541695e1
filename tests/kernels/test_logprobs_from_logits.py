"""logprobs_from_logits against fp64 truth: values, gradients, special rows, layouts."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_fast_kernels import logprobs_from_logits
from tests.kernels.logprob_cases import (
    DTYPES,
    FAST,
    IMPLS,
    VOCABS,
    draw,
    draw_labels,
    eager,
    gradient,
    truth,
    worst,
)


def special_rows(vocab: int) -> torch.Tensor:
    """Gaussian, all at -200, peaked, huge, half at -inf, rising (which defeats any fixed shift)."""
    rows = draw((6, vocab))
    rows[1] -= 200.0
    rows[2, vocab // 2] += 90.0
    rows[3] *= 30.0
    if vocab > 1:
        rows[4, vocab // 2 :] = -torch.inf
        rows[5] = torch.linspace(-300.0, 300.0, vocab)
    return rows


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", VOCABS)
def test_error_against_fp64_is_at_most_that_of_eager(
    vocab: int, dtype: torch.dtype, impl: str
) -> None:
    logits = special_rows(vocab).to(dtype)
    labels = draw_labels((6,), max(vocab // 2, 1))
    want = truth(logits, labels)
    got = logprobs_from_logits(logits, labels, impl=impl)
    baseline = eager(logits, labels)
    for ours, exact, theirs in zip(got, want, baseline, strict=True):
        assert ours is not None
        assert ours.dtype == torch.float32
        error = (ours.double() - exact).abs()
        allowed = (theirs.double() - exact).abs() + 2e-6 + 2e-7 * exact.abs()
        assert bool((error <= allowed.nan_to_num(1e-5)).all()), (error, allowed)
        if impl == "cpu":
            assert float((error - 1e-7 * exact.abs()).max()) <= 2e-5


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", VOCABS)
def test_gradient_error_is_at_most_that_of_eager(vocab: int, dtype: torch.dtype, impl: str) -> None:
    logits = special_rows(vocab)[[0, 1, 2, 3, 5]].to(dtype)
    labels = draw_labels((5,), vocab)
    g, h = draw((2, 5), seed=2)
    exact = gradient(lambda x: truth(x, labels), logits.double(), g, h)
    ours = gradient(lambda x: logprobs_from_logits(x, labels, impl=impl), logits, g, h)
    theirs = gradient(lambda x: eager(x, labels), logits, g, h)
    assert ours.dtype == dtype
    # Half a step of the gradient's own dtype is unavoidable on top of the arithmetic.
    step = torch.finfo(dtype).eps / 2 * float(exact.abs().max())
    assert worst(ours, exact) <= worst(theirs, exact) + step + 1e-6


@pytest.mark.parametrize("impl", IMPLS)
def test_minus_infinity_has_probability_and_gradient_exactly_zero(impl: str) -> None:
    logits = special_rows(301)[[4]]
    logits = torch.cat([logits, logits.roll(150, dims=-1)])
    labels = torch.tensor([3, 200])
    assert bool(torch.isfinite(logits[[0, 1], labels]).all())
    ones = torch.ones(2)
    grad = gradient(lambda x: logprobs_from_logits(x, labels, impl=impl), logits, ones, ones)
    assert bool(torch.isfinite(grad).all())
    assert bool((grad[torch.isinf(logits)] == 0).all())
    logprobs, _ = logprobs_from_logits(logits, torch.tensor([200, 3]), impl=impl)
    assert bool((logprobs == -torch.inf).all())


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("vocab", [7, 5000, 40000])
def test_a_segment_of_minus_infinity_does_not_hide_the_rest(vocab: int, impl: str) -> None:
    logits = torch.full((3, vocab), -torch.inf)
    logits[0, -1] = -150.0
    logits[1, vocab // 2] = 5.0
    logits[2, -3:] = torch.tensor([1.0, 2.0, 3.0])
    labels = torch.tensor([vocab - 1, vocab // 2, vocab - 1])
    logprobs, entropy = logprobs_from_logits(logits, labels, impl=impl)
    exact = truth(logits, labels)
    assert entropy is not None
    assert worst(logprobs, exact[0]) < 1e-5
    assert worst(entropy, exact[1]) < 1e-6


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("position", [0, 699, 16383, 16384, 33999])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nan_and_plus_infinity_give_nan(value: float, position: int, impl: str) -> None:
    for background in (0.0, -torch.inf):
        logits = torch.full((2, 34000), background)
        logits[0, position] = value
        logits[1, 0] = 0.0
        logprobs, entropy = logprobs_from_logits(logits, torch.tensor([5, 0]), impl=impl)
        assert entropy is not None
        assert bool(logprobs[0].isnan())
        assert bool(entropy[0].isnan())
        assert bool(torch.isfinite(logprobs[1]))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_ignored_rows_are_not_read(dtype: torch.dtype, impl: str) -> None:
    logits = draw((4, 301)).to(dtype)
    labels = draw_labels((4,), 301)
    labels[1] = labels[3] = -100
    spoiled = logits.clone()
    spoiled[1] = torch.nan
    spoiled[3] = torch.inf
    g, h = draw((2, 4), seed=3)
    clean, entropy = logprobs_from_logits(spoiled, labels, impl=impl)
    assert entropy is not None
    assert clean[[1, 3]].tolist() == entropy[[1, 3]].tolist() == [0.0, 0.0]
    assert torch.equal(clean, logprobs_from_logits(logits, labels, impl=impl)[0])
    grad = gradient(lambda x: logprobs_from_logits(x, labels, impl=impl), spoiled, g, h)
    assert bool((grad[[1, 3]] == 0).all())
    kept = gradient(lambda x: logprobs_from_logits(x, labels, impl=impl), logits, g, h)
    assert torch.equal(grad, kept)


@pytest.mark.parametrize("impl", IMPLS)
def test_all_ignored_and_empty(impl: str) -> None:
    logits = torch.full((3, 11), torch.nan, requires_grad=True)
    logprobs, entropy = logprobs_from_logits(logits, torch.full((3,), 7), ignore_index=7, impl=impl)
    assert entropy is not None
    (logprobs.sum() + entropy.sum()).backward()
    assert logprobs.tolist() == entropy.tolist() == [0.0] * 3
    assert logits.grad is not None
    assert bool((logits.grad == 0).all())
    empty = torch.empty(0, 11, requires_grad=True)
    logprobs, entropy = logprobs_from_logits(empty, torch.empty(0, dtype=torch.int64), impl=impl)
    logprobs.sum().backward()
    assert logprobs.shape == (0,)
    assert empty.grad is not None


@pytest.mark.parametrize("impl", IMPLS)
def test_temperature_per_row_equals_scalars(impl: str) -> None:
    logits, labels = draw((5, 300)), draw_labels((5,), 300)
    temperature = torch.tensor([0.5, 0.7, 1.0, 1.3, 2.0])
    together = logprobs_from_logits(logits, labels, temperature=temperature, impl=impl)
    g, h = draw((2, 5), seed=4)
    grads = gradient(
        lambda x: logprobs_from_logits(x, labels, temperature=temperature, impl=impl), logits, g, h
    )
    for row in range(5):
        value = float(temperature[row])
        one = slice(row, row + 1)
        alone = logprobs_from_logits(logits[one], labels[one], temperature=value, impl=impl)
        for joint, single in zip(together, alone, strict=True):
            assert joint is not None
            assert single is not None
            assert worst(joint[one], single) < 1e-6
        exact = gradient(
            lambda x, v=value, o=one: truth(x, labels[o], temperature=v),
            logits[one].double(),
            g[one],
            h[one],
        )
        assert worst(grads[one], exact) < 2e-6


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_views_are_read_where_they_lie(dtype: torch.dtype, impl: str) -> None:
    base = draw((3, 6, 303)).to(dtype)
    views = {
        "all but the last position": base[:, :-1],
        "transposed batch": base.transpose(0, 1),
        "every other row": base[::2, 1::2],
        "vocabulary slice": base[..., 1:300],
        "strided vocabulary": base[..., ::2],
        "expanded": base[:1].expand(4, 6, 303),
        "one row": base[1, 2],
        "four dims": base.view(3, 2, 3, 303).transpose(0, 2),
    }
    if impl == "triton":  # the interpreter takes milliseconds a row
        views = {name: views[name] for name in ("transposed batch", "strided vocabulary")}
    for name, view in views.items():
        labels = draw_labels(tuple(view.shape[:-1]), view.shape[-1])
        labels = labels.t().contiguous().t() if labels.dim() == 2 else labels
        g, h = draw((2, *view.shape[:-1]), seed=5)
        dense = view.contiguous()
        for ours, want in zip(
            logprobs_from_logits(view, labels, impl=impl),
            logprobs_from_logits(dense, labels, impl=impl),
            strict=True,
        ):
            assert ours is not None
            assert want is not None
            assert torch.equal(ours, want), name

        leaf = base.clone().requires_grad_()
        like = leaf.as_strided(view.shape, view.stride(), view.storage_offset())
        logprobs, entropy = logprobs_from_logits(like, labels, impl=impl)
        assert entropy is not None
        (grad,) = torch.autograd.grad([logprobs, entropy], like, [g, h])
        want_grad = gradient(
            lambda x, labels=labels: logprobs_from_logits(x, labels, impl=impl), dense, g, h
        )
        assert torch.equal(grad, want_grad), name


@pytest.mark.parametrize("impl", IMPLS)
def test_strided_and_expanded_upstream_gradients(impl: str) -> None:
    logits, labels = draw((4, 300)), draw_labels((4,), 300)
    wide = draw((4, 6), seed=6)
    for upstream in (wide[:, 1], torch.ones(()).expand(4)):
        leaf = logits.clone().requires_grad_()
        logprobs, entropy = logprobs_from_logits(leaf, labels, impl=impl)
        (strided,) = torch.autograd.grad([logprobs, entropy], leaf, [upstream, upstream])
        dense = upstream.contiguous().clone()
        want = gradient(lambda x: logprobs_from_logits(x, labels, impl=impl), logits, dense, dense)
        assert worst(strided, want) < 1e-7


@pytest.mark.parametrize("impl", IMPLS)
def test_only_one_of_the_outputs_may_have_a_gradient(impl: str) -> None:
    logits, labels = draw((4, 300)), draw_labels((4,), 300)
    zero, one = torch.zeros(4), torch.ones(4)
    leaf = logits.clone().requires_grad_()
    logprobs, entropy = logprobs_from_logits(leaf, labels, impl=impl)
    (from_logprobs,) = torch.autograd.grad(logprobs.sum(), leaf, retain_graph=True)
    (from_entropy,) = torch.autograd.grad(entropy.sum(), leaf)  # type: ignore[union-attr]
    run = lambda x: logprobs_from_logits(x, labels, impl=impl)  # noqa: E731
    assert worst(from_logprobs, gradient(run, logits, one, zero)) < 1e-7
    assert worst(from_entropy, gradient(run, logits, zero, one)) < 1e-7
    leaf = logits.clone().requires_grad_()
    alone, nothing = logprobs_from_logits(leaf, labels, with_entropy=False, impl=impl)
    assert nothing is None
    assert torch.equal(alone, logprobs)
    (again,) = torch.autograd.grad(alone.sum(), leaf)
    assert worst(again, from_logprobs) < 1e-7


@pytest.mark.parametrize("impl", IMPLS)
def test_backward_twice_with_retained_graph(impl: str) -> None:
    leaf = draw((4, 300)).requires_grad_()
    logprobs, _ = logprobs_from_logits(leaf, draw_labels((4,), 300), impl=impl)
    (first,) = torch.autograd.grad(logprobs.sum(), leaf, retain_graph=True)
    kept = first.clone()
    (second,) = torch.autograd.grad(logprobs.sum(), leaf)
    assert torch.equal(kept, second)


@pytest.mark.parametrize("dtype", DTYPES)
def test_inplace_backward_writes_over_the_logits(dtype: torch.dtype) -> None:
    logits, labels = draw((3, 4, 301)).to(dtype), draw_labels((3, 3), 301)
    g, h = draw((2, 3, 3), seed=7)
    want = gradient(
        lambda x: logprobs_from_logits(x, labels, impl=FAST), logits[:, :-1].contiguous(), g, h
    )
    leaf = logits.clone().requires_grad_()
    inner = (leaf * 1.0)[:, :-1]
    logprobs, entropy = logprobs_from_logits(inner, labels, inplace_backward=True, impl=FAST)
    (grad,) = torch.autograd.grad([logprobs, entropy], inner, [g, h], retain_graph=True)
    assert torch.equal(grad, want)
    if FAST == "cpu":
        assert grad.data_ptr() == inner.data_ptr()
        with pytest.raises(RuntimeError, match="second backward is impossible"):
            torch.autograd.grad(logprobs.sum(), leaf)
        with pytest.raises(ValueError, match="leaf"):
            logprobs_from_logits(leaf, draw_labels((3, 4), 301), inplace_backward=True)
        with pytest.raises(ValueError, match="share memory"):
            logprobs_from_logits(
                logits[0].expand(2, 4, 301),
                labels[:2, :1].expand(2, 4).clone(),
                inplace_backward=True,
            )


@pytest.mark.skipif(FAST != "cpu", reason="in place is a property of the compiled op")
def test_inplace_backward_refuses_a_view_of_a_leaf() -> None:
    stored = draw((3, 51)).requires_grad_()
    kept = stored.detach().clone()
    with pytest.raises(ValueError, match="the leaf tensor that logits is a view of"):
        logprobs_from_logits(
            stored[:, :50], draw_labels((3,), 50), inplace_backward=True, impl=FAST
        )
    assert torch.equal(stored, kept)


@pytest.mark.skipif(FAST != "cpu", reason="in place is a property of the compiled op")
def test_inplace_backward_is_noticed_by_others_who_saved_the_logits() -> None:
    leaf = draw((3, 50)).requires_grad_()
    logits = leaf * 1.0
    other = (logits * logits).sum()
    logprobs, _ = logprobs_from_logits(logits, draw_labels((3,), 50), inplace_backward=True)
    torch.autograd.grad(logprobs.sum(), logits)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        other.backward()


@given(
    rows=st.integers(1, 9),
    vocab=st.integers(1, 4200),
    scale=st.floats(0.0, 40.0),
    bf16=st.booleans(),
    temperature=st.floats(0.2, 3.0),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=60, deadline=None)
def test_any_shape_matches_fp64(
    rows: int, vocab: int, scale: float, bf16: bool, temperature: float, seed: int
) -> None:
    logits = draw((rows, vocab), seed, scale).to(torch.bfloat16 if bf16 else torch.float32)
    labels = draw_labels((rows,), vocab, seed)
    got = logprobs_from_logits(logits, labels, temperature=temperature)
    want = truth(logits, labels, temperature=temperature)
    for ours, exact in zip(got, want, strict=True):
        assert ours is not None
        assert float(((ours - exact).abs() / (1 + exact.abs())).max()) < 4e-6
    g, h = draw((2, rows), seed)
    ours = gradient(
        lambda x: logprobs_from_logits(x, labels, temperature=temperature), logits, g, h
    )
    exact = gradient(lambda x: truth(x, labels, temperature=temperature), logits.double(), g, h)
    size = float(exact.abs().max())
    # g (1 - p) / T cancels where p is close to 1: an ulp of p costs g / T of it.
    ulp = 1e-6 * max(1.0, float(g.abs().max()) / temperature)
    assert worst(ours, exact) <= (2**-8 * size + ulp if bf16 else 1e-5 * (1 + size))
