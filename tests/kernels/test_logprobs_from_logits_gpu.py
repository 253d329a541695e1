"""The Triton kernels of logprobs_from_logits on a device: fp64, layouts, bits, no host sync."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from rlhf_fast_kernels import dispatch, logprobs_from_logits
from rlhf_fast_kernels.logit_rows import RowSettings, row_gradient, row_stats
from tests.kernels.logprob_cases import draw, draw_labels, eager, truth, worst

DEVICE = "cuda"

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@contextmanager
def no_synchronisation() -> Iterator[None]:
    """A call that makes the host wait for the device raises."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def special_rows(vocab: int) -> torch.Tensor:
    """Gaussian, all at -200, peaked, huge, rising."""
    rows = draw((5, vocab))
    rows[1] -= 200.0
    rows[2, vocab // 2] += 90.0
    rows[3] *= 30.0
    rows[4] = torch.linspace(-300.0, 300.0, vocab)
    return rows


def run(
    logits: torch.Tensor, labels: torch.Tensor, upstream: torch.Tensor, **options: Any
) -> tuple[torch.Tensor, ...]:
    leaf = logits.detach().requires_grad_()
    options.setdefault("impl", "triton")
    logprobs, entropy = logprobs_from_logits(leaf, labels, **options)
    assert entropy is not None
    (grad,) = torch.autograd.grad([logprobs, entropy], leaf, list(upstream.to(logprobs)))
    return logprobs.detach(), entropy.detach(), grad


def test_triton_is_what_a_gpu_uses() -> None:
    choice = dispatch.choose("logprobs_from_logits", None, torch.empty(1, device=DEVICE))
    assert choice.impl == "triton"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [1, 7, 300, 32003, 50257, 128256, 151935, 151936, 151937])
def test_error_against_fp64_is_at_most_that_of_eager(vocab: int, dtype: torch.dtype) -> None:
    logits = special_rows(vocab).to(DEVICE, dtype)
    labels, upstream = draw_labels((5,), vocab).to(DEVICE), draw((2, 5), seed=2).to(DEVICE)
    exact = logits.double().requires_grad_()
    want = truth(exact, labels)
    (want_grad,) = torch.autograd.grad(want, exact, list(upstream.double()))
    leaf = logits.detach().requires_grad_()
    theirs = eager(leaf, labels)
    (their_grad,) = torch.autograd.grad(theirs, leaf, list(upstream))
    *got, grad = run(logits, labels, upstream)
    for ours, true, baseline in zip(got, want, theirs, strict=True):
        error = (ours.double() - true).abs()
        allowed = (baseline.double() - true).abs() + 2e-6 + 2e-7 * true.abs()
        assert bool((error <= allowed.nan_to_num(1e-5)).all()), (error, allowed)
    step = torch.finfo(dtype).eps / 2 * float(want_grad.abs().max())
    assert worst(grad, want_grad) <= worst(their_grad, want_grad) + step + 1e-6


@pytest.mark.parametrize("dtype", DTYPES)
def test_all_options_together_match_fp64(dtype: torch.dtype) -> None:
    base = draw((6, 9, 5000), scale=10.0).to(DEVICE, dtype)
    logits = base.transpose(0, 1)[:, :-1]
    rows = torch.tensor([44, 3, 17, 8], device=DEVICE)
    labels = torch.tensor([4989, 0, -100, 77], device=DEVICE)
    options: dict[str, Any] = {
        "rows": rows,
        "temperature": torch.tensor([0.5, 0.8, 1.0, 2.0], device=DEVICE),
        "softcap": 30.0,
        "vocab_size": 4990,
    }
    upstream = draw((2, 4), seed=3).to(DEVICE)
    want = run(logits.double(), labels, upstream, impl="reference", **options)
    base[:, :, 4990:] = torch.nan
    got = run(logits, labels, upstream, **options)
    for ours, true in zip(got[:2], want[:2], strict=True):
        assert worst(ours, true) < 5e-6
    size = float(want[2].abs().max())
    assert worst(got[2], want[2]) < 3e-6 + (1e-5 + torch.finfo(dtype).eps) * size


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [32003, 151936])
def test_bits_are_the_same_twice_and_alone(dtype: torch.dtype, vocab: int) -> None:
    logits = draw((64, vocab)).to(DEVICE, dtype)
    labels, upstream = draw_labels((64,), vocab).to(DEVICE), draw((2, 64), seed=4).to(DEVICE)
    together, again = run(logits, labels, upstream), run(logits, labels, upstream)
    for first, second in zip(together, again, strict=True):
        assert torch.equal(first, second)
    for row in (0, 17, 63):
        one = slice(row, row + 1)
        alone = run(logits[one], labels[one], upstream[:, one])
        for first, single in zip(together, alone, strict=True):
            assert torch.equal(first[one], single)


