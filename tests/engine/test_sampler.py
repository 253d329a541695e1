"""Draws: distribution, warps against transformers', independence of the batch, bad rows."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from rlhf_fast.engine import sampler
from rlhf_fast.engine.sampler import (
    INVALID_TOKEN,
    Draw,
    counter_uniform,
    inverse_cdf,
    top_k_mask,
    top_p_mask,
    validate_sampling,
    warp_logits,
)
from rlhf_fast.errors import GenerationError
from rlhf_fast.types import SamplingParams

MASK64 = (1 << 64) - 1


def _mix_in_python(x: int) -> int:
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK64
    return x ^ (x >> 31)


def sample(
    logits: torch.Tensor, seeds: torch.Tensor, steps: torch.Tensor | int, sampling: SamplingParams
) -> Draw:
    return sampler.sample(logits, counter_uniform(seeds, steps), sampling)


def _logits(rows: int, vocab: int, seed: int = 0) -> torch.Tensor:
    return 3 * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed))


@given(st.integers(-(2**63), 2**63 - 1), st.integers(0, 2**40))
@settings(max_examples=200, deadline=None)
def test_uniform_equals_unbounded_integer_arithmetic(seed: int, step: int) -> None:
    golden = 0x9E3779B97F4A7C15
    state = (_mix_in_python((seed + golden) & MASK64) + (step + 1) * golden) & MASK64
    expected = ((_mix_in_python(state) >> 14) + 0.5) / 2**50
    got = counter_uniform(torch.tensor([seed]), step)
    assert got.item() == expected
    assert 0.0 < got.item() < 1.0


def test_uniforms_are_flat_and_uncorrelated_along_seeds_and_steps() -> None:
    seeds = torch.arange(400)
    u = torch.stack([counter_uniform(seeds, t) for t in range(250)])  # consecutive keys: worst case
    counts = torch.histc(u.flatten().float(), bins=100, min=0, max=1)
    expected = u.numel() / 100
    chi2 = float(((counts - expected) ** 2 / expected).sum())
    assert 50 < chi2 < 165  # 99 degrees of freedom: mean 99, sd 14
    centred = u - 0.5
    for product in (centred[1:] * centred[:-1], centred[:, 1:] * centred[:, :-1]):
        assert abs(float(product.mean())) * 12 < 4 / math.sqrt(product.numel())


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParams(1),
        SamplingParams(1, temperature=0.5),
        SamplingParams(1, temperature=1.7, top_k=4),
        SamplingParams(1, top_p=0.8),
        SamplingParams(1, min_p=0.1),
        SamplingParams(1, temperature=0.9, top_k=6, top_p=0.9, min_p=0.05),
    ],
)
def test_draws_follow_the_warped_distribution(sampling: SamplingParams) -> None:
    n = 40_000
    logits = _logits(1, 12).expand(n, -1)
    draw = sample(logits, torch.arange(n), 3, sampling)
    probs = torch.softmax(
        warp_logits(logits[:1].double() / sampling.temperature, sampling), -1
    ).squeeze(0)
    counts = torch.bincount(draw.tokens, minlength=12).double()
    assert counts[probs == 0].sum() == 0
    live = probs > 1e-4
    chi2 = float(((counts - n * probs) ** 2 / (n * probs))[live].sum())
    assert chi2 < 12 + 6 * math.sqrt(2 * 12)
    torch.testing.assert_close(
        draw.logprobs.double(), probs.log()[draw.tokens], atol=2e-6, rtol=1e-6
    )
    raw = torch.log_softmax(logits[0].double() / sampling.temperature, -1)
    torch.testing.assert_close(draw.raw_logprobs.double(), raw[draw.tokens], atol=2e-6, rtol=1e-6)


def test_a_row_does_not_depend_on_its_batch() -> None:
    logits, seeds = _logits(64, 501), torch.arange(64) * 7919
    for sampling in (SamplingParams(1), SamplingParams(1, temperature=0.7, top_k=40, top_p=0.9)):
        together = sample(logits, seeds, 5, sampling)
        order = torch.randperm(64, generator=torch.Generator().manual_seed(1))
        shuffled = sample(logits[order], seeds[order], torch.full((64,), 5), sampling)
        for whole, permuted in zip(together, shuffled, strict=True):
            assert torch.equal(whole[order], permuted)
        for row in (0, 17, 63):
            alone = sample(logits[row : row + 1], seeds[row : row + 1], 5, sampling)
            assert alone.tokens.item() == together.tokens[row].item()
            assert alone.raw_logprobs.item() == together.raw_logprobs[row].item()


def test_seed_and_step_change_the_draw() -> None:
    logits = torch.zeros(2000, 50)
    base = sample(logits, torch.arange(2000), 0, SamplingParams(1)).tokens
    for other in (
        sample(logits, torch.arange(2000), 1, SamplingParams(1)).tokens,
        sample(logits, torch.arange(2000) + 2000, 0, SamplingParams(1)).tokens,
    ):
        assert abs(float((base == other).float().mean()) - 1 / 50) < 0.015


@pytest.mark.parametrize("k", [1, 3, 49, 50])
def test_top_k_equals_transformers(k: int) -> None:
    logits = _logits(20, 50)
    expected = TopKLogitsWarper(k)(None, logits.clone()).isfinite()
    assert torch.equal(top_k_mask(logits, k), expected)


@pytest.mark.parametrize("p", [0.01, 0.3, 0.9, 0.999])
def test_top_p_equals_transformers(p: float) -> None:
    logits = _logits(20, 50)
    expected = TopPLogitsWarper(p)(None, logits.clone()).isfinite()
    assert torch.equal(top_p_mask(logits, p), expected)


def test_warps_compose_in_the_order_of_transformers() -> None:
    logits = _logits(50, 80, seed=4)
    sampling = SamplingParams(1, top_k=20, top_p=0.85, min_p=0.03)
    expected = logits.clone()
    for warper in (TopKLogitsWarper(20), TopPLogitsWarper(0.85), MinPLogitsWarper(0.03)):
        expected = warper(None, expected)
    assert torch.equal(warp_logits(logits, sampling), expected)


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParams(1, temperature=0.0),
        SamplingParams(1, top_k=1),
        SamplingParams(1, top_p=0.0),
        SamplingParams(1, temperature=1e-30),
    ],
)
def test_greedy_settings_take_the_best_token_and_ties_take_the_lower_id(
    sampling: SamplingParams,
) -> None:
    logits = _logits(100, 30)
    draw = sample(logits, torch.arange(100), 0, sampling)
    assert torch.equal(draw.tokens, logits.argmax(-1))
    assert torch.equal(draw.logprobs, torch.zeros(100))
    if sampling.temperature != 1e-30:
        tied = torch.tensor([[0.0, 2.0, 2.0, 2.0, 1.0]])
        for seed in range(20):
            assert sample(tied, torch.tensor([seed]), 0, sampling).tokens.item() == 1


def test_temperature_zero_reports_raw_logprobs_of_plain_softmax() -> None:
    logits = _logits(10, 30)
    draw = sample(logits, torch.arange(10), 0, SamplingParams(1, temperature=0.0))
    expected = torch.log_softmax(logits, -1).gather(-1, draw.tokens[:, None]).squeeze(-1)
    torch.testing.assert_close(draw.raw_logprobs, expected)


def test_top_k_above_the_vocabulary_keeps_everything() -> None:
    logits, seeds = _logits(50, 10), torch.arange(50)
    assert torch.equal(
        sample(logits, seeds, 0, SamplingParams(1, top_k=1000)).tokens,
        sample(logits, seeds, 0, SamplingParams(1)).tokens,
    )


def test_zero_probability_is_never_drawn_even_at_the_ends_of_the_unit_interval() -> None:
    probs = torch.tensor([[0.0, 0.0, 0.3, 0.0, 0.7, 0.0, 0.0]])
    cases = {0.0: 2, 1e-300: 2, 0.3 - 1e-9: 2, 0.3 + 1e-7: 4, 1.0 - 2**-51: 4, 1.0: 4}
    for u, expected in cases.items():
        uniform = torch.tensor([u], dtype=torch.float64)
        assert inverse_cdf(probs, uniform, probs.argmax(-1)).item() == expected


@given(
    st.lists(st.sampled_from([-math.inf, -50.0, 0.0, 1.0, 80.0]), min_size=2, max_size=12),
    st.integers(0, 2**62),
    st.sampled_from([(0, 1.0), (2, 1.0), (0, 0.5), (0, 0.0)]),
)
@settings(max_examples=150, deadline=None)
def test_masked_tokens_are_never_drawn(
    row: list[float], seed: int, warp: tuple[int, float]
) -> None:
    draw = sample(
        torch.tensor([row]), torch.tensor([seed]), 0,
        SamplingParams(1, top_k=warp[0], top_p=warp[1]),
    )  # fmt: skip
    if all(x == -math.inf for x in row):
        assert draw.tokens.item() == INVALID_TOKEN
    else:
        assert row[draw.tokens.item()] > -math.inf
        assert draw.raw_logprobs.isfinite().all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_unusable_rows_are_flagged_and_leave_their_neighbours_alone(
    bad: float, temperature: float
) -> None:
    logits = _logits(3, 20)
    sampling = SamplingParams(1, temperature=temperature)
    good = sample(logits, torch.arange(3), 0, sampling)
    logits[1, 7] = bad
    draw = sample(logits, torch.arange(3), 0, sampling)
    assert draw.tokens.tolist() == [good.tokens[0].item(), INVALID_TOKEN, good.tokens[2].item()]
    assert draw.raw_logprobs[1].isnan()
    assert draw.logprobs[1].isnan()


def test_validation_lists_every_violation() -> None:
    bad = SamplingParams(
        0, temperature=-1.0, top_k=-2, top_p=1.5, min_p=math.nan,
        stop_token_ids=(3, 99), stop_strings=("",),
    )  # fmt: skip
    with pytest.raises(GenerationError) as caught:
        validate_sampling(bad, vocab_size=50)
    assert caught.value.code == "RF4001"
    for word in (
        "max_new_tokens=0", "temperature=-1.0", "top_k=-2", "top_p=1.5", "min_p=nan",
        "[99]", "stop_strings",
    ):  # fmt: skip
        assert word in str(caught.value)
    validate_sampling(SamplingParams(1, temperature=0.0, top_p=0.0, top_k=10**9), 50)
