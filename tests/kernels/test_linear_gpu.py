"""The ops on hidden states and a vocabulary head on a device: fp64, bits, memory, no host sync."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_fast_kernels import linear_kl, linear_logprobs, linear_ppo_loss, reference
from rlhf_fast_kernels.linear_fused import fused_stats
from rlhf_fast_kernels.linear_head import Head
from rlhf_fast_kernels.logit_rows import RowSettings, RowStats, merge_shards, row_stats
from rlhf_fast_kernels.reference.linear import head_logits
from tests.kernels.linear_cases import (
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

DEVICE = "cuda"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PLAIN = RowSettings(None, 1.0, None)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@contextmanager
def no_synchronisation() -> Iterator[None]:
    """A call that makes the host wait for the device raises."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@contextmanager
def extra_memory_below(limit: int) -> Iterator[None]:
    """The peak above what is allocated now stays below `limit` bytes."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    yield
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before < limit


def on_device(
    tokens: int, width: int, vocab: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    hidden, weight, labels = head(tokens, width, vocab)
    return hidden.to(DEVICE, dtype), weight.to(DEVICE, dtype), labels.to(DEVICE)


def gradient_tolerance(dtype: torch.dtype) -> float:
    """Of the relative Frobenius error: D and the results are rounded to `dtype`."""
    return 1e-5 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps


# ---- the fused kernel ---------------------------------------------------------------------------


def exact(
    hidden: Tensor, weight: Tensor, labels: Tensor, settings: RowSettings, bias: Tensor | None
) -> RowStats:
    wide = None if bias is None else bias.double()
    logits = head_logits(hidden.double(), weight.double(), wide, None)
    return row_stats("reference", logits, labels, settings, with_entropy=True)


def agree(got: RowStats, want: RowStats, tolerance: float = 3e-6) -> None:
    for name in RowStats._fields:
        close(getattr(got, name), getattr(want, name), tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "width", "vocab"),
    [(1, 1, 1), (5, 72, 7), (9, 100, 4097), (130, 64, 8200), (257, 2048, 32003), (33, 896, 151936)],
)
def test_fused_sums_against_fp64(tokens, width, vocab, dtype):
    hidden, weight, labels = on_device(tokens, width, vocab, dtype)
    labels[0], labels[-1] = 0, vocab - 1
    agree(fused_stats(hidden, weight, labels, PLAIN), exact(hidden, weight, labels, PLAIN, None))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [64, 70])
def test_fused_options_rows_and_shards_against_fp64(width, dtype):
    hidden, weight, labels = on_device(300, width, 9000, dtype)
    bias = draw(9000, seed=5).to(DEVICE, dtype)
    rows = torch.randperm(300, device=DEVICE)[:140]
    labels = labels[rows] % 8990
    labels[::7] = -100
    temperature = draw(140, seed=6).abs().add(0.5).to(DEVICE)
    settings = RowSettings(temperature, 1.0, 20.0, vocab_size=8990)
    want = exact(hidden[rows], weight, labels, settings, bias)
    unread = torch.ones(300, dtype=torch.bool, device=DEVICE).index_fill_(0, rows, False)
    hidden[unread] = torch.nan
    weight[8990:] = torch.nan
    agree(fused_stats(hidden, weight, labels, settings, bias=bias, rows=rows), want)
    parts = []
    for start, stop in ((0, 4500), (4500, 9000)):
        own, piece = settings._replace(vocab_start=start), slice(start, stop)
        options: dict[str, Any] = {"bias": bias[piece], "shard": True, "rows": rows}
        parts.append(fused_stats(hidden, weight[piece], labels, own, **options))
    agree(merge_shards(parts, labels, settings), want)


@pytest.mark.parametrize("dtype", DTYPES)
def test_fused_bits_are_the_same_twice_and_alone(dtype):
    hidden, weight, labels = on_device(700, 128, 32003, dtype)
    together, again = (fused_stats(hidden, weight, labels, PLAIN) for _ in range(2))
    for first, second in zip(together, again, strict=True):
        assert torch.equal(first, second)
    for rows in (slice(0, 1), slice(17, 18), slice(450, 700)):
        alone = fused_stats(hidden[rows], weight, labels[rows], PLAIN)
        for first, single in zip(together, alone, strict=True):
            assert torch.equal(first[rows], single)


def test_fused_kernel_gives_nan_for_bad_labels_and_rows_without_waiting():
    hidden, weight, labels = on_device(6, 64, 5000, torch.bfloat16)
    labels[0], labels[1] = 5000, -1
    hidden[2] = torch.nan
    rows = torch.tensor([0, 1, 2, 6, -1, 3], device=DEVICE)
    fused_stats(hidden, weight, labels, PLAIN, rows=rows)  # compiles
    with no_synchronisation():
        got = fused_stats(hidden, weight, labels, PLAIN, rows=rows)
    assert got.logprobs.isnan().tolist() == [True] * 5 + [False]


def test_fused_offsets_beyond_31_bits():
    if torch.cuda.mem_get_info()[0] < 16 << 30:
        pytest.skip("needs 16 GB of device memory")
    few, weight, labels = on_device(2, 4096, 300, torch.bfloat16)
    want = fused_stats(few, weight, labels, PLAIN)
    hidden = torch.zeros(530_000, 4096, dtype=torch.bfloat16, device=DEVICE)
    hidden[-2:] = few
    rows = torch.tensor([529_998, 529_999], device=DEVICE)
    for a, b in zip(fused_stats(hidden, weight, labels, PLAIN, rows=rows), want, strict=True):
        assert torch.equal(a, b)
    # As a head: its last 300 rows are a shard's own.
    hidden[-300:] = weight
    shard = PLAIN._replace(vocab_start=0, vocab_size=530_000)
    whole = fused_stats(few, hidden, labels + 529_700, shard)
    zeros = torch.full((2,), 529_700.0, dtype=torch.float64, device=DEVICE).log()
    close(whole.lse, torch.logaddexp(want.lse, zeros), 3e-6)


def test_fused_kernel_in_a_cuda_graph():
    hidden, weight, labels = on_device(40, 64, 9000, torch.bfloat16)
    fused_stats(hidden, weight, labels, PLAIN)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        stats = fused_stats(hidden, weight, labels, PLAIN)
    hidden.mul_(0.5)
    graph.replay()
    for a, b in zip(stats, fused_stats(hidden, weight, labels, PLAIN), strict=True):
        assert torch.equal(a, b)


# ---- the head's products ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_products_of_the_head_are_fp32(dtype):
    hidden, weight, _ = on_device(70, 96, 1000, dtype)
    own = Head(weight, draw(1000, seed=3).to(DEVICE), dtype)
    assert own.mixed == (dtype != torch.float32)
    logits = torch.empty(70, 1000, device=DEVICE)
    own.logits(own.operand(hidden), logits)
    close(logits, hidden.double() @ weight.double().t() + own.bias.double(), 1e-6)
    d = draw(70, 1000, seed=4).to(DEVICE, own.gradient_dtype)
    got = own.hidden_gradient(d)
    assert relative(got, d.double() @ weight.double()) < gradient_tolerance(dtype)
    into = torch.full((1000, 96), torch.nan, device=DEVICE)
    own.add_weight_gradient(d, hidden, into, first=True)
    once = d.double().t() @ hidden.double()
    assert relative(into, once) < 1e-6
    own.add_weight_gradient(d, hidden, into, first=False)
    assert relative(into, 2 * once) < 1e-6


# ---- the ops against fp64 -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_logprobs_against_fp64(dtype):
    hidden, weight, labels = on_device(90, 128, 5003, dtype)
    labels[::4] = -100
    bias, upstream = draw(5003, seed=5).to(DEVICE), draw(2, 90, seed=6).to(DEVICE)
    options: dict[str, Any] = {"temperature": 0.8, "softcap": 15.0, "vocab_size": 5003}
    results = []
    for op, kind in ((linear_logprobs, None), (reference.linear_logprobs, torch.float64)):
        own = leaves(hidden, weight, bias, dtype=kind)
        more = {} if kind else {"chunk_rows": 32}
        values = op(*own[:2], labels, bias=own[2], **options, **more)
        (upstream[0] * values[0] + upstream[1] * values[1]).sum().backward()
        results.append((values, [x.grad for x in own]))
    (got, grads), (want, exact_grads) = results
    for ours, true in zip(got, want, strict=True):
        close(ours, true, 3e-6)
    for mine, true in zip(grads, exact_grads, strict=True):
        assert relative(mine, true) < gradient_tolerance(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_kl_against_fp64(dtype):
    hidden, weight, _ = on_device(90, 128, 5003, dtype)
    ref_hidden, ref_weight, _ = (x.to(DEVICE) for x in head(90, 64, 5003, seed=30))
    ref_hidden, ref_weight = ref_hidden.to(dtype), ref_weight.to(dtype)
    mask, upstream = torch.arange(90, device=DEVICE) % 3 != 1, draw(90, seed=7).to(DEVICE)
    results = []
    for op, kind in ((linear_kl, None), (reference.linear_kl, torch.float64)):
        own = leaves(hidden, weight, dtype=kind)
        ref = [x if kind is None else x.to(kind) for x in (ref_hidden, ref_weight)]
        kl = op(*own, *ref, mask=mask, temperature=0.8, **({} if kind else {"chunk_rows": 32}))
        (upstream * kl).sum().backward()
        results.append((kl, [x.grad for x in own]))
    (got, grads), (want, exact_grads) = results
    close(got, want, 3e-6)
    for mine, true in zip(grads, exact_grads, strict=True):
        assert relative(mine, true) < gradient_tolerance(dtype)


def ppo_problem(
    dtype: torch.dtype, tokens: int = 90
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor, dict[str, Any]]:
    inputs = on_device(tokens, 128, 5003, dtype)
    mask = torch.arange(tokens, device=DEVICE) % 4 != 1
    return inputs, mask, {k: v.to(DEVICE) for k, v in per_token(tokens, 5003).items()}


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_ppo_loss_against_fp64_and_into_a_buffer(dtype):
    (hidden, weight, labels), mask, tensors = ppo_problem(dtype)
    count = float(mask.sum())
    true = leaves(hidden, weight, dtype=torch.float64)
    loss, sums, _ = reference_loss(*true, labels, mask, {**doubles(tensors), "normalizer": count})
    loss.backward()
    options: dict[str, Any] = {"mask": mask, "normalizer": count, "chunk_rows": 32}
    options |= {**SETTINGS, **tensors}
    own = leaves(hidden, weight)
    out = linear_ppo_loss(*own, labels, **options)
    out.loss.backward()
    close(out.loss, loss, 1e-5)
    for name, value in out.metrics.items():
        close(value, sums[name], 5e-5)
    for mine, exact_leaf in zip(own, true, strict=True):
        assert relative(mine.grad, exact_leaf.grad) < gradient_tolerance(dtype)
    buffer = torch.ones(weight.shape, device=DEVICE)
    other = leaves(hidden, weight)
    linear_ppo_loss(*other, labels, weight_out=buffer, **options).loss.backward()
    assert other[1].grad is None
    assert torch.equal(other[0].grad, own[0].grad)
    # Not rounded to the weight's dtype, as the gradient above was; 1 takes digits of fp32.
    close(
        buffer, 1 + true[1].grad, 2e-7 + gradient_tolerance(dtype) * float(true[1].grad.abs().max())
    )


# ---- what a device costs ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_op_waits_for_the_device_when_rows_are_given(dtype):
    (hidden, weight, labels), mask, tensors = ppo_problem(dtype)
    rows = mask.nonzero().squeeze(1)
    ref = [hidden.clone(), weight.clone()]
    options: dict[str, Any] = {"rows": rows, "normalizer": 60.0, **SETTINGS, **tensors}

    def everything() -> None:
        own = leaves(hidden, weight)
        logprobs, entropy = linear_logprobs(*own, labels, rows=rows)
        kl = linear_kl(*own, *ref, rows=rows)
        loss = linear_ppo_loss(*own, labels, **options).loss
        (logprobs.sum() + entropy.sum() + kl.sum() + loss).backward()

    everything()  # compiles
    with no_synchronisation():
        everything()


def test_memory_does_not_grow_with_tokens_times_vocabulary():
    tokens, width, vocab = 16384, 256, 65536
    hidden, weight, labels = on_device(tokens, width, vocab, torch.bfloat16)
    rows = torch.arange(tokens, device=DEVICE)
    all_logits = tokens * vocab * 4
    fused_stats(hidden, weight, labels, PLAIN)  # compiles, and cuBLAS takes its workspace
    with extra_memory_below(all_logits // 256):
        fused_stats(hidden, weight, labels, PLAIN)
    own = leaves(hidden, weight)
    linear_logprobs(*own, labels, rows=rows, chunk_rows=256)[0].sum().backward()
    chunk, gradients = 256 * vocab * 8, 3 * 4 * weight.numel() + 8 * hidden.numel()
    with extra_memory_below(chunk + gradients + (64 << 20)):
        logprobs, _ = linear_logprobs(*own, labels, rows=rows, chunk_rows=256)
        logprobs.sum().backward()
    tensors = {k: v.to(DEVICE) for k, v in per_token(tokens, vocab).items()}
    options: dict[str, Any] = {"rows": rows, "normalizer": 1.0, **SETTINGS, **tensors}
    with extra_memory_below(chunk + gradients + (64 << 20)):
        linear_ppo_loss(*own, labels, chunk_rows=256, **options).loss.backward()
    assert chunk + gradients + (64 << 20) < all_logits // 8
