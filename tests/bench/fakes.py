"""A CUDA that runs on the CPU: as much of torch.cuda as `bench.kernels.device` calls."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch


class FakeCuda:
    """Time passes by `tick()`, memory grows by `allocate()`; events read the device's clock."""

    def __init__(self) -> None:
        self.now = 0.0  # ms
        self.allocated = 1000
        self.peak = 1000
        self.synchronized = 0
        self.flushes = 0
        self.order: list[str] = []

    def tick(self, milliseconds: float) -> None:
        self.now += milliseconds

    def allocate(self, size: int) -> None:
        self.allocated += size
        self.peak = max(self.peak, self.allocated)

    def free(self, size: int) -> None:
        self.allocated -= size

    def reset(self, *_: Any) -> None:
        self.peak = self.allocated

    def synchronize(self, *_: Any) -> None:
        self.synchronized += 1

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        cuda = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing
                self.time = float("nan")

            def record(self) -> None:
                self.time = cuda.now

            def elapsed_time(self, other: Event) -> float:
                return other.time - self.time

        properties = SimpleNamespace(
            L2_cache_size=50 << 20,
            name="Fake GPU",
            total_memory=80 << 30,
            major=9,
            minor=0,
            multi_processor_count=132,
        )
        replacements: dict[str, Any] = {
            "Event": Event,
            "get_device_properties": lambda device: properties,
            "synchronize": self.synchronize,
            "memory_allocated": lambda device: self.allocated,
            "max_memory_allocated": lambda device: self.peak,
            "reset_peak_memory_stats": self.reset,
        }
        for name, value in replacements.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr("bench.kernels.device.torch.empty", self._flushed)
        # Wall time passes as device time does, and reading it takes a microsecond.
        steps = itertools.count()
        monkeypatch.setattr(
            "bench.kernels.device.time.perf_counter",
            lambda: 1e-3 * self.now + 1e-6 * next(steps),
        )

    def _flushed(self, size: int, **_: Any) -> Any:
        assert size * 4 >= 4 * (50 << 20)

        def zero() -> None:
            self.order.append("flush")
            self.tick(0.5)

        return SimpleNamespace(zero_=zero)
