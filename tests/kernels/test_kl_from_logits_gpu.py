"""The Triton kernels of kl_from_logits on a device: fp64, small KLs, layouts, bits, no sync."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from rlhf_fast_kernels import dispatch, kl_from_logits, reference
from rlhf_fast_kernels.kl_rows import (
    KLRowSettings,
    kl_row_gradient,
    kl_row_stats,
    merge_kl_shards,
)
from tests.kernels.linear_cases import draw

DEVICE = "cuda"
PLAIN = KLRowSettings(None, 1.0, None, None)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@contextmanager
def no_synchronisation() -> Iterator[None]:
    """A call that makes the host wait for the device raises."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def pair(rows: int, vocab: int, noise: float, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    logits = draw(rows, vocab, scale=3.0).to(DEVICE)
    ref_logits = logits + draw(rows, vocab, seed=1, scale=noise).to(DEVICE)
    return logits.to(dtype), ref_logits.to(dtype), draw(rows, seed=2).to(DEVICE)


def run(
    logits: torch.Tensor, ref_logits: torch.Tensor, upstream: torch.Tensor, **options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    leaf = logits.detach().requires_grad_()
    kl = kl_from_logits(leaf, ref_logits, **options)
    (grad,) = torch.autograd.grad(kl, leaf, upstream.to(kl.dtype))
    return kl.detach(), grad


def test_triton_is_what_a_gpu_uses() -> None:
    choice = dispatch.choose("kl_from_logits", None, torch.empty(1, device=DEVICE))
    assert choice.impl == "triton"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocab", [1, 7, 300, 4096, 4097, 32003, 151937])
@pytest.mark.parametrize("noise", [1e-3, 0.3, 30.0])
def test_values_and_gradients_against_fp64(noise: float, vocab: int, dtype: torch.dtype) -> None:
    logits, ref_logits, upstream = pair(5, vocab, noise, dtype)
    options: dict[str, Any] = {"temperature": 0.8}
    leaf = logits.double().requires_grad_()
    want = reference.kl_from_logits(leaf, ref_logits.double(), **options)
    (exact,) = torch.autograd.grad(want, leaf, upstream.double())
    kl, grad = run(logits, ref_logits, upstream, **options)
    # The rounding of z - z' is some 3e-7 of logits of size 10, against the noise.
    assert float(((kl - want).abs() / (want + 1e-12)).max()) < 1e-5 + 1e-6 / noise
    step = {torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-10}[dtype]
    allowed = step + 1e-6 / noise
    assert float((grad - exact).abs().max()) <= allowed * float(exact.abs().max()) + 1e-6


def test_masked_rows_layouts_and_options() -> None:
    stored, ref_stored = (draw(4, 5, 303, seed=k).to(DEVICE) for k in (0, 1))
    logits, ref_logits = stored[:, :-1], ref_stored[:, 1:]
    mask = torch.arange(16, device=DEVICE).view(4, 4) % 3 != 0
    logits[~mask] = torch.nan
    temperature = 0.5 + draw(4, 4, seed=3).abs().to(DEVICE)
    options: dict[str, Any] = {
        "mask": mask,
        "temperature": temperature,
        "softcap": 5.0,
        "ref_softcap": 4.0,
        "vocab_size": 300,
    }
    upstream = draw(4, 4, seed=4).to(DEVICE)
    exact = run(logits.double(), ref_logits.double(), upstream, impl="reference", **options)
    with no_synchronisation():
        found = run(logits, ref_logits, upstream, impl="triton", **options)
    for got, want in zip(found, exact, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-6)
    assert bool((found[0][~mask] == 0).all())
    assert bool((found[1][~mask] == 0).all())


def test_the_same_bits_twice_and_beside_other_rows() -> None:
    logits, ref_logits, upstream = pair(300, 50257, 0.3, torch.bfloat16)
    first, second = (run(logits, ref_logits, upstream) for _ in range(2))
    alone = run(logits[123:124], ref_logits[123:124], upstream[123:124])
    for a, b, c in zip(first, second, alone, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a[123:124], c)


def test_in_place_and_over_the_reference() -> None:
    logits, ref_logits, upstream = pair(3, 9001, 0.3, torch.float32)
    stats = kl_row_stats("triton", logits, ref_logits, PLAIN)
    want = torch.empty_like(logits)
    kl_row_gradient("triton", logits, ref_logits, PLAIN, stats, upstream, want)
    added = torch.ones_like(want)
    kl_row_gradient("triton", logits, ref_logits, PLAIN, stats, upstream, added, accumulate=True)
    torch.testing.assert_close(added, 1 + want)
    target = ref_logits.clone()
    kl_row_gradient("triton", logits, target, PLAIN, stats, upstream, target)
    assert torch.equal(target, want)
    target = logits.clone()
    kl_row_gradient("triton", target, ref_logits, PLAIN, stats, upstream, target)
    assert torch.equal(target, want)


def test_small_kls_keep_their_digits_in_shards() -> None:
    logits, ref_logits, _ = pair(5, 20000, 1e-3, torch.float32)
    want = kl_row_stats("reference", logits.double(), ref_logits.double(), PLAIN)
    parts = []
    for start, stop in ((0, 9000), (9000, 9100), (9100, 20000)):
        here = PLAIN._replace(vocab_start=start, vocab_size=20000)
        cut = slice(start, stop)
        parts.append(kl_row_stats("triton", logits[:, cut], ref_logits[:, cut], here, shard=True))
    got = merge_kl_shards(parts).kl
    assert float(((got - want.kl) / want.kl).abs().max()) < 1e-3


def test_offsets_beyond_32_bits() -> None:
    """The last rows of tensors of more than 2^31 entries; the others are masked, so not read."""
    rows, vocab = (1 << 31) // 65536 + 2, 65536
    try:
        logits = torch.empty(rows, vocab, dtype=torch.bfloat16, device=DEVICE)
        ref_logits = torch.empty_like(logits)
    except torch.OutOfMemoryError:
        pytest.skip("needs 9 GB of device memory")
    last = pair(2, vocab, 0.5, torch.bfloat16)
    logits[-2:], ref_logits[-2:] = last[0], last[1]
    mask = torch.zeros(rows, dtype=torch.bool, device=DEVICE)
    mask[-2:] = True
    kl = kl_from_logits(logits, ref_logits, mask=mask)
    assert torch.equal(kl[-2:], kl_from_logits(*last[:2]))
    assert bool((kl[:-2] == 0).all())
