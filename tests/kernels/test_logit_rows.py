"""Rows of logits as the linear ops use them: settings, shards, gradients into another tensor."""

from __future__ import annotations

import itertools

import pytest
import torch

from rlhf_fast_kernels.logit_rows import (
    RowSettings,
    RowStats,
    merge_shards,
    row_gradient,
    row_stats,
)
from tests.kernels.logprob_cases import DTYPES, IMPLS, draw, draw_labels, worst

PLAIN = RowSettings(None, 1.0, None)
ROWS, WIDTH = 5, 700
SETTINGS = {
    "plain": PLAIN,
    "scale": PLAIN._replace(scale=0.7),
    "temperature": PLAIN._replace(temperature=torch.tensor([0.5, 0.7, 1.0, 1.3, 2.0])),
    "softcap": PLAIN._replace(softcap=4.0, scale=1.3),
    "padded": PLAIN._replace(vocab_size=650),
    "all": RowSettings(torch.full((5,), 0.6), 1.0, 9.0, ignore_index=-1, vocab_size=651),
}


def truth(
    logits: torch.Tensor, labels: torch.Tensor, settings: RowSettings, upstream: torch.Tensor
) -> tuple[RowStats, torch.Tensor]:
    """By the definition, in fp64, differentiated by autograd."""
    leaf = logits.detach().double().requires_grad_()
    z = leaf[..., : settings.vocab_size]
    if settings.softcap is not None:
        z = settings.softcap * torch.tanh(z / settings.softcap)
    if settings.temperature is None:
        z = z / settings.scale
    else:
        z = z / settings.temperature.double().unsqueeze(-1)
    log_p = z - torch.logsumexp(z, -1, keepdim=True)
    kept = labels != settings.ignore_index
    logprobs = log_p.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    loss = (upstream[0] * logprobs + upstream[1] * entropy)[kept].sum()
    (grad,) = torch.autograd.grad(loss, leaf)
    zero = torch.zeros_like(logprobs)
    parts = (logprobs, entropy, torch.logsumexp(z, -1))
    return RowStats(*(torch.where(kept, x, zero).detach() for x in parts)), grad


def case(
    name: str, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor, RowSettings, torch.Tensor]:
    settings = SETTINGS[name]
    logits = draw((ROWS, WIDTH)).to(dtype)
    labels = draw_labels((ROWS,), settings.labels_end(WIDTH))
    labels[1] = settings.labels_end(WIDTH) - 1
    labels[3] = settings.ignore_index
    return logits, labels, settings, draw((2, ROWS), seed=3)


def gradient(
    impl: str,
    logits: torch.Tensor,
    labels: torch.Tensor,
    settings: RowSettings,
    upstream: torch.Tensor,
    out: torch.Tensor,
) -> torch.Tensor:
    stats = row_stats(impl, logits, labels, settings, with_entropy=True)
    row_gradient(impl, logits, labels, settings, stats, upstream[0], upstream[1], out)
    return out


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SETTINGS)
def test_statistics_and_gradient_match_fp64(name: str, dtype: torch.dtype, impl: str) -> None:
    logits, labels, settings, upstream = case(name, dtype)
    if settings.vocab_size is not None:
        logits[:, settings.vocab_size :] = torch.nan
    want, want_grad = truth(logits, labels, settings, upstream)
    stats = row_stats(impl, logits, labels, settings, with_entropy=True)
    for ours, exact in zip(stats, want, strict=True):
        assert ours is not None
        assert worst(ours, exact) < 5e-6
    out = torch.full_like(logits, torch.nan)
    gradient(impl, logits, labels, settings, upstream, out)
    step = torch.finfo(dtype).eps * float(want_grad.abs().max())
    assert worst(out, want_grad) < 5e-6 + step
    assert bool((out[3] == 0).all())
    assert bool((out[:, settings.columns(WIDTH) :] == 0).all())
    alone = row_stats(impl, logits, labels, settings, with_entropy=False)
    assert alone.entropy is None
    assert torch.equal(alone.logprobs, stats.logprobs)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("source", DTYPES)
@pytest.mark.parametrize("target", DTYPES)
def test_gradient_into_another_dtype_layout_or_the_logits(
    source: torch.dtype, target: torch.dtype, impl: str
) -> None:
    logits, labels, settings, upstream = case("softcap", source)
    _, want = truth(logits, labels, settings, upstream)
    tolerance = 2e-6 + torch.finfo(target).eps * float(want.abs().max())
    dense = gradient(
        impl, logits, labels, settings, upstream, torch.empty(ROWS, WIDTH, dtype=target)
    )
    assert worst(dense, want) < tolerance
    wide = torch.full((2 * ROWS, WIDTH + 9), 7.0, dtype=target)
    out = gradient(impl, logits, labels, settings, upstream, wide[::2, 4:-5])
    assert torch.equal(out, dense)
    wide[::2, 4:-5] = 7.0
    assert bool((wide == 7.0).all())
    strided = gradient(
        impl, logits, labels, settings, upstream, torch.empty(WIDTH, ROWS, dtype=target).t()
    )
    assert torch.equal(strided, dense)
    if source == target:
        over = logits.clone()
        assert torch.equal(gradient(impl, over, labels, settings, upstream, over), dense)


