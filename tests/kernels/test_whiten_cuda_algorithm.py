"""The reductions of csrc/cuda/whiten.cu, step by step in NumPy, against the definition.

The same chunks, the same elements in each thread, the same tree over lanes and order of warps:
what is wrong in the indices or in the merge of many sets fails here, on machines without a GPU.
`rlhf-fast check --ops` compares the kernels themselves with the reference.
"""

from __future__ import annotations

import numpy as np
import pytest

WARP, THREADS, CHUNK = 32, 256, 2048
MERGE_INLINE = 512


def block_sum(x):
    """Lanes by xor shuffles, warps in order: what every thread of the block gets."""
    lanes = x.reshape(-1, WARP).copy()
    distance = WARP // 2
    while distance:
        lanes = lanes + lanes[:, np.arange(WARP) ^ distance]
        distance //= 2
    assert (lanes == lanes[:, :1]).all()
    total = lanes[0, 0]
    for warp in lanes[1:, 0]:
        total = total + warp
    return total


def chunk_moments(x, mask, first):
    """Thread t holds elements first + t, first + t + THREADS, ..."""
    at = first + np.arange(CHUNK).reshape(-1, THREADS)
    inside = at < len(x)
    at = np.where(inside, at, 0)
    valid = inside & mask[at]
    value = np.where(valid, x[at], 0.0)
    count = block_sum(valid.sum(0).astype(float))
    mean = block_sum(value.sum(0)) / count if count else 0.0
    deviation = np.where(valid, value - mean, 0.0)
    return np.array([count, mean, block_sum((deviation**2).sum(0))])


def merge_sets(stats):
    """Thread t adds up sets t, t + THREADS, ..."""
    if len(stats) == 1:
        return stats[0]
    padded = np.zeros((-(-len(stats) // THREADS) * THREADS, 3))
    padded[: len(stats)] = stats
    count, mean, m2 = padded.reshape(-1, THREADS, 3).transpose(2, 0, 1)
    total = block_sum(count.sum(0))
    middle = block_sum((count * mean).sum(0)) / total if total else 0.0
    return np.array([total, middle, block_sum((m2 + count * (mean - middle) ** 2).sum(0))])


@pytest.mark.parametrize("elements", [0, 1, 2047, 2048, 2049, 20_000])
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_chunks_and_their_merge_equal_the_definition(elements, density):
    generator = np.random.default_rng(elements)
    x, mask = generator.normal(size=elements) + 1e4, generator.random(elements) < density
    chunks = [chunk_moments(x, mask, first) for first in range(0, elements, CHUNK)]
    got = merge_sets(np.array(chunks).reshape(-1, 3)) if elements else np.zeros(3)
    chosen = x[mask]
    mean = chosen.mean() if len(chosen) else 0.0
    expected = [len(chosen), mean, ((chosen - mean) ** 2).sum()]
    np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-9)


@pytest.mark.parametrize("sets", [1, 2, THREADS, THREADS + 1, MERGE_INLINE + 1])
def test_many_sets_merge_to_their_union(sets):
    generator = np.random.default_rng(sets)
    parts = [generator.normal(size=generator.integers(0, 9)) + 50.0 for _ in range(sets)]
    stats = np.array(
        [
            [len(p), p.mean() if len(p) else 0.0, ((p - p.mean()) ** 2).sum() if len(p) else 0.0]
            for p in parts
        ]
    )
    union = np.concatenate(parts)
    mean = union.mean() if len(union) else 0.0
    np.testing.assert_allclose(
        merge_sets(stats), [len(union), mean, ((union - mean) ** 2).sum()], rtol=1e-12, atol=1e-9
    )
