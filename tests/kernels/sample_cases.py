"""Inputs and the truth for the tests of `sample`: scalar Philox, filters by sorting, chi-square."""

from __future__ import annotations

import math

import pytest
import torch

from rlhf_fast_kernels import SampleOutput, native, sample, triton_support

IMPLS = ["reference"]
if native.missing("sample") is None:
    IMPLS.append("cpu")
FAST = IMPLS[-1]
EVERY = [*IMPLS]
if triton_support.on_triton(torch.device("cpu")) is None:
    EVERY.append("triton")
needs_cpu = pytest.mark.skipif(FAST != "cpu", reason="the compiled module is missing")

WORD = 0xFFFFFFFF
SETTINGS: dict[str, dict[str, float | int]] = {
    "plain": {},
    "warm": {"temperature": 1.7},
    "greedy": {"temperature": 0.0},
    "top_k": {"top_k": 5},
    "top_p": {"top_p": 0.8},
    "min_p": {"min_p": 0.1},
    "all": {"temperature": 0.7, "top_k": 50, "top_p": 0.9, "min_p": 0.02},
}


def draw(shape: tuple[int, ...], seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def draw_seeds(rows: int, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(2**63), 2**63 - 1, (rows,), generator=generator)


def philox(counter: list[int], key: list[int]) -> list[int]:
    """As in the paper, on Python's integers."""
    c, k = list(counter), list(key)
    for _ in range(10):
        first, second = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [second >> 32 ^ c[1] ^ k[0], second & WORD, first >> 32 ^ c[3] ^ k[1], first & WORD]
        k = [(k[0] + 0x9E3779B9) & WORD, (k[1] + 0xBB67AE85) & WORD]
    return c


def exponential(seed: int, step: int, token: int) -> float:
    """What the documentation of `sample` says of (seed, step, token id)."""
    counter = [1024 * (token // 4096) + token % 1024, step & WORD, step >> 32 & WORD, 0]
    word = philox(counter, [seed & WORD, seed >> 32 & WORD])[token // 1024 % 4]
    return -math.log1p(-(word + 0.5) / 2**32)


def distribution(
    row: torch.Tensor,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> list[float]:
    """The probabilities to draw from, by sorting and adding Python's floats."""
    x = row.double().tolist()
    order = sorted(range(len(x)), key=lambda i: (-x[i], i))
    mass = [math.exp((v - x[order[0]]) / temperature) for v in x]
    if top_k > 0:
        order = order[:top_k]
    total, before, kept = math.fsum(mass[i] for i in order), 0.0, []
    for i in order:
        if before < top_p * total or not kept:
            kept.append(i)
        before += mass[i]
    kept = [i for i in kept if mass[i] >= min_p]
    total = math.fsum(mass[i] for i in kept)
    return [mass[i] / total if i in set(kept) else 0.0 for i in range(len(x))]


def many(row: torch.Tensor, draws: int, impl: str | None = None, **options: object) -> SampleOutput:
    """Draws from one row with the seeds 0, 1, 2, ..."""
    options = {"step": 0, "seeds": torch.arange(draws), **options}
    return sample(row.expand(draws, -1), impl=impl or FAST, **options)  # type: ignore[arg-type]


def chi_square_p_value(counts: torch.Tensor, probabilities: torch.Tensor) -> float:
    """Pearson's test; cells that expect fewer than 10 are one."""
    expected = probabilities.double() * counts.sum()
    counts = counts.double()
    rare = expected < 10
    if rare.any():
        expected = torch.cat([expected[~rare], expected[rare].sum().unsqueeze(0)])
        counts = torch.cat([counts[~rare], counts[rare].sum().unsqueeze(0)])
    assert not counts[expected == 0].any()
    counts, expected = counts[expected > 0], expected[expected > 0]
    statistic = ((counts - expected).square() / expected).sum()
    freedom = torch.tensor((len(expected) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom, statistic / 2))


def assert_same(got: SampleOutput, want: SampleOutput, tolerance: float = 2e-5) -> None:
    assert torch.equal(got.tokens, want.tokens)
    for x, y in zip(got[1:], want[1:], strict=True):
        torch.testing.assert_close(x.double(), y.double(), rtol=0, atol=tolerance, equal_nan=True)
