"""Seconds and peak memory of the phases of a step, whoever does it."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from . import resident

REST = "rest"


class Meter:
    """A stop watch with one hand: whatever phase was entered last is running.

    Args:
        base: bytes resident before the first step, with the models and nothing else.
    """

    def __init__(self, base: int) -> None:
        self.base = base
        self.seconds: dict[str, float] = defaultdict(float)
        self.extra: dict[str, int] = defaultdict(int)
        self._phase = REST
        self._since = time.perf_counter()
        self._cpu = time.process_time()

    def begin(self) -> None:
        """A step begins."""
        self.seconds.clear()
        self.extra.clear()
        resident.reset_peak()
        self._phase, self._since, self._cpu = REST, time.perf_counter(), time.process_time()

    def enter(self, phase: str) -> str:
        """The phase changes; returns what it was."""
        now = time.perf_counter()
        before, self._phase = self._phase, phase
        self.seconds[before] += now - self._since
        self.extra[before] = max(self.extra[before], resident.peak() - self.base)
        resident.reset_peak()
        self._since = time.perf_counter()
        return before

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """What runs inside is this phase."""
        before = self.enter(name)
        try:
            yield
        finally:
            self.enter(before)

    def end(self) -> dict[str, Any]:
        """The step is over: seconds and bytes above the base by phase, and of the whole step.

        `cpu_seconds` is the processor time of all threads, which a busy machine distorts less.
        """
        self.enter(REST)
        seconds = dict(self.seconds)
        extra = {name: float(size) for name, size in self.extra.items()}
        return {
            "cpu_seconds": time.process_time() - self._cpu,
            "seconds": seconds | {"step": sum(seconds.values())},
            "extra_bytes": extra | {"step": max(extra.values())},
        }
