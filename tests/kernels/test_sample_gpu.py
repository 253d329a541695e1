"""The Triton kernels of `sample` on a device: parity, bits, statistics, CUDA graphs."""

from __future__ import annotations

import math

import pytest
import torch

from rlhf_fast_kernels import SampleOutput, sample
from rlhf_fast_kernels.reference.sample import exponentials
from tests.kernels.sample_cases import (
    SETTINGS,
    chi_square_p_value,
    distribution,
    draw,
    draw_seeds,
    many,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def near_tie(logits: torch.Tensor, seeds: torch.Tensor, step: int, temperature: float) -> bool:
    """Whether the first two of a race are as close as the device's fp32 rounds."""
    steps = torch.full_like(seeds, step)
    race = logits.double() / temperature - exponentials(seeds, steps, logits.shape[-1]).log()
    first, second = race.topk(2, -1).values.unbind(-1)
    return bool((first - second).min() < 1e-4)


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [1, 7, 300, 8192, 8193, 32003, 151936])
def test_it_equals_the_reference(vocab: int, dtype: torch.dtype, name: str) -> None:
    logits, seeds = draw((6, vocab), seed=vocab).to(dtype).cuda(), draw_seeds(6).cuda()
    options = {"seeds": seeds, "step": 11, **SETTINGS[name]}
    got = sample(logits, impl="triton", **options)
    want = sample(logits, impl="reference", **options)
    if not torch.equal(got.tokens, want.tokens):
        temperature = SETTINGS[name].get("temperature", 1.0)
        assert near_tie(logits, seeds, 11, temperature), "another token without a near tie"
        return
    for x, y in zip(got[1:], want[1:], strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=5e-5)


@pytest.mark.parametrize("name", SETTINGS)
def test_bits_do_not_depend_on_the_batch_or_the_run(name: str) -> None:
    logits, seeds = draw((150, 32003)).bfloat16().cuda(), draw_seeds(150).cuda()
    options = {"step": 4, "impl": "triton", **SETTINGS[name]}
    whole = sample(logits, seeds=seeds, **options)
    again = sample(logits, seeds=seeds, **options)
    part = sample(logits[70:72], seeds=seeds[70:72], **options)
    for x, y, z in zip(whole, again, part, strict=True):
        assert torch.equal(x, y)
        assert torch.equal(x[70:72], z)


@pytest.mark.parametrize("name", [n for n in SETTINGS if n != "greedy"])
def test_frequencies_are_those_of_the_distribution(name: str) -> None:
    row = draw((300,), seed=4, scale=1.5)
    exact = torch.tensor(distribution(row, **SETTINGS[name]), dtype=torch.float64)  # type: ignore[arg-type]
    seeds = torch.arange(20000).cuda()
    drawn = many(row.cuda(), 20000, "triton", seeds=seeds, **SETTINGS[name])
    counts = torch.bincount(drawn.tokens.cpu(), minlength=300)
    assert not counts[exact == 0].any()
    assert chi_square_p_value(counts, exact) > 1e-4


def test_rows_may_differ_and_bad_settings_make_a_row_unusable() -> None:
    logits, seeds = draw((6, 900)).cuda(), draw_seeds(6).cuda()
    logits[0, 5] = math.nan
    rows = {
        "temperature": torch.tensor([1.0, 0.0, 0.7, -1.0, 1.0, 1.0]).cuda(),
        "top_k": torch.tensor([0, 0, 20, 0, 0, -2]).cuda(),
        "top_p": torch.tensor([1.0, 0.5, 0.9, 1.0, 1.5, 1.0]).cuda(),
    }
    got = sample(logits, seeds=seeds, step=0, **rows, impl="triton")
    want = sample(logits, seeds=seeds, step=0, **rows, impl="reference")
    assert torch.equal(got.tokens, want.tokens)
    assert got.tokens.tolist()[0] == got.tokens.tolist()[3] == -1
    for x, y in zip(got[1:], want[1:], strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=5e-5, equal_nan=True)


@pytest.mark.parametrize("name", ["plain", "all"])
def test_a_graph_draws_anew_when_the_step_moves(name: str) -> None:
    logits, seeds = draw((8, 32003)).bfloat16().cuda(), draw_seeds(8).cuda()
    step = torch.zeros((), dtype=torch.int64, device="cuda")
    tokens = torch.zeros(8, dtype=torch.int64, device="cuda")
    out = SampleOutput(tokens, *torch.zeros(3, 8, device="cuda").unbind())
    options = {"seeds": seeds, "impl": "triton", **SETTINGS[name]}
    sample(logits, step=step, out=out, **options)  # compiles before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        sample(logits, step=step, out=out, **options)
        step += 1
    step.zero_()
    seen = []
    for number in range(4):
        graph.replay()
        eager = sample(logits, step=number, **options)
        assert all(torch.equal(x, y) for x, y in zip(out, eager, strict=True))
        seen.append(tuple(eager.tokens.tolist()))
    assert len(set(seen)) > 1


def test_nothing_waits_for_the_device() -> None:
    logits, seeds = draw((8, 32003)).cuda(), draw_seeds(8).cuda()
    options = {"seeds": seeds, "step": 1, "top_k": 50, "top_p": 0.9}
    sample(logits, **options)
    torch.cuda.set_sync_debug_mode("error")
    try:
        sample(logits, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")