def test_rows_that_hold_no_distribution() -> None:
    logits = draw((6, 20000)).to(DEVICE)
    logits[0, 9000] = torch.nan
    logits[1, 9000] = torch.inf
    logits[2] = -torch.inf
    logits[3, :9000] = -torch.inf
    logits[4] = torch.nan
    labels = torch.tensor([0, 0, 0, 5, -100, 19999], device=DEVICE)
    logprobs, entropy, grad = run(logits, labels, torch.ones(2, 6, device=DEVICE))
    assert logprobs[:3].isnan().all()
    assert entropy[:3].isnan().all()
    assert float(logprobs[3]) == -torch.inf
    assert float(logprobs[4]) == float(entropy[4]) == 0.0
    assert bool((grad[4] == 0).all())
    assert bool(torch.isfinite(logprobs[5]))
    logits[3, 5] = 0.0
    _, _, grad = run(logits[3:4], labels[3:4], torch.ones(2, 1, device=DEVICE))
    assert bool(torch.isfinite(grad).all())
    assert bool((grad[0, 6:9000] == 0).all())


def test_bad_labels_and_rows_give_nan_without_waiting_for_the_device() -> None:
    logits = draw((5, 9000)).to(DEVICE)
    labels = torch.tensor([9000, -1, 3, 4], device=DEVICE)
    rows = torch.tensor([0, 1, 5, 3], device=DEVICE)
    upstream = torch.ones(2, 4, device=DEVICE)
    run(logits, labels, upstream, rows=rows)  # compiles
    torch.cuda.synchronize()
    with no_synchronisation():
        logprobs, _, grad = run(logits, labels, upstream, rows=rows)
    assert logprobs.isnan().tolist() == [True, True, True, False]
    assert grad.isnan().all(-1).tolist() == [True, True, False, False, False]
    assert bool((grad[[2, 4]] == 0).all())


def test_offsets_beyond_31_bits() -> None:
    vocab, count = 151936, 14140
    if torch.cuda.mem_get_info()[0] < 12 << 30:
        pytest.skip("needs 12 GB of device memory")
    few = draw((2, vocab)).to(DEVICE, torch.bfloat16)
    large = torch.zeros(count, vocab, dtype=torch.bfloat16, device=DEVICE)
    large[-2:] = few
    labels = torch.tensor([151935, 3], device=DEVICE)
    upstream = torch.ones(2, 2, device=DEVICE)
    rows = torch.tensor([count - 2, count - 1], device=DEVICE)
    want = run(few, labels, upstream)
    got = run(large, labels, upstream, rows=rows)
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])
    assert torch.equal(got[2][-2:], want[2])
    assert int(torch.count_nonzero(got[2][:-2])) == 0


@pytest.mark.parametrize("target", DTYPES)
def test_gradient_in_place_and_into_another_dtype(target: torch.dtype) -> None:
    logits, labels = draw((4, 20001)).to(DEVICE), draw_labels((4,), 20001).to(DEVICE)
    settings = RowSettings(None, 0.7, 20.0)
    stats = row_stats("triton", logits, labels, settings, with_entropy=True)
    ones = torch.ones(4, device=DEVICE)
    want = torch.empty_like(logits)
    row_gradient("reference", logits, labels, settings, stats, ones, ones, want)
    out = torch.empty_like(logits, dtype=target)
    row_gradient("triton", logits, labels, settings, stats, ones, ones, out)
    assert worst(out, want) < 5e-6 + torch.finfo(target).eps * float(want.abs().max())
    if target == logits.dtype:
        row_gradient("triton", logits, labels, settings, stats, ones, ones, logits)
        assert torch.equal(logits, out)


def test_torch_compile_without_graph_break() -> None:
    def loss(x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        logprobs, entropy = logprobs_from_logits(x, labels, temperature=0.9)
        assert entropy is not None
        return (logprobs * 2.0 + entropy).sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=True)
    for count in (3, 5):
        logits, labels = draw((count, 9000)).to(DEVICE), draw_labels((count,), 9000).to(DEVICE)
        grads = []
        for function in (loss, compiled):
            leaf = logits.clone().requires_grad_()
            grads.append(torch.autograd.grad(function(leaf, labels), leaf)[0])
        assert torch.equal(*grads)


def test_cuda_graph_replays_on_new_logits() -> None:
    logits, labels = draw((4, 9000)).to(DEVICE), draw_labels((4,), 9000).to(DEVICE)
    logprobs_from_logits(logits, labels, impl="triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logprobs, _ = logprobs_from_logits(logits, labels, impl="triton")
    logits.copy_(draw((4, 9000), seed=9))
    graph.replay()
    assert torch.equal(logprobs, logprobs_from_logits(logits, labels, impl="triton")[0])
