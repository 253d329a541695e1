"""The Triton kernel of `sample` for rows with top-k, top-p or min-p: one program a row.

It sweeps the row, after the first time from the second-level cache, to find the border of what is
kept, and then races among the kept. How often depends on the data, in a loop of the kernel: the
host launches the same whatever they are.
"""

import triton
import triton.language as tl

from rlhf_fast_kernels.triton_kernels.sample import (
    DRAWS,
    LANES,
    OUTPUTS,
    ROWS,
    TENSORS,
    VALUES,
    _add,
    _first_of_best,
    _merge,
    _philox,
    _read,
    _scale_of,
    _setting,
    _usable,
)
from rlhf_fast_kernels.triton_support import AotCase

WARPS = 8
SWEEP = 2048
STEPS = SWEEP.bit_length() - 1
PIECE = 512
# bf16 and fp16 leave these low bits of an fp32 number at 0: a search need not go through them.
KEY_SHIFTS = {"fp32": 0, "bf16": 16, "fp16": 13}


@triton.jit
def _key_of(x, SHIFT: tl.constexpr):
    """int64 of the same order as x; the low SHIFT bits, constant for each sign, are left out."""
    bits = x.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64) >> SHIFT


@triton.jit
def _value_of(key, SHIFT: tl.constexpr):
    low: tl.constexpr = (1 << SHIFT) - 1
    bits = ((key << SHIFT) | tl.where(key < 0, low, 0)).to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _best_lanes(logits, vocab, k, SHIFT: tl.constexpr, GROUP: tl.constexpr):
    """A key that the k-th largest logit is not below: the k-th of the maxima of GROUP lanes.

    One sweep, then a bisection in registers: it leaves `_border` a handful of bits to find.
    """
    lanes = tl.arange(0, GROUP)
    tops = tl.full((GROUP,), float("-inf"), tl.float32)
    for group in range(0, vocab, GROUP):
        tops = tl.maximum(tops, _read(logits, group + lanes, vocab))
    keys = _key_of(tops, SHIFT)
    high = tl.max(keys, 0)
    below = tl.min(keys, 0) - 1
    while high - below > 1:
        middle = below + ((high - below) >> 1)
        fewer = tl.sum((keys > middle).to(tl.int32), 0) < k
        high = tl.where(fewer, middle, high)
        below = tl.where(fewer, below, middle)
    return high


@triton.jit
def _border(
    logits,
    vocab,
    best,
    scale,
    below,
    target,
    MASS: tl.constexpr,
    SHIFT: tl.constexpr,
    GROUP: tl.constexpr,
):
    """(t, how much lies above it): the smallest value above which lies less than `target`.

    A sweep quarters the interval of keys ]below, high]; what lies above `below` is too much. A
    count that meets the target ends the search: then exactly what lies above t belongs.
    """
    high = _key_of(best, SHIFT)
    above = best * 0.0
    lanes = tl.arange(0, GROUP)
    while high - below > 1:
        gap = high - below
        k1 = below + (gap >> 2)
        k2 = below + (gap >> 1)
        k3 = below + ((gap * 3) >> 2)
        t1 = _value_of(k1, SHIFT)
        t2 = _value_of(k2, SHIFT)
        t3 = _value_of(k3, SHIFT)
        a1 = tl.zeros((GROUP,), tl.float32)
        a2 = tl.zeros((GROUP,), tl.float32)
        a3 = tl.zeros((GROUP,), tl.float32)
        for group in range(0, vocab, GROUP):
            x = _read(logits, group + lanes, vocab)
            if MASS:
                p = tl.exp2((x - best) * scale)
            else:
                p = tl.full((GROUP,), 1.0, tl.float32)
            a1 += tl.where(x > t1, p, 0.0)
            a2 += tl.where(x > t2, p, 0.0)
            a3 += tl.where(x > t3, p, 0.0)
        s1 = tl.sum(a1, 0)
        s2 = tl.sum(a2, 0)
        s3 = tl.sum(a3, 0)
        # In a gap of 2 or 3 the first key is `below` itself, of which the answer is known.
        c1 = (s1 < target) & (k1 > below)
        c2 = s2 < target
        c3 = s3 < target
        high = tl.where(c1, k1, tl.where(c2, k2, tl.where(c3, k3, high)))
        above = tl.where(c1, s1, tl.where(c2, s2, tl.where(c3, s3, above)))
        below = tl.where(c3, tl.where(c2, tl.where(c1, below, k1), k2), k3)
        if not MASS:
            met = (s1 == target) | (s2 == target) | (s3 == target)
            key = tl.where(s1 == target, k1, tl.where(s2 == target, k2, k3))
            high = tl.where(met, key, high)
            above = tl.where(met, target, above)
            below = tl.where(met, key, below)
    return _value_of(high, SHIFT), above


