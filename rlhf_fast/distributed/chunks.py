"""How a stored tensor is made of chunks that lie in several files."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class ChunkRecord:
    """One chunk of a stored tensor: the file that holds it under the tensor's name, its place."""

    file: str
    offsets: tuple[int, ...]
    lengths: tuple[int, ...]


@dataclass(frozen=True)
class StoredRecord:
    """A tensor of a group: dtype, whole shape, and the chunks that tile it exactly."""

    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[ChunkRecord, ...]


def tiling_problem(shape: tuple[int, ...], chunks: tuple[ChunkRecord, ...]) -> str:
    """Why the chunks do not tile a tensor; empty if they do.

    Shards of a mesh form a grid: along each dim the intervals of all chunks tile it, and every
    combination of intervals occurs once. That is decided in n log n; boxes in general would take
    every pair.
    """
    if any(len(c.offsets) != len(shape) or len(c.lengths) != len(shape) for c in chunks):
        return "have another number of dims"
    places = {(c.offsets, c.lengths) for c in chunks}
    if len(places) != len(chunks):
        return "overlap"
    if math.prod(shape) == 0:
        whole = ((0,) * len(shape), shape)
        return "" if places == {whole} else "do not cover it"
    count = 1
    for dim, size in enumerate(shape):
        intervals = sorted({(c.offsets[dim], c.lengths[dim]) for c in chunks})
        count *= len(intervals)
        position = 0
        for offset, length in intervals:
            if offset < position:
                return "overlap"
            if offset > position or not length:
                return "do not cover it"
            position = offset + length
        if position != size:
            return "do not cover it" if position < size else "reach beyond it"
    return "" if count == len(chunks) else "do not cover it"
