"""How generation is going, while it runs and afterwards."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple


class Progress(NamedTuple):
    """What a progress bar wants to know.

    Args:
        finished: samples done.
        samples: samples in all.
        tokens: response tokens drawn so far.
        running: samples that decode now.
        waiting: samples that wait for room.
        cache_use: part of the key-value memory in use, 0 to 1.
        tokens_per_second: response tokens drawn per second of wall clock since the start.
    """

    finished: int
    samples: int
    tokens: int
    running: int = 0
    waiting: int = 0
    cache_use: float = 0.0
    tokens_per_second: float = 0.0


class GenerationSummary(NamedTuple):
    """What one call of the generator took.

    Args:
        tokens: response tokens drawn.
        seconds: of wall clock.
        preemptions: samples that gave their pages back and were recomputed.
        peak_cache_use: largest part of the key-value memory that was held, 0 to 1; None where
            there are no pages.
    """

    tokens: int
    seconds: float
    preemptions: int = 0
    peak_cache_use: float | None = None

    @property
    def tokens_per_second(self) -> float:
        """Response tokens per second of wall clock."""
        return self.tokens / max(self.seconds, 1e-9)


class ProgressReports:
    """Calls `report`, but not more often than every `seconds`; the last report always comes.

    A decoding step of a small model takes less than a millisecond, so nothing is counted for a
    report that is not due.

    Args:
        report: takes the progress.
        seconds: between two reports; 0: one a burst.
    """

    def __init__(self, report: Callable[[Progress], None], seconds: float = 0.0) -> None:
        self._report = report
        self._seconds = seconds
        self._next = 0.0

    def give(self, progress: Callable[[], Progress], *, last: bool) -> None:
        """Report `progress()` if it is time, or if it is the `last`."""
        now = time.perf_counter()
        if last or now >= self._next:
            self._next = now + self._seconds
            self._report(progress())