@triton.jit
def _mass_above(logits, vocab, best, scale, threshold, GROUP: tl.constexpr):
    lanes = tl.arange(0, GROUP)
    mass = tl.zeros((GROUP,), tl.float32)
    for group in range(0, vocab, GROUP):
        x = _read(logits, group + lanes, vocab)
        mass += tl.where(x > threshold, tl.exp2((x - best) * scale), 0.0)
    return tl.sum(mass, 0)


@triton.jit
def _tie_limit(logits, vocab, threshold, room, GROUP: tl.constexpr, STEPS: tl.constexpr):
    """The id of the `room`-th entry that equals the threshold; -1 if there is no room."""
    lanes = tl.arange(0, GROUP)
    seen = room * 0.0
    start = tl.full((), -1, tl.int32)
    need = room
    for group in range(0, vocab, GROUP):
        ties = tl.sum((_read(logits, group + lanes, vocab) == threshold).to(tl.float32), 0)
        crossing = (seen < room) & (seen + ties >= room)
        start = tl.where(crossing, group, start)
        need = tl.where(crossing, room - seen, need)
        seen += ties
    last = tl.where(room > 0, tl.full((), 0x7FFFFFFF, tl.int32), -1)
    if start >= 0:
        ties = _read(logits, start + lanes, vocab) == threshold
        low = tl.full((), -1, tl.int32)
        last = tl.full((), GROUP - 1, tl.int32)
        for _ in tl.static_range(STEPS):  # bisection within the group
            middle = (low + last) >> 1
            enough = tl.sum((ties & (lanes <= middle)).to(tl.float32), 0) >= need
            low = tl.where(enough, low, middle)
            last = tl.where(enough, middle, last)
        last += start
    return last


@triton.jit
def _kept_prefix(
    logits,
    vocab,
    best,
    scale,
    mass,
    k,
    p,
    SHIFT: tl.constexpr,
    GROUP: tl.constexpr,
    STEPS: tl.constexpr,
):
    """(threshold, last tie): kept is what lies above, and what equals it up to that id.

    Top-k leaves a prefix of the tokens ordered by (logit, then lower id), top-p a prefix of that.
    """
    threshold = best * 0.0 - float("inf")
    room = best * 0.0 + 1e30
    below = _key_of(threshold, SHIFT) - 1
    if (k > 0) & (k < vocab):
        count = k.to(tl.float32)
        if k <= GROUP:
            below = _best_lanes(logits, vocab, k, SHIFT, GROUP) - 1
        threshold, above = _border(logits, vocab, best, scale, below, count, False, SHIFT, GROUP)
        room = count - above
        below = _key_of(threshold, SHIFT) - 1
        tie = tl.exp2((threshold - best) * scale)
        mass = _mass_above(logits, vocab, best, scale, threshold, GROUP) + room * tie
    if p < 1:
        # All tokens below a V-th of 1 - top_p, halved for safety, together cannot fill the gap.
        lowest = tl.log2((1 - p) * mass / vocab) - 1
        below = tl.maximum(below, _key_of(best + lowest / scale, SHIFT) - 1)
        target = p * mass
        nucleus, above = _border(logits, vocab, best, scale, below, target, True, SHIFT, GROUP)
        fit = tl.maximum(tl.ceil((target - above) / tl.exp2((nucleus - best) * scale)), 1.0)
        room = tl.where(nucleus > threshold, fit, tl.minimum(fit, room))
        threshold = nucleus
    return threshold, _tie_limit(logits, vocab, threshold, room, GROUP, STEPS)


@triton.jit
def _kept(x, ids, threshold, last_tie, best, scale, lowest):
    keep = (x > threshold) | ((x == threshold) & (ids <= last_tie))
    return tl.where(keep & ((x - best) * scale >= lowest), x, float("-inf"))