@pytest.mark.parametrize("impl", IMPLS)
def test_shards_merge_to_the_whole(impl: str) -> None:
    """Unequal shards, one beyond the vocabulary, one that is all -inf for a row."""
    edges = [0, 1, 300, 640, 690, 700]
    logits, labels, settings, upstream = case("all")
    logits[0, 1:300] = -torch.inf
    logits[4, :] = -torch.inf
    settings = settings._replace(vocab_size=680, softcap=None)
    labels = torch.tensor([0, 679, 299, -1, 5])
    whole = row_stats(impl, logits, labels, settings, with_entropy=True)
    parts, shards = [], []
    for begin, end in itertools.pairwise(edges):
        shard = settings._replace(vocab_start=begin)
        columns = logits[:, begin:end]
        parts.append(row_stats(impl, columns, labels, shard, with_entropy=True, shard=True))
        shards.append((columns, shard))
    merged = merge_shards(parts, labels, settings)
    assert bool(merged.logprobs[4].isnan())
    assert merged.entropy is not None
    assert bool(merged.entropy[4].isnan())
    for ours, want in zip(merged, whole, strict=True):
        assert ours is not None
        assert want is not None
        assert ours.dtype == want.dtype
        assert worst(ours[:4], want[:4]) < 3e-6
    assert [float(x[3]) for x in merged] == [0.0, 0.0, 0.0]  # type: ignore[index]
    again = merge_shards(parts, labels, settings)
    assert torch.equal(again.logprobs[:4], merged.logprobs[:4])
    g, h = upstream
    want_grad = torch.empty_like(logits)
    row_gradient(impl, logits, labels, settings, whole, g, h, want_grad)
    grads = []
    for columns, shard in shards:
        out = torch.empty_like(columns)
        row_gradient(impl, columns, labels, shard, merged, g, h, out)
        grads.append(out)
    assert worst(torch.cat(grads, dim=-1)[:4], want_grad[:4]) < 2e-6


@pytest.mark.parametrize("impl", IMPLS)
def test_a_label_outside_the_vocabulary_gives_nan_even_in_a_shard(impl: str) -> None:
    """An id of a padded column, a negative one, one that only the other shard holds."""
    logits = draw((4, 300))
    labels = torch.tensor([590, -7, 10, 400])
    settings = PLAIN._replace(vocab_start=300, vocab_size=580)
    part = row_stats(impl, logits, labels, settings, with_entropy=True, shard=True)
    assert part.logprobs.isnan().tolist() == [True, True, False, False]
    assert float(part.logprobs[2]) == 0.0
    assert float(part.logprobs[3]) == pytest.approx(float(logits[3, 100]), abs=1e-6)
    ones, out = torch.ones(4), torch.empty_like(logits)
    row_gradient(impl, logits, labels, settings, part, ones, None, out)
    assert out[:, :280].isnan().all(-1).tolist() == [True, True, False, False]
    assert bool((out[2:, 280:] == 0).all())


@pytest.mark.parametrize("impl", IMPLS)
def test_no_upstream_gradient_is_no_gradient(impl: str) -> None:
    """Whatever the row holds: a masked token's logits may be NaN."""
    logits, labels, settings, upstream = case("plain")
    upstream[:, 2] = 0.0
    logits[2] = torch.nan
    out = gradient(impl, logits, labels, settings, upstream, torch.empty_like(logits))
    assert bool((out[2] == 0).all())
    stats = row_stats(impl, logits, labels, settings, with_entropy=True)
    row_gradient(impl, logits, labels, settings, stats, None, None, out)
    assert bool((out == 0).all())


@pytest.mark.skipif("triton" not in IMPLS, reason="the others refuse such rows beforehand")
def test_a_row_that_does_not_exist_gives_nan_and_is_not_read() -> None:
    logits, rows = draw((3, 300)), torch.tensor([0, 3, -1])
    stats = row_stats(
        "triton", logits, torch.tensor([1, 2, 3]), PLAIN, with_entropy=True, rows=rows
    )
    assert stats.entropy is not None
    for result in (stats.logprobs, stats.entropy):
        assert result.isnan().tolist() == [False, True, True]
