"""Triton kernels of `sample`: a scan that is split over the vocabulary, then its merge.

`_scan` gives, for each row and split of SPLIT ids, the maximum, the two sums of softmax and entropy
and the leader of the race, from one read. `_finish` merges the splits in order and writes the
results of rows without a filter; `sample_filters` writes those of the others. The splits depend on
the vocabulary alone, so a row's bits do not depend on the batch.
"""

import triton
import triton.language as tl

from rlhf_fast_kernels.triton_support import AotCase

# One call of Philox gives the words of the ids b, b + 1024, b + 2048 and b + 3072 of a group.
LANES = 1024
GROUP = 4 * LANES
SPLIT = 2 * GROUP
PARTIALS = 4
SCAN_WARPS = 8


def splits_of(vocab: int) -> int:
    return triton.cdiv(vocab, SPLIT)


def merge_block(splits: int) -> int:
    """Lanes of the merge."""
    return triton.next_power_of_2(splits)


# ---- random numbers -----------------------------------------------------------------------------


@triton.jit
def _philox(counter, step, seed):
    """The four uint32 words of every counter; step and seed are int64 scalars."""
    c0 = counter.to(tl.uint32)
    c1 = tl.zeros_like(c0) + (step & 0xFFFFFFFF).to(tl.uint32)
    c2 = tl.zeros_like(c0) + ((step >> 32) & 0xFFFFFFFF).to(tl.uint32)
    c3 = tl.zeros_like(c0)
    k0 = (seed & 0xFFFFFFFF).to(tl.uint32)
    k1 = ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    for _ in tl.static_range(10):
        p0 = c0.to(tl.uint64) * 0xD2511F53
        p1 = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c2 = (p0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c1 = p1.to(tl.uint32)
        c3 = p0.to(tl.uint32)
        k0 = tl.add(k0, 0x9E3779B9, sanitize_overflow=False)
        k1 = tl.add(k1, 0xBB67AE85, sanitize_overflow=False)
    return c0, c1, c2, c3


@triton.jit
def _exponential(word):
    """-log2(1 - (word + 1/2) / 2^32) to a few ulps at both ends.

    Near 1 the complement is exact as an integer; near 0 the series has no cancellation.
    """
    upper = word >= 0x80000000
    near = tl.where(upper, word ^ 0xFFFFFFFF, word).to(tl.int32)
    t = (near.to(tl.float32) + 0.5) * 2.3283064365386963e-10
    wait = -tl.log2(tl.where(upper, t, 1.0 - t))
    series = 1.0 + t * (
        0.5 + t * (0.33333334 + t * (0.25 + t * (0.2 + t * (0.16666667 + t * 0.14285715))))
    )
    return tl.where(upper | (t > 0.0625), wait, 1.4426950408889634 * t * series)


# ---- one row ------------------------------------------------------------------------------------


@triton.jit
def _setting(tensor, value, row):
    if tensor is None:
        result = value
    else:
        result = tl.load(tensor + row)
    return result


@triton.jit
def _scale_of(temperature):
    """log2(e) / temperature, bounded so that neither 0 nor -inf times it is NaN."""
    scale = 1.4426950408889634 / tl.where(temperature > 0, temperature, 1.0)
    return tl.minimum(tl.maximum(scale, 1.1754944e-38), 1.7014118e38)


@triton.jit
def _read(logits, ids, vocab):
    return tl.load(logits + ids, mask=ids < vocab, other=float("-inf")).to(tl.float32)


@triton.jit
def _add(x, ids, word, best, scale, greedy, mass, weighted, lead_mass, lead_wait, lead_id):
    """Adds a vector of logits to the sums and lets it challenge the leaders, lane by lane.

    p / E > p' / E' is compared as p E' > p' E. Greedy rows race with p = 1 at the maximum and E =
    1: the first of the best wins.
    """
    y = (x - best) * scale
    p = tl.exp2(y)
    mass += p
    weighted += tl.where(p > 0, y, 0.0) * p
    runner = tl.where(greedy, tl.where(x == best, 1.0, 0.0), p)
    wait = tl.where(greedy, 1.0, _exponential(word))
    ahead = runner * lead_wait > lead_mass * wait
    lead_mass = tl.where(ahead, runner, lead_mass)
    lead_wait = tl.where(ahead, wait, lead_wait)
    lead_id = tl.where(ahead, ids, lead_id)
    return mass, weighted, lead_mass, lead_wait, lead_id


@triton.jit
def _first_of_best(ratio, ids):
    """(largest ratio, smallest id that has it); a ratio of 0 leads nowhere."""
    top = tl.max(ratio, 0)
    leads = (ratio == top) & (ratio > 0)
    return top, tl.min(tl.where(leads, ids, 0x7FFFFFFF), 0)


@triton.jit(do_not_specialize=["step_value", "top_k_value"])
def _scan(
    logits,
    row_stride,
    vocab,
    splits,
    seeds,
    step,
    step_stride,
    step_value,
    temperature,
    temperature_value,
    top_k,
    top_k_value,
    top_p,
    top_p_value,
    partials,
    leaders,
    LANES: tl.constexpr,
    SPLIT: tl.constexpr,
):
    program = tl.program_id(0)
    row = (program // splits).to(tl.int64)
    first = (program % splits) * SPLIT
    t = _setting(temperature, temperature_value, row)
    greedy = (t == 0) | (_setting(top_k, top_k_value, row) == 1)
    greedy = greedy | (_setting(top_p, top_p_value, row) == 0)
    scale = _scale_of(t)
    seed = tl.load(seeds + row)
    if step is None:
        now = tl.full((), step_value, tl.int64)
    else:
        now = tl.load(step + row * step_stride)
    logits += row * row_stride
    lanes = tl.arange(0, LANES)
    best = tl.full((), float("-inf"), tl.float32)
    mass = tl.zeros((LANES,), tl.float32)
    weighted = tl.zeros((LANES,), tl.float32)
    lead_mass = tl.zeros((LANES,), tl.float32)
    lead_wait = tl.full((LANES,), 1.0, tl.float32)
    lead_id = tl.full((LANES,), 0x7FFFFFFF, tl.int32)
    for group in range(first, tl.minimum(first + SPLIT, vocab), 4 * LANES):
        ids = group + lanes
        x0 = _read(logits, ids, vocab)
        x1 = _read(logits, ids + LANES, vocab)
        x2 = _read(logits, ids + 2 * LANES, vocab)
        x3 = _read(logits, ids + 3 * LANES, vocab)
        previous = best
        top = tl.maximum(tl.maximum(x0, x1), tl.maximum(x2, x3))
        best = tl.maximum(best, tl.max(top, 0))
        pivot = tl.where(best == float("-inf"), 0.0, best)
        moved = tl.where(previous == float("-inf"), 0.0, (previous - pivot) * scale)
        factor = tl.exp2(moved)
        weighted = (weighted + mass * moved) * factor
        mass = mass * factor
        lead_mass = lead_mass * tl.where(greedy, tl.where(previous == best, 1.0, 0.0), factor)
        w0, w1, w2, w3 = _philox(group // 4 + lanes, now, seed)
        mass, weighted, lead_mass, lead_wait, lead_id = _add(
            x0, ids, w0, pivot, scale, greedy, mass, weighted, lead_mass, lead_wait, lead_id
        )
        mass, weighted, lead_mass, lead_wait, lead_id = _add(
            x1, ids + LANES, w1, pivot, scale, greedy, mass, weighted, lead_mass, lead_wait, lead_id
        )
        ids += 2 * LANES
        mass, weighted, lead_mass, lead_wait, lead_id = _add(
            x2, ids, w2, pivot, scale, greedy, mass, weighted, lead_mass, lead_wait, lead_id
        )
        mass, weighted, lead_mass, lead_wait, lead_id = _add(
            x3, ids + LANES, w3, pivot, scale, greedy, mass, weighted, lead_mass, lead_wait, lead_id
        )
    ratio, leader = _first_of_best(lead_mass / lead_wait, lead_id)
    tl.store(partials + program * 4, best)
    tl.store(partials + program * 4 + 1, tl.sum(mass, 0))
    tl.store(partials + program * 4 + 2, tl.sum(weighted, 0))
    tl.store(partials + program * 4 + 3, ratio)
    tl.store(leaders + program, leader)


@triton.jit
def _merge(partials, leaders, row, splits, scale, greedy, SPLITS: tl.constexpr):
    """(best, mass, weighted, winner without filters) of a row from those of its splits."""
    index = tl.arange(0, SPLITS)
    there = index < splits
    at = partials + (row * splits + index) * 4
    bests = tl.load(at, mask=there, other=float("-inf"))
    best = tl.max(bests, 0)
    moved = tl.where(bests == float("-inf"), 0.0, (bests - best) * scale)
    factor = tl.exp2(moved)
    masses = tl.load(at + 1, mask=there, other=0.0)
    weighted = tl.load(at + 2, mask=there, other=0.0)
    ratios = tl.load(at + 3, mask=there, other=0.0)
    ratios *= tl.where(greedy, tl.where(bests == best, 1.0, 0.0), factor)
    ids = tl.load(leaders + row * splits + index, mask=there, other=0x7FFFFFFF)
    _, winner = _first_of_best(ratios, ids)
    mass = tl.sum(masses * factor, 0)
    weighted = tl.sum((weighted + masses * moved) * factor, 0)
    return best, mass, weighted, winner


@triton.jit
def _usable(best, mass, t, k, p, floor):
    """No NaN, no +inf, something above -inf, and settings in their range."""
    legal = (t >= 0) & (t < float("inf")) & (k >= 0)
    legal = legal & (p >= 0) & (p <= 1) & (floor >= 0) & (floor <= 1)
    return legal & (best > float("-inf")) & (best < float("inf")) & (mass == mass)


@triton.jit(do_not_specialize=["top_k_value"])
def _finish(
    logits,
    row_stride,
    vocab,
    splits,
    temperature,
    temperature_value,
    top_k,
    top_k_value,
    top_p,
    top_p_value,
    min_p,
    min_p_value,
    partials,
    leaders,
    tokens,
    logprobs,
    raw_logprobs,
    entropy,
    SPLITS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    t = _setting(temperature, temperature_value, row)
    k = _setting(top_k, top_k_value, row)
    p = _setting(top_p, top_p_value, row)
    floor = _setting(min_p, min_p_value, row)
    greedy = (t == 0) | (k == 1) | (p == 0)
    scale = _scale_of(t)
    best, mass, weighted, token = _merge(partials, leaders, row, splits, scale, greedy, SPLITS)
    usable = _usable(best, mass, t, k, p, floor)
    there = usable & (token < vocab)
    x = tl.load(logits + row * row_stride + token, mask=there, other=0.0).to(tl.float32)
    total = tl.log2(mass)
    raw = ((x - best) * scale - total) * 0.6931471805599453
    tl.store(tokens + row, tl.where(usable, token, -1).to(tl.int64))
    tl.store(logprobs + row, tl.where(usable, tl.where(greedy, 0.0, raw), float("nan")))
    tl.store(raw_logprobs + row, tl.where(usable, raw, float("nan")))
    if entropy is not None:
        h = (total - weighted / mass) * 0.6931471805599453
        tl.store(entropy + row, tl.where(usable, h, float("nan")))


# ---- ahead of time ------------------------------------------------------------------------------

ROWS = {
    "row_stride": "i64",
    "vocab": "i32",
    "splits": "i32",
    "partials": "*fp32",
    "leaders": "*i32",
}
DRAWS = {"seeds": "*i64", "step_stride": "i32", "step_value": "i32"}
VALUES = {"temperature_value": "fp32", "top_k_value": "i32", "top_p_value": "fp32"}
TENSORS = {"temperature": "*fp32", "top_k": "*i64", "top_p": "*fp32"}
OUTPUTS = {"tokens": "*i64", "logprobs": "*fp32", "raw_logprobs": "*fp32"}
_SCAN = {**ROWS, **DRAWS, **VALUES}
_FINISH = {**ROWS, **VALUES, **OUTPUTS, "min_p_value": "fp32"}
_BLOCKS = {"LANES": LANES, "SPLIT": SPLIT}

AOT_CASES = (
    *(
        AotCase(
            _scan,
            {"logits": f"*{dtype}", **_SCAN},
            {**dict.fromkeys((*TENSORS, "step")), **_BLOCKS},
            num_warps=SCAN_WARPS,
        )
        for dtype in ("fp32", "bf16", "fp16")
    ),
    AotCase(
        _scan,
        {"logits": "*bf16", **_SCAN, **TENSORS, "step": "*i64"},
        _BLOCKS,
        num_warps=SCAN_WARPS,
    ),
    AotCase(
        _finish,
        {"logits": "*bf16", **_FINISH, **TENSORS, "min_p": "*fp32", "entropy": "*fp32"},
        {"SPLITS": 32},
        num_warps=1,
    ),
    AotCase(
        _finish,
        {"logits": "*bf16", **_FINISH},
        {**dict.fromkeys((*TENSORS, "min_p", "entropy")), "SPLITS": 32},
        num_warps=1,
    ),
)
