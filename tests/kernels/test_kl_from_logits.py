"""kl_from_logits against fp64: values, gradients, small and infinite KLs, layouts, messages."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_fast_kernels import kl_from_logits, reference
from rlhf_fast_kernels.kl_rows import (
    KLRowSettings,
    KLRowStats,
    kl_row_gradient,
    kl_row_stats,
    merge_kl_shards,
)
from tests.kernels.linear_cases import ALL_IMPLS, FAST, close, draw

VOCABS = (1, 7, 300, 2049, 32003)
DTYPES = (torch.float32, torch.bfloat16)
FUSED = ALL_IMPLS[1:]


def pair(rows: int, vocab: int, noise: float = 1.0, scale: float = 3.0, seed: int = 0):
    logits = draw(rows, vocab, seed=seed, scale=scale)
    return logits, logits + draw(rows, vocab, seed=seed + 1, scale=noise) - 5.0


def with_gradient(function, logits, upstream):
    leaf = logits.detach().clone().requires_grad_()
    kl = function(leaf)
    (upstream * kl).sum().backward()
    return kl.detach(), leaf.grad


def truth(logits, ref_logits, upstream, **options):
    return with_gradient(
        lambda x: reference.kl_from_logits(x, ref_logits.double(), **options),
        logits.double(),
        upstream.double(),
    )


@pytest.mark.parametrize("impl", ALL_IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", VOCABS)
def test_values_and_gradients_against_fp64(vocab, dtype, impl):
    if impl == "triton" and vocab > 3000:
        vocab = 4100  # the interpreter is slow; this is two blocks and a rest
    logits, ref_logits = (x.to(dtype) for x in pair(4, vocab))
    upstream = draw(4, seed=9)
    want, exact = truth(logits, ref_logits, upstream)
    got, grad = with_gradient(lambda x: kl_from_logits(x, ref_logits, impl=impl), logits, upstream)
    assert got.dtype == torch.float32
    assert grad.dtype == dtype
    close(got, want, 3e-6)
    close(grad, exact, 4e-3 if dtype == torch.bfloat16 else 3e-6)


@pytest.mark.parametrize("impl", ALL_IMPLS)
@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.6},
        {"temperature": torch.tensor([0.5, 1.0, 2.0])},
        {"softcap": 4.0, "ref_softcap": 4.0, "temperature": 1.5},
        {"softcap": 2.0},
        {"vocab_size": 250},
    ],
    ids=lambda o: ",".join(o),
)
def test_options(options, impl):
    logits, ref_logits = pair(3, 301)
    upstream = draw(3, seed=9)
    want, exact = truth(logits, ref_logits, upstream, **options)
    got, grad = with_gradient(
        lambda x: kl_from_logits(x, ref_logits, impl=impl, **options), logits, upstream
    )
    close(got, want, 5e-6)
    close(grad, exact, 5e-6)
    if "vocab_size" in options:
        assert bool((grad[:, 250:] == 0).all())


@pytest.mark.parametrize("impl", FUSED)
@pytest.mark.parametrize("noise", [1e-4, 1e-3, 1e-2, 0.1, 1.0])
def test_small_kls_keep_their_digits(noise, impl):
    """The plain form is off by 1e-7 whatever the KL: all of it at 5e-9, the least one here."""
    logits, ref_logits = pair(6, 3000, noise=noise, scale=2.0)
    ones = torch.ones(6)
    want, exact = truth(logits, ref_logits, ones)
    got, grad = with_gradient(lambda x: kl_from_logits(x, ref_logits, impl=impl), logits, ones)
    # z - q carries the rounding of logits of size 10: 5e-7, against noise of 1e-4.
    assert float(((got - want) / want).abs().max()) < 1e-5 + 2e-7 / noise
    assert float((grad - exact).norm() / exact.norm()) < 1e-5 + 2e-6 / noise


@pytest.mark.parametrize("impl", FUSED)
def test_distributions_that_peak_far_apart(impl):
    logits, ref_logits = torch.zeros(3, 5000), torch.zeros(3, 5000)
    for row, height in enumerate((30.0, 100.0, 1000.0)):
        logits[row, 17] = height
        ref_logits[row, 4321] = height
    upstream = torch.ones(3)
    want, exact = truth(logits, ref_logits, upstream)
    got, grad = with_gradient(lambda x: kl_from_logits(x, ref_logits, impl=impl), logits, upstream)
    assert float(((got - want) / want).abs().max()) < 1e-6
    close(grad, exact, 2e-4)  # a KL of 1000 nats is off by 6e-5 in fp32


@pytest.mark.parametrize("impl", ALL_IMPLS)
def test_entries_at_minus_infinity(impl):
    logits, ref_logits = pair(4, 2500)
    logits[0, 100:900] = -torch.inf  # p = 0 < q: adds nothing to the sum
    ref_logits[1, 2400] = -torch.inf  # q = 0 < p: infinite
    logits[2, :2100] = ref_logits[2, :2100] = -torch.inf  # gone on both sides
    logits[3, :2499] = -torch.inf  # one entry left
    got, grad = with_gradient(
        lambda x: kl_from_logits(x, ref_logits, impl=impl), logits, torch.tensor([1.0, 0, 1, 1])
    )
    want = reference.kl_from_logits(logits.double(), ref_logits.double())
    assert got[1] == torch.inf
    for row in (0, 2, 3):
        assert math.isclose(float(got[row]), float(want[row]), rel_tol=1e-5)
    assert bool((grad[[0, 2, 3]][logits[[0, 2, 3]] == -torch.inf] == 0).all())
    assert bool(grad[[0, 2, 3]].isfinite().all())


@pytest.mark.parametrize("impl", ALL_IMPLS)
@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nan_and_plus_infinity_give_nan(value, side, impl):
    for position in (3, 2400):
        rows = pair(2, 2500)
        rows[side][0, position] = value
        kl = kl_from_logits(*rows, impl=impl)
        assert bool(kl[0].isnan())
        assert bool(kl[1].isfinite())
    gone = pair(2, 300)
    gone[side][0] = -torch.inf
    assert bool(kl_from_logits(*gone, impl=impl)[0].isnan())


@pytest.mark.parametrize("impl", ALL_IMPLS)
def test_equal_rows_have_no_kl_and_none_is_negative(impl):
    logits, _ = pair(5, 3001)
    kl, grad = with_gradient(lambda x: kl_from_logits(x, logits, impl=impl), logits, torch.ones(5))
    assert float(kl.abs().max()) <= 1e-6
    assert float(grad.abs().max()) <= 1e-7
    shifted = kl_from_logits(logits, logits + 100.0, impl=impl)
    assert float(shifted.min()) >= (-1e-5 if impl == "reference" else 0.0)


@pytest.mark.parametrize("impl", ALL_IMPLS)
def test_masked_rows_are_not_read(impl):
    logits, ref_logits = pair(4, 301)
    mask = torch.tensor([True, False, True, False])
    upstream = draw(4, seed=9)
    spoiled = logits.clone()
    spoiled[~mask] = torch.nan
    ref_spoiled = ref_logits.clone()
    ref_spoiled[~mask] = torch.inf
    run = lambda x, y: with_gradient(  # noqa: E731
        lambda leaf: kl_from_logits(leaf, y, mask=mask, impl=impl), x, upstream
    )
    clean, dirty = run(logits, ref_logits), run(spoiled, ref_spoiled)
    assert torch.equal(clean[0], dirty[0])
    assert torch.equal(clean[1], dirty[1])
    assert dirty[0][~mask].tolist() == [0.0, 0.0]
    assert bool((dirty[1][~mask] == 0).all())
    everything = kl_from_logits(logits, ref_logits, impl=impl)
    assert torch.equal(everything[mask], clean[0][mask])


@pytest.mark.parametrize("impl", ALL_IMPLS)
def test_shapes_strides_and_nothing(impl):
    base, ref_base = pair(12, 303)
    grid, ref_grid = base.view(3, 4, 303), ref_base.view(3, 4, 303)
    flat = kl_from_logits(base, ref_base, impl=impl)
    assert torch.equal(kl_from_logits(grid, ref_grid, impl=impl).flatten(), flat)
    for cut in (
        lambda x: x[:, :-1],
        lambda x: x.transpose(0, 1),
        lambda x: x[..., 1:300],
        lambda x: x[..., ::2],
        lambda x: x[:1].expand(4, 4, 303),
        lambda x: x[1, 2],
    ):
        view, ref_view = cut(grid), cut(ref_grid)
        want = kl_from_logits(view.contiguous(), ref_view.contiguous(), impl=impl)
        assert torch.equal(kl_from_logits(view, ref_view, impl=impl), want)
    leaf = grid.clone().requires_grad_()
    kl_from_logits(leaf[:, :-1], ref_grid[:, :-1], impl=impl).sum().backward()
    assert bool((leaf.grad[:, -1] == 0).all())
    empty = torch.empty(0, 11, requires_grad=True)
    kl = kl_from_logits(empty, torch.empty(0, 11), impl=impl)
    kl.sum().backward()
    assert kl.shape == (0,)


@pytest.mark.parametrize("impl", ALL_IMPLS)
def test_retained_graph_and_in_place(impl):
    logits, ref_logits = pair(4, 301)
    leaf = logits.clone().requires_grad_()
    kl = kl_from_logits(leaf, ref_logits, impl=impl)
    upstream = draw(4, 3, seed=9)[:, 1]
    (first,) = torch.autograd.grad(kl, leaf, upstream, retain_graph=True)
    kept = first.clone()
    (second,) = torch.autograd.grad(kl, leaf, upstream)
    assert torch.equal(kept, second)
    inner = logits.clone().requires_grad_() * 1.0
    kl = kl_from_logits(inner, ref_logits, inplace_backward=True, impl=impl)
    (grad,) = torch.autograd.grad(kl, inner, upstream, retain_graph=True)
    assert torch.equal(grad, kept)
    assert grad.data_ptr() == inner.data_ptr()
    with pytest.raises(RuntimeError, match="second backward is impossible"):
        torch.autograd.grad(kl, inner, upstream)
    with pytest.raises(ValueError, match="the leaf tensor that logits is a view of"):
        kl_from_logits(leaf.view(2, 2, 301), ref_logits.view(2, 2, 301), inplace_backward=True)


@pytest.mark.parametrize("impl", ALL_IMPLS)
def test_gradient_is_added_in_another_dtype_and_over_either_side(impl):
    logits, ref_logits = pair(3, 301)
    rows = KLRowSettings(None, 0.7, None, None, 0, 290)
    stats = kl_row_stats(impl, logits, ref_logits, rows)
    upstream = draw(3, seed=9)
    want = torch.full((3, 301), 7.0)
    kl_row_gradient(impl, logits, ref_logits, rows, stats, upstream, want)
    assert bool((want[:, 290:] == 0).all())
    for target in (logits.clone(), ref_logits.clone()):
        sides = (target, ref_logits) if torch.equal(target, logits) else (logits, target)
        kl_row_gradient(impl, *sides, rows, stats, upstream, target)
        assert torch.equal(target, want)
    added = torch.ones(3, 301)
    kl_row_gradient(impl, logits, ref_logits, rows, stats, upstream, added, accumulate=True)
    close(added, 1 + want, 1e-6)
    low = torch.ones(3, 301, dtype=torch.bfloat16)
    kl_row_gradient(impl, logits, ref_logits, rows, stats, upstream, low, accumulate=True)
    close(low, 1 + want, 4e-3)


@pytest.mark.parametrize("impl", ALL_IMPLS)
def test_shards_merge_to_the_whole(impl):
    logits, ref_logits = pair(3, 300)
    logits[1, :100] = -torch.inf  # the first shard of this row is empty
    ref_logits[1, :100] = -torch.inf
    whole = KLRowSettings(None, 0.7, None, None, 0, 290)
    want = kl_row_stats("reference", logits.double(), ref_logits.double(), whole)
    bounds = ((0, 100), (100, 200), (200, 300))
    parts = []
    for start, stop in bounds:
        here = whole._replace(vocab_start=start)
        cut = slice(start, stop)
        parts.append(kl_row_stats(impl, logits[:, cut], ref_logits[:, cut], here, shard=True))
    merged = merge_kl_shards(parts)
    for got, exact in zip(merged, want, strict=True):
        close(got, exact, 1e-5)
    upstream, pieces = draw(3, seed=9), []
    for start, stop in bounds:
        out = torch.empty(3, stop - start)
        here = whole._replace(vocab_start=start)
        cut = slice(start, stop)
        kl_row_gradient(impl, logits[:, cut], ref_logits[:, cut], here, merged, upstream, out)
        pieces.append(out)
    exact = torch.empty(3, 300, dtype=torch.float64)
    kl_row_gradient(
        "reference", logits.double(), ref_logits.double(), whole,
        KLRowStats(*want), upstream.double(), exact,
    )  # fmt: skip
    close(torch.cat(pieces, 1), exact, 1e-5)


def test_reference_passes_gradcheck():
    logits, ref_logits = (x.double() for x in pair(3, 9))
    mask = torch.tensor([True, False, True])
    run = lambda x: reference.kl_from_logits(  # noqa: E731
        x, ref_logits, temperature=0.7, softcap=3.0, ref_softcap=3.0, mask=mask
    )
    assert torch.autograd.gradcheck(run, logits.requires_grad_())


def test_torch_compile_and_opcheck():
    logits, ref_logits = pair(4, 301)
    upstream = draw(4, seed=9)
    run = lambda x: kl_from_logits(x * 1.0, ref_logits, temperature=0.7)  # noqa: E731
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for a, b in zip(
        with_gradient(compiled, logits, upstream), with_gradient(run, logits, upstream), strict=True
    ):
        assert torch.equal(a, b)
    arguments = (logits.requires_grad_(), ref_logits, None, None, 0.7, None, None, None, FAST)
    torch.library.opcheck(torch.ops.rlhf_fast.kl_from_logits.default, arguments)


@pytest.mark.skipif(FAST != "cpu", reason="the number of threads is the compiled op's")
def test_bits_depend_on_the_row_alone():
    logits, ref_logits = pair(9, 5000)
    try:
        found = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(kl_from_logits(logits, ref_logits))
    finally:
        torch.set_num_threads(1)
    assert torch.equal(found[0], found[1])
    alone = torch.cat(
        [kl_from_logits(x, y) for x, y in zip(logits.split(1), ref_logits.split(1), strict=True)]
    )
    assert torch.equal(alone, found[0])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"ref_logits": torch.zeros(2, 6)}, ValueError, r"one shape .* \(2, 5\) and \(2, 6\)"),
        ({"logits": torch.zeros(2, 5).long()}, TypeError, "logits must be floating point"),
        ({"mask": torch.ones(3, dtype=torch.bool)}, ValueError, r"mask must be bool \(2,\)"),
        ({"mask": torch.ones(2)}, ValueError, "mask must be bool"),
        ({"temperature": 0.0}, ValueError, "temperature must be positive"),
        ({"softcap": 0.0}, ValueError, "softcap must be positive"),
        ({"impl": "cuda"}, RuntimeError, "no such implementation"),
        ({"inplace_backward": True}, ValueError, "leaf"),
    ],
)
def test_bad_input(change, error, message):
    logits = torch.zeros(2, 5, requires_grad=True)
    given_ = {"logits": logits, "ref_logits": torch.zeros(2, 5), **change}
    with pytest.raises(error, match=message):
        kl_from_logits(given_.pop("logits"), given_.pop("ref_logits"), **given_)


@given(
    rows=st.integers(1, 6),
    vocab=st.integers(1, 5000),
    scale=st.floats(0.0, 30.0),
    noise=st.floats(0.0, 10.0),
    seed=st.integers(0, 2**20),
)
@settings(max_examples=40, deadline=None)
def test_any_shape_matches_fp64(rows, vocab, scale, noise, seed):
    logits, ref_logits = pair(rows, vocab, noise, scale, seed)
    upstream = draw(rows, seed=seed)
    want, exact = truth(logits, ref_logits, upstream)
    got, grad = with_gradient(lambda x: kl_from_logits(x, ref_logits), logits, upstream)
    close(got, want, 1e-5)
    close(grad, exact, 3e-5)
