"""The tokens, log-probs and entropies of `sample`: random numbers, filters, statistics, edges."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from rlhf_fast_kernels import sample
from rlhf_fast_kernels.reference.sample import exponentials, kept_tokens
from rlhf_fast_kernels.reference.sample import philox as philox_of_tensors
from tests.kernels.sample_cases import (
    EVERY,
    FAST,
    SETTINGS,
    assert_same,
    chi_square_p_value,
    distribution,
    draw,
    draw_seeds,
    exponential,
    many,
    needs_cpu,
    philox,
)

# The interpreter computes in numpy, which warns where a processor does not.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
F = 0xFFFFFFFF


# ---- random numbers -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([F] * 4, [F] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_gives_the_known_answers_of_its_authors(
    counter: list[int], key: list[int], words: list[int]
) -> None:
    assert philox(counter, key) == words
    c0, c1, c2, c3, k0, k1 = (torch.tensor(x) for x in (*counter, *key))
    assert [int(x) for x in philox_of_tensors((c0, c1, c2, c3), (k0, k1))] == words


def test_every_token_has_the_exponential_that_the_documentation_says() -> None:
    seeds = torch.tensor([0, -1, 2**62 + 12345, -(2**63)])
    steps = torch.tensor([0, 7, 2**40 + 3, -2])
    got = exponentials(seeds, steps, 9000)
    for row in range(4):
        for token in (0, 1, 1023, 1024, 2047, 3072, 4095, 4096, 5121, 8999):
            want = exponential(int(seeds[row]), int(steps[row]), token)
            assert math.isclose(float(got[row, token]), want, rel_tol=1e-12)


@pytest.mark.parametrize("impl", EVERY)
@pytest.mark.parametrize("spread", [1.0, 12.0])
def test_the_race_is_won_by_the_least_e_over_p(impl: str, spread: float) -> None:
    logits, seeds = draw((4, 5000), scale=spread), draw_seeds(4)
    step = 2**33 + 5
    wait = exponentials(seeds, torch.full((4,), step), 5000).log()
    want = (logits.double() - wait).argmax(-1)
    assert torch.equal(sample(logits, seeds=seeds, step=step, impl=impl).tokens, want)


# ---- implementations against the reference ------------------------------------------------------


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab", [1, 7, 300, 32003, 151936])
@needs_cpu
def test_cpu_equals_the_reference(vocab: int, dtype: torch.dtype, name: str) -> None:
    rows = 2 if vocab > 100000 else 5
    logits, seeds = draw((rows, vocab), seed=vocab).to(dtype), draw_seeds(rows)
    options = {"seeds": seeds, "step": 11, **SETTINGS[name]}
    assert_same(sample(logits, impl="cpu", **options), sample(logits, impl="reference", **options))


@pytest.mark.parametrize(
    ("vocab", "name", "dtype"),
    [
        *((300, name, torch.bfloat16) for name in SETTINGS),
        *((v, "all", torch.float32) for v in (1, 7, 300, 9000)),
        (9000, "plain", torch.float16),
        (9000, "all", torch.float16),
    ],
)
@pytest.mark.skipif("triton" not in EVERY, reason="the interpreter is off")
def test_triton_equals_the_reference(vocab: int, name: str, dtype: torch.dtype) -> None:
    logits, seeds = draw((2, vocab), seed=vocab).to(dtype), draw_seeds(2)
    options = {"seeds": seeds, "step": 11, **SETTINGS[name]}
    got = sample(logits, impl="triton", **options)
    assert_same(got, sample(logits, impl="reference", **options))


@pytest.mark.parametrize("impl", EVERY)
def test_rows_may_differ_in_every_setting(impl: str) -> None:
    logits, seeds = draw((8, 700)).bfloat16(), draw_seeds(8)
    rows = {
        "step": torch.tensor([0, 1, 2, 3, 4, 5, 6, 7]),
        "temperature": torch.tensor([0.0, 1.0, 0.5, 1.0, 2.0, 1.0, 0.0, 1.3]),
        "top_k": torch.tensor([0, 0, 40, 1, 0, 2**40, 10, 3]),
        "top_p": torch.tensor([1.0, 0.7, 1.0, 1.0, 1.0, 1.0, 0.2, 0.5]),
        "min_p": torch.tensor([0.0, 0.0, 0.0, 0.0, 0.2, 0.0, 0.0, 1.0]),
    }
    together = sample(logits, seeds=seeds, **rows, impl=impl)
    assert_same(together, sample(logits, seeds=seeds, **rows, impl="reference"))
    for row in (1, 4, 7) if impl == "triton" else range(8):
        one = {name: value[row].item() for name, value in rows.items()}
        alone = sample(logits[row : row + 1], seeds=seeds[row : row + 1], **one, impl=impl)
        for x, y in zip(alone, together, strict=True):
            assert torch.equal(x, y[row : row + 1])


# ---- the distribution ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in SETTINGS if n != "greedy"])
@pytest.mark.parametrize("vocab", [7, 300])
def test_frequencies_and_logprobs_are_those_of_the_distribution(vocab: int, name: str) -> None:
    row = draw((vocab,), seed=4, scale=1.5)
    exact = torch.tensor(distribution(row, **SETTINGS[name]), dtype=torch.float64)  # type: ignore[arg-type]
    drawn = many(row, 20000, **SETTINGS[name])
    counts = torch.bincount(drawn.tokens, minlength=vocab)
    assert not counts[exact == 0].any()
    assert chi_square_p_value(counts, exact) > 1e-4
    assert float((drawn.logprobs.double() - exact[drawn.tokens].log()).abs().max()) < 2e-6
    raw = torch.log_softmax(row.double() / SETTINGS[name].get("temperature", 1.0), -1)
    assert float((drawn.raw_logprobs.double() - raw[drawn.tokens]).abs().max()) < 2e-6
    assert drawn.entropy is not None
    assert float((drawn.entropy.double() + (raw.exp() * raw).sum()).abs().max()) < 2e-6
    # Each token's own log-prob, once: what was drawn from sums to one.
    seen = torch.full((vocab,), -math.inf, dtype=torch.float64)
    seen[drawn.tokens] = drawn.logprobs.double()
    if (counts > 0).sum() == (exact > 0).sum():
        assert abs(float(seen.exp().sum()) - 1) < 1e-6


@pytest.mark.parametrize("other", ["step", "seed", "far step", "far seed"])
def test_draws_of_other_steps_and_seeds_are_independent(other: str) -> None:
    row, draws = torch.zeros(5), 40000
    shift = 2**32 if other.startswith("far") else 1
    options = {"step": shift} if "step" in other else {"seeds": torch.arange(draws) + shift}
    first, second = many(row, draws).tokens, many(row, draws, **options).tokens
    table = torch.bincount(5 * first + second, minlength=25)
    assert chi_square_p_value(table, torch.full((25,), 1 / 25)) > 1e-4
    shifted = torch.equal(first[1:], second[:-1])
    assert shifted == (other == "seed")


def test_the_four_words_of_a_counter_are_independent() -> None:
    ids = torch.tensor([5, 1029, 2053, 3077, 4101])  # one counter, and a token of another
    row = torch.full((4200,), -math.inf).index_fill(0, ids, 0.0)
    counts = torch.bincount(many(row, 20000).tokens, minlength=4200)[ids]
    assert int(counts.sum()) == 20000
    assert chi_square_p_value(counts, torch.full((5,), 0.2)) > 1e-4


@pytest.mark.parametrize("name", ["top_k", "top_p", "min_p", "all"])
def test_the_filters_keep_the_tokens_that_transformers_keeps(name: str) -> None:
    logits = draw((20, 90), scale=1.0)
    chosen = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, **SETTINGS[name]}
    scaled = (logits - logits.amax(-1, keepdim=True)) / chosen["temperature"]
    filters = [
        *([TopKLogitsWarper(int(chosen["top_k"]))] if chosen["top_k"] else []),
        *([TopPLogitsWarper(chosen["top_p"])] if chosen["top_p"] < 1 else []),
        *([MinPLogitsWarper(chosen["min_p"])] if chosen["min_p"] else []),
    ]
    theirs = scaled
    for keep in filters:
        theirs = keep(torch.zeros(20, 1, dtype=torch.int64), theirs)
    k, p, floor = (torch.full((20,), chosen[n]) for n in ("top_k", "top_p", "min_p"))
    assert torch.equal(
        kept_tokens(scaled.double(), k, p.double(), floor.double()), theirs > -math.inf
    )


# ---- edges --------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", EVERY)
def test_ties_at_a_border_go_to_the_lower_id(impl: str) -> None:
    row = torch.zeros(3000)
    row[1] = -0.0  # equal to its neighbours
    row[[40, 900, 2500]] = 1.0
    three = {40, 900, 2500}
    for options, allowed in (
        ({"top_k": 2}, {40, 900}),
        ({"top_k": 3}, three),
        ({"top_k": 5}, {0, 1, *three}),
        ({"top_p": 1e-7}, {40}),
        ({"top_p": 3.5 / 3005.15485, "top_k": 0}, {40, 900}),
        ({"top_k": 2999, "min_p": 1.0}, three),
        ({"top_k": 1}, {40}),
        ({"top_p": 0.0}, {40}),
        ({"temperature": 0.0}, {40}),
    ):
        draws = 1 if impl == "triton" else 60
        drawn = many(row, draws, impl, **options)
        found = set(drawn.tokens.tolist())
        assert found <= allowed, options
        assert impl == "triton" or len(allowed) > 3 or found == allowed, options
        if len(allowed) == 1:
            assert torch.equal(drawn.logprobs, torch.zeros(draws))


@pytest.mark.parametrize("impl", EVERY)
@pytest.mark.parametrize("temperature", [1e-30, 1.0, 1e30])
def test_extreme_logits_and_temperatures(impl: str, temperature: float) -> None:
    logits = draw((6, 300))
    logits[0] = -200.0
    logits[1, 5] = 1e4
    logits[2, ::2] = -1e4
    logits[3] = -math.inf
    logits[3, 77] = -3e38
    logits[4, 3:] = -math.inf
    logits[5] = 1e4
    options = {"seeds": draw_seeds(6), "step": 2, "temperature": temperature}
    for extra in ({}, {"top_k": 4}, {"top_p": 0.5}):
        if impl == "triton" and "top_p" in extra and temperature != 1.0:
            continue  # the interpreter takes seconds
        got = sample(logits, **options, **extra, impl=impl)
        assert_same(got, sample(logits, **options, **extra, impl="reference"))
        assert int(got.tokens[3]) == 77
        assert int(got.tokens[4]) < 3
    if temperature == 1e-30:  # the best is alone, but where all are equal the draw stays a draw
        assert torch.equal(got.tokens[1:3], logits[1:3].argmax(-1))
        assert len(set(many(logits[0], 50, FAST, temperature=temperature).tokens.tolist())) > 20


@pytest.mark.parametrize("impl", EVERY)
@pytest.mark.parametrize("options", [{}, {"top_k": 3, "top_p": 0.9}, {"temperature": 0.0}])
def test_unusable_rows_are_told(impl: str, options: dict[str, float]) -> None:
    logits = draw((5, 40))
    logits[0, 7], logits[1, 39], logits[2] = math.nan, math.inf, -math.inf
    logits[3] = math.nan
    drawn = sample(logits, seeds=draw_seeds(5), step=0, impl=impl, **options)
    assert drawn.tokens.tolist()[:4] == [-1] * 4
    assert int(drawn.tokens[4]) >= 0
    for x in drawn[1:]:
        assert x is not None
        assert x.isnan().tolist() == [True] * 4 + [False]


@pytest.mark.parametrize("impl", EVERY)
def test_padded_columns_are_not_read(impl: str) -> None:
    logits = draw((3, 310))
    logits[:, 300:] = math.nan
    options = {"seeds": draw_seeds(3), "step": 1, "top_k": 400, "top_p": 0.95, "impl": impl}
    got = sample(logits, vocab_size=300, **options)
    assert_same(got, sample(logits[:, :300].contiguous(), **options), tolerance=0)


@pytest.mark.parametrize("impl", EVERY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strided_rows_are_read_where_they_lie(impl: str, dtype: torch.dtype) -> None:
    whole = draw((2, 3, 301)).to(dtype)
    options = {"seeds": draw_seeds(2), "step": 1, "impl": impl}
    for view in (whole[:, 1], whole[:, 2, 1:], whole[:1, 0].expand(2, -1), whole[0].t()[:2]):
        for top_k in (0, 9):
            got = sample(view, top_k=top_k, **options)
            assert_same(got, sample(view.contiguous(), top_k=top_k, **options), tolerance=0)


@pytest.mark.parametrize("impl", EVERY[1:])
def test_offsets_beyond_two_to_the_31_elements(impl: str) -> None:
    rows = torch.empty(2**31 + 400, dtype=torch.bfloat16)  # pages that nobody touches are free
    far = rows.as_strided((2, 300), (2**31 + 8, 1))
    far.copy_(draw((2, 300)))
    options = {"seeds": draw_seeds(2), "step": 1, "impl": impl}
    for top_k in (0, 9):
        got = sample(far, top_k=top_k, **options)
        assert_same(got, sample(far.clone(), top_k=top_k, **options), tolerance=0)


@pytest.mark.parametrize("impl", EVERY)
@pytest.mark.parametrize("best", [150, 5000, 9000])
def test_a_small_difference_of_the_best_logits_decides_greedily(impl: str, best: int) -> None:
    row = torch.zeros(9001)
    row[best] = 1e-9  # exp of it is exactly 1
    assert int(many(row, 1, impl, temperature=0.0).tokens) == best