@triton.jit
def _race(
    logits,
    vocab,
    best,
    scale,
    threshold,
    last_tie,
    lowest,
    now,
    seed,
    LANES: tl.constexpr,
    PIECE: tl.constexpr,
):
    """(mass of the kept tokens, winner among them), by pieces that take few registers."""
    lanes = tl.arange(0, PIECE)
    mass = tl.zeros((PIECE,), tl.float32)
    weighted = tl.zeros((PIECE,), tl.float32)
    lead_mass = tl.zeros((PIECE,), tl.float32)
    lead_wait = tl.full((PIECE,), 1.0, tl.float32)
    lead_id = tl.full((PIECE,), 0x7FFFFFFF, tl.int32)
    # Lanes do not meet their ids in order, and need not: fp32 ties aside, runners differ.
    for counter in range(0, (vocab + 4 * LANES - 1) // (4 * LANES) * LANES, PIECE):
        first = counter // LANES * 4 * LANES + counter % LANES
        words = _philox(counter + lanes, now, seed)
        for w in tl.static_range(4):
            ids = first + w * LANES + lanes
            x = _kept(_read(logits, ids, vocab), ids, threshold, last_tie, best, scale, lowest)
            mass, weighted, lead_mass, lead_wait, lead_id = _add(
                x, ids, words[w], best, scale, False, mass, weighted, lead_mass, lead_wait, lead_id
            )
    _, leader = _first_of_best(lead_mass / lead_wait, lead_id)
    return tl.sum(mass, 0), leader


@triton.jit(do_not_specialize=["step_value", "top_k_value"])
def _filter(
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
    min_p,
    min_p_value,
    partials,
    leaders,
    tokens,
    logprobs,
    raw_logprobs,
    SPLITS: tl.constexpr,
    LANES: tl.constexpr,
    PIECE: tl.constexpr,
    SWEEP: tl.constexpr,
    SHIFT: tl.constexpr,
    STEPS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    t = _setting(temperature, temperature_value, row)
    k = _setting(top_k, top_k_value, row)
    p = _setting(top_p, top_p_value, row)
    floor = _setting(min_p, min_p_value, row)
    drawn = (t != 0) & (k != 1) & (p != 0)
    scale = _scale_of(t)
    best, mass, _, _ = _merge(partials, leaders, row, splits, scale, False, SPLITS)
    cut = ((k > 0) & (k < vocab)) | (p < 1) | (floor > 0)
    if cut & drawn & _usable(best, mass, t, k, p, floor):
        logits += row * row_stride
        threshold, last_tie = _kept_prefix(
            logits, vocab, best, scale, mass, k, p, SHIFT, SWEEP, STEPS
        )
        if step is None:
            now = tl.full((), step_value, tl.int64)
        else:
            now = tl.load(step + row * step_stride)
        seed = tl.load(seeds + row)
        kept, token = _race(
            logits,
            vocab,
            best,
            scale,
            threshold,
            last_tie,
            tl.log2(floor),
            now,
            seed,
            LANES,
            PIECE,
        )
        y = (tl.load(logits + token).to(tl.float32) - best) * scale
        tl.store(tokens + row, token.to(tl.int64))
        tl.store(logprobs + row, (y - tl.log2(kept)) * 0.6931471805599453)
        tl.store(raw_logprobs + row, (y - tl.log2(mass)) * 0.6931471805599453)


AOT_CASES = tuple(
    AotCase(
        _filter,
        {
            "logits": f"*{dtype}",
            **ROWS,
            **DRAWS,
            **VALUES,
            **OUTPUTS,
            **tensors,
            "min_p_value": "fp32",
        },
        {
            **dict.fromkeys(absent),
            "SPLITS": 32,
            "LANES": LANES,
            "PIECE": PIECE,
            "SWEEP": SWEEP,
            "SHIFT": shift,
            "STEPS": STEPS,
        },
        num_warps=WARPS,
    )
    for dtype, shift in KEY_SHIFTS.items()
    for tensors, absent in (
        ({}, (*TENSORS, "min_p", "step")),
        ({**TENSORS, "min_p": "*fp32", "step": "*i64"}, ()),
    )
)
