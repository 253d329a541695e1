"""The block scan of csrc/cuda/rewards_and_gae.cu, step by step in NumPy, against the definition.

It follows the kernel's five steps with the same ownership of tokens, so that an error in the
composition of affine maps, in the next-valid-value search, in the carry between tiles or in the
moments fails here, on machines without a GPU. `rlhf-fast check --ops` compares the kernel itself
with the reference.
"""

from __future__ import annotations

import numpy as np
import pytest

WARP, ITEMS = 32, 4


def compose(front, back):
    """y -> front(back(y)) for maps (a, b): y -> a y + b."""
    return front[0] * back[0], front[0] * back[1] + front[1]


def later_value(own, thread, carry):
    """Step 2: first valid V of the threads behind, inside the warp, then by warp, then carried."""
    warp = thread // WARP
    for lane in range(thread + 1, (warp + 1) * WARP):
        if own[lane] is not None:
            return own[lane], True
    for other in range(warp + 1, len(own) // WARP):
        have = [v for v in own[other * WARP : (other + 1) * WARP] if v is not None]
        if have:
            return have[0], True
    return carry


def warp_suffixes(maps):
    """Step 3 inside a warp: Hillis-Steele with shuffles down."""
    suffix = list(maps)
    distance = 1
    while distance < WARP:
        shuffled = [suffix[min(i + distance, WARP - 1)] for i in range(WARP)]
        suffix = [
            compose(suffix[i], shuffled[i]) if i + distance < WARP else suffix[i]
            for i in range(WARP)
        ]
        distance *= 2
    return suffix


def tile(state, rewards, values, mask, score, threads, gamma, gae_lambda, first):
    """One tile of threads * ITEMS tokens starting at `first`; it may end behind the row."""
    length = len(values)
    tokens = [[first + t * ITEMS + k for k in range(ITEMS)] for t in range(threads)]
    valid = [[i < length and bool(mask[i]) for i in row] for row in tokens]
    own = [
        next((values[i] for i, ok in zip(row, oks, strict=True) if ok), None)
        for row, oks in zip(tokens, valid, strict=True)
    ]
    maps, totals, following = [], [], []
    for t in range(threads):
        value, exists = later_value(own, t, (state["value"], state["exists"]))
        total, row = (1.0, 0.0), [(1.0, 0.0)] * ITEMS
        for k in reversed(range(ITEMS)):
            if not valid[t][k]:
                continue
            i = tokens[t][k]
            reward = rewards[i] + (0.0 if exists else score)
            row[k] = (gamma * gae_lambda, reward + gamma * value - values[i])
            total = compose(row[k], total)
            value, exists = values[i], True
        maps.append(row)
        totals.append(total)
        following.append((value, exists))
    advantages = np.zeros(length)
    warps = threads // WARP
    suffixes = [warp_suffixes(totals[w * WARP : (w + 1) * WARP]) for w in range(warps)]
    for t in range(threads):
        warp, lane = divmod(t, WARP)
        y = state["advantage"]
        for other in reversed(range(warp + 1, warps)):
            y = suffixes[other][0][0] * y + suffixes[other][0][1]
        after = suffixes[warp][lane + 1] if lane + 1 < WARP else (1.0, 0.0)
        y = after[0] * y + after[1]
        for k in reversed(range(ITEMS)):
            y = maps[t][k][0] * y + maps[t][k][1]
            if valid[t][k]:
                advantages[tokens[t][k]] = y
        if t == 0:
            carried = y
    if not state["exists"]:
        state["shift"] = carried
    state.update(advantage=carried, value=following[0][0], exists=following[0][1])
    add_to_sums(state["sums"], advantages, tokens, valid, state["shift"])
    return advantages


def add_to_sums(sums, advantages, tokens, valid, shift):
    """Step 5: count, sum and squares of A - shift, a row of `sums` for each thread."""
    for t, (row, oks) in enumerate(zip(tokens, valid, strict=True)):
        d = np.array([advantages[i] - shift for i, ok in zip(row, oks, strict=True) if ok])
        sums[t] += (len(d), d.sum(), (d * d).sum())


def finish(sums, shift):
    """Lanes by a tree, warps in order."""
    lanes = sums.reshape(-1, WARP, 3).copy()
    distance = WARP // 2
    while distance:
        lanes[:, :distance] += lanes[:, distance : 2 * distance]
        distance //= 2
    count, total, squares = lanes[:, 0].sum(0)
    if count == 0:
        return np.zeros(3)
    mean = total / count
    return np.array([count, shift + mean, max(squares - total * mean, 0.0)])


def block_scan(rewards, values, mask, score, bootstrap, threads, gamma, gae_lambda):
    sums = np.zeros((threads, 3))
    state = {"value": bootstrap, "exists": False, "advantage": 0.0, "shift": 0.0, "sums": sums}
    advantages, size = np.zeros(len(values)), threads * ITEMS
    for tiles in range(-(-len(values) // size), 0, -1):
        first = (tiles - 1) * size
        advantages += tile(state, rewards, values, mask, score, threads, gamma, gae_lambda, first)
    return advantages, finish(sums, state["shift"])


def definition(rewards, values, mask, score, bootstrap, gamma, gae_lambda):
    at = np.flatnonzero(mask)
    advantages = np.zeros(len(values))
    y, following = 0.0, bootstrap
    for order, i in enumerate(reversed(at)):
        reward = rewards[i] + (score if order == 0 else 0.0)
        y = reward + gamma * following - values[i] + gamma * gae_lambda * y
        following = values[i]
        advantages[i] = y
    return advantages


@pytest.mark.parametrize("threads", [32, 64, 256, 512])
@pytest.mark.parametrize("length", [1, 5, 127, 128, 129, 700])
@pytest.mark.parametrize("density", [0.0, 0.02, 0.7, 1.0])
def test_block_scan_equals_the_recurrence(threads, length, density):
    generator = np.random.default_rng(length + threads)
    rewards, values = generator.normal(size=(2, length)) + 100.0
    mask = generator.random(length) < density
    got, moments = block_scan(rewards, values, mask, 1.5, 0.25, threads, 0.99, 0.95)
    want = definition(rewards, values, mask, 1.5, 0.25, 0.99, 0.95)
    np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-12)
    chosen = want[mask]
    mean = chosen.mean() if len(chosen) else 0.0
    expected = [len(chosen), mean, ((chosen - mean) ** 2).sum()]
    np.testing.assert_allclose(moments, expected, rtol=1e-9, atol=1e-9)
