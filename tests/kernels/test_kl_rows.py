"""Rows of two logits as the linear ops use them, and where a small KL could lose its digits."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rlhf_fast_kernels import kl_from_logits, native, reference
from rlhf_fast_kernels.kl_rows import (
    KLRowSettings,
    KLRowStats,
    kl_row_gradient,
    kl_row_stats,
    merge_kl_shards,
)
from tests.kernels.linear_cases import ALL_IMPLS, FAST, draw

PLAIN = KLRowSettings(None, 1.0, None, None)
FUSED = ALL_IMPLS[1:]
SETTINGS = {
    "plain": PLAIN,
    "temperature": PLAIN._replace(temperature=torch.tensor([0.5, 1.0, 2.0])),
    "softcap": PLAIN._replace(softcap=4.0, ref_softcap=6.0, scale=1.3),
    "padded": PLAIN._replace(vocab_size=650),
}


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return float(((got.double() - want) / want).abs().max())


def gradients(
    impl: str,
    sides: tuple[torch.Tensor, torch.Tensor],
    settings: KLRowSettings,
    upstream: torch.Tensor,
) -> tuple[KLRowStats, torch.Tensor]:
    stats = kl_row_stats(impl, *sides, settings)
    out = torch.empty(sides[0].shape, dtype=torch.promote_types(sides[0].dtype, torch.float32))
    kl_row_gradient(impl, *sides, settings, stats, upstream, out)
    return stats, out


@pytest.mark.parametrize("name", SETTINGS)
def test_explicit_formulas_are_those_of_autograd(name: str) -> None:
    """The definition sum p (log p - log q), differentiated by PyTorch, in fp64."""
    settings, upstream = SETTINGS[name], draw(3, seed=9).double()
    logits, ref_logits = draw(3, 700, scale=3.0).double(), draw(3, 700, seed=1, scale=3.0).double()
    leaf = logits.clone().requires_grad_()
    temperature = settings.scale if settings.temperature is None else settings.temperature
    want = reference.kl_from_logits(
        leaf,
        ref_logits,
        temperature=temperature,
        softcap=settings.softcap,
        ref_softcap=settings.ref_softcap,
        vocab_size=settings.vocab_size,
    )
    (exact,) = torch.autograd.grad(want, leaf, upstream)
    stats, grad = gradients("reference", (logits, ref_logits), settings, upstream)
    torch.testing.assert_close(stats.kl, want.detach(), rtol=1e-11, atol=0)
    torch.testing.assert_close(grad, exact, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("impl", FUSED)
@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("kinds", ["fp32 bf16", "bf16 fp32", "bf16 bf16"])
def test_either_side_has_its_own_dtype(kinds: str, name: str, impl: str) -> None:
    dtypes = [{"fp32": torch.float32, "bf16": torch.bfloat16}[kind] for kind in kinds.split()]
    logits = draw(3, 700, scale=3.0).to(dtypes[0])
    ref_logits = (logits.float() + draw(3, 700, seed=1)).to(dtypes[1])
    upstream = draw(3, seed=9)
    exact = gradients(
        "reference", (logits.double(), ref_logits.double()), SETTINGS[name], upstream.double()
    )
    stats, grad = gradients(impl, (logits, ref_logits), SETTINGS[name], upstream)
    assert relative(stats.kl, exact[0].kl) < 2e-6
    torch.testing.assert_close(grad.double(), exact[1], rtol=2e-5, atol=1e-7)
    low = torch.empty(3, 700, dtype=torch.bfloat16)
    kl_row_gradient(impl, logits, ref_logits, SETTINGS[name], stats, upstream, low)
    # The interpreter cuts bits off where bf16 is rounded.
    step = 2**-7 if impl == "triton" else 2**-8
    torch.testing.assert_close(low.float(), grad, rtol=step, atol=1e-30)


@pytest.mark.parametrize("impl", FUSED)
@pytest.mark.parametrize("depth", [15.0, 40.0])
@pytest.mark.parametrize("columns", [1, 300, 5000])
def test_first_entries_that_tell_nothing_of_the_rest(columns: int, depth: float, impl: str) -> None:
    """Improbable entries with log-ratios of their own must not set the centre."""
    ref_logits = draw(4, 9000, scale=2.0)
    logits = ref_logits + draw(4, 9000, seed=1, scale=1e-3)
    logits[:, :columns] -= depth
    ref_logits[:, :columns] -= depth + torch.tensor([1.0, 20.0, -2.0, 100.0]).unsqueeze(-1)
    sides, upstream = (logits, ref_logits), torch.ones(4)
    exact = gradients("reference", (logits.double(), ref_logits.double()), PLAIN, upstream.double())
    stats, grad = gradients(impl, sides, PLAIN, upstream)
    assert float(exact[0].kl.max()) < 1e-3
    assert relative(stats.kl, exact[0].kl) < 2e-4
    assert float((grad - exact[1]).norm() / exact[1].norm()) < 1e-3


@pytest.mark.parametrize("impl", FUSED)
def test_small_kls_and_their_gradients_to_six_digits(impl: str) -> None:
    """fp32 sums of both sides, subtracted, are off by the square root of their error here."""
    ref_logits = draw(5, 9000, scale=2.0)
    logits, upstream = ref_logits + draw(5, 9000, seed=1, scale=1e-3), torch.ones(5)
    sides = (logits.double(), ref_logits.double())
    exact = gradients("reference", sides, PLAIN, upstream.double())
    stats, grad = gradients(impl, (logits, ref_logits), PLAIN, upstream)
    assert float(exact[0].kl.max()) < 1e-6
    assert relative(stats.kl, exact[0].kl) < 2e-6
    assert float((grad - exact[1]).norm() / exact[1].norm()) < 2e-6


@pytest.mark.parametrize("impl", FUSED)
def test_small_kls_keep_their_digits_in_shards(impl: str) -> None:
    ref_logits = draw(5, 6000, scale=2.0)
    logits = ref_logits + draw(5, 6000, seed=1, scale=1e-3)
    want = kl_row_stats("reference", logits.double(), ref_logits.double(), PLAIN)
    parts = []
    for start, stop in ((0, 2500), (2500, 2600), (2600, 6000)):
        here = PLAIN._replace(vocab_start=start, vocab_size=6000)
        cut = slice(start, stop)
        parts.append(kl_row_stats(impl, logits[:, cut], ref_logits[:, cut], here, shard=True))
    merged = merge_kl_shards(parts)
    assert relative(merged.kl, want.kl) < 1e-4
    assert merged.kl.dtype == torch.float32
    again = merge_kl_shards(parts)
    assert all(torch.equal(a, b) for a, b in zip(merged, again, strict=True))


@pytest.mark.parametrize("impl", ALL_IMPLS)
def test_a_constant_on_one_side_changes_nothing(impl: str) -> None:
    ref_logits = draw(3, 3000, scale=2.0)
    for constant in (0.0, 0.5, -3.0, 64.0):
        kl = kl_row_stats(impl, ref_logits, ref_logits + constant, PLAIN).kl
        assert float(kl.min()) >= 0.0
        assert float(kl.max()) < (1e-10 if constant else 1e-13)


@pytest.mark.parametrize("impl", ALL_IMPLS)
def test_an_entry_that_only_the_reference_excludes_is_infinite(impl: str) -> None:
    """Even where p is too small for fp32; and NaN elsewhere in the row comes first."""
    logits, ref_logits = draw(4, 3000), draw(4, 3000, seed=1)
    logits[0, 2999] = -500.0
    ref_logits[:3, 2999] = -torch.inf
    logits[1, 5] = torch.nan
    logits[2, 2999] = -torch.inf
    kl = kl_row_stats(impl, logits, ref_logits, PLAIN).kl
    assert kl[0] == torch.inf
    assert bool(kl[1].isnan())
    assert bool(kl[2:].isfinite().all())
    stats = kl_row_stats(impl, logits, ref_logits, PLAIN)
    grad = torch.empty(4, 3000)
    kl_row_gradient(impl, logits, ref_logits, PLAIN, stats, torch.ones(4), grad)
    assert bool(grad[0, 0].isnan())
    assert bool(grad[2:].isfinite().all())
    assert grad[2, 2999] == 0


@pytest.mark.parametrize("impl", FUSED)
def test_rows_are_read_where_they_lie(impl: str) -> None:
    """Both sides and the gradient with layouts of their own, none a 2-D view."""
    stored, ref_stored = draw(3, 4, 301), draw(4, 3, 301, seed=1)
    logits, ref_logits = stored[:, :-1], ref_stored[1:].transpose(0, 1)
    want = kl_from_logits(logits.contiguous(), ref_logits.contiguous(), impl=impl)
    assert torch.equal(kl_from_logits(logits, ref_logits, impl=impl), want)
    inner = (stored.clone().requires_grad_() * 1.0)[:, :-1]
    upstream = draw(3, 3, seed=9)
    kl = kl_from_logits(inner, ref_logits, inplace_backward=True, impl=impl)
    (grad,) = torch.autograd.grad(kl, inner, upstream)
    leaf = logits.clone().requires_grad_()
    (exact,) = torch.autograd.grad(kl_from_logits(leaf, ref_logits, impl=impl), leaf, upstream)
    assert torch.equal(grad, exact)
    assert grad.data_ptr() == inner.data_ptr()
    with pytest.raises(ValueError, match="share memory"):
        kl_from_logits(stored[0].expand(3, 4, 301), stored, inplace_backward=True, impl=impl)
    with pytest.raises(ValueError, match="overwrite ref_logits"):
        kl_from_logits(stored, stored, inplace_backward=True, impl=impl)


@pytest.mark.skipif(FAST != "cpu", reason="the number of threads is the compiled op's")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_few_long_rows_have_the_same_bits_on_any_number_of_threads(dtype: torch.dtype) -> None:
    sides = draw(2, 70001, scale=3.0).to(dtype), draw(2, 70001, seed=1, scale=3.0).to(dtype)
    found = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(gradients("cpu", sides, PLAIN, torch.ones(2)))
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(found[0][0], found[1][0], strict=True))
    assert torch.equal(found[0][1], found[1][1])


COMPARE_ISAS = """
import torch
from rlhf_fast_kernels import native
from rlhf_fast_kernels.kl_rows import KLRowSettings, kl_row_gradient, kl_row_stats
settings, worst = KLRowSettings(None, 0.7, None, None), 0.0
for dtype in (torch.float32, torch.bfloat16):
    for vocab in (1, 7, 4099):
        for noise in (0.01, 40.0):
            g = torch.Generator().manual_seed(0)
            x = 3 * torch.randn(4, vocab, generator=g)
            y = (x + noise * torch.randn(4, vocab, generator=g)).to(dtype)
            x, results = x.to(dtype), []
            if vocab > 1:
                x[0, : vocab // 2] = y[0, : vocab // 2] = -torch.inf
            for impl, kind in (("reference", torch.float64), ("cpu", dtype)):
                stats = kl_row_stats(impl, x.to(kind), y.to(kind), settings)
                out = torch.empty(4, vocab, dtype=torch.promote_types(kind, torch.float32))
                upstream = torch.ones(4, dtype=out.dtype)
                kl_row_gradient(impl, x.to(kind), y.to(kind), settings, stats, upstream, out)
                results.append((stats.kl.double(), out.double()))
            for want, got in zip(*results):
                worst = max(worst, float(((got - want).abs() / (1e-3 + want.abs())).max()))
print(native.core().cpu_features().split()[0], worst)
"""


@pytest.mark.skipif(FAST != "cpu", reason="instruction sets belong to the compiled op")
# Where there is AVX-512 every other test runs with it.
@pytest.mark.parametrize(
    "isa", ["baseline", "avx2", pytest.param("avx512", marks=pytest.mark.long)]
)
def test_every_instruction_set_meets_the_same_tolerance(isa: str) -> None:
    if isa not in native.core().cpu_features():
        isa = "baseline"
    kernels = Path(native.__file__).parents[1]
    result = subprocess.run(
        [sys.executable, "-c", COMPARE_ISAS],
        env={**os.environ, "RLHF_FAST_ISA": isa, "PYTHONPATH": str(kernels)},
        capture_output=True,
        text=True,
        check=True,
    )
    name, error = result.stdout.split()
    assert name == isa
    assert float(error) < 1e-4
