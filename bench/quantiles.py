"""The spread that every figure is given with."""

from __future__ import annotations

from collections.abc import Sequence


def spread(samples: Sequence[float]) -> tuple[float | None, float | None]:
    """20th and 80th percentile, samples themselves; None for fewer than two."""
    if len(samples) < 2:
        return None, None
    ordered = sorted(samples)
    last = len(ordered) - 1
    return ordered[int(0.2 * last)], ordered[round(0.8 * last)]
