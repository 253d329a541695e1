"""`Run` on several ranks: the first owns the directory, the others follow its decisions.

Every rank enters, saves, completes and leaves together. Rank 0 takes the lock, looks into the
directory and changes it; the others are told what it found, so all decide alike between a start, a
resume and nothing to do. Checkpoints are read and written by all: the directory must be one that
all see. A stop signal to any rank stops all of them at the same step.
"""

from __future__ import annotations

import contextlib
import io
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TypeVar

from rlhf_fast.distributed.agreement import on_main
from rlhf_fast.distributed.world import World
from rlhf_fast.errors import EXIT_INTERRUPTED
from rlhf_fast.metrics import MetricLogger
from rlhf_fast.stages.progress import ProgressDisplay
from rlhf_fast.stages.run import Run
from rlhf_fast.stages.stop_signals import StopSignals

T = TypeVar("T")


class RunOnRanks(Run):
    """A stage that owns an output directory through its first rank.

    Args:
        output_dir, settings: as for `Run`.
        world: the ranks.
    """

    def __init__(self, output_dir: Path | str, *, world: World, **settings: Any) -> None:
        super().__init__(output_dir, world=world, **settings)
        # torchrun passes signals on, and ends by itself what does not stop in time.
        self._signals = StopSignals(once=True, silent=not world.is_main)
        if not world.is_main:
            self._display = ProgressDisplay(quiet=True, stream=Nowhere())
        world.board.note("opening the run directory")

    def on_main(self, call: Callable[[], T]) -> T:
        """What `call` returns on rank 0, on all of them; it is called there alone.

        Args:
            call: returns plain values, as JSON has them.

        Raises:
            RLHFError: what `call` raised, on all ranks.
        """
        found: T = on_main(self.world, call)
        return found

    def should_stop(self) -> bool:
        """Whether a stop signal has arrived on some rank: all then know of it."""
        for number in (signal.SIGTERM, signal.SIGINT):
            if self.world.any(self._signals.received == number):
                self._signals.received = number
                return True
        return False

    @contextlib.contextmanager
    def _noted(self, name: str) -> Iterator[None]:
        self.world.board.note(name)
        with super().phase(name):
            yield

    def phase(self, name: str) -> AbstractContextManager[None]:
        """As `Run.phase`; if the run hangs, the ranks say in which phase each of them was."""
        return self._noted(name)


def exit_code_of(fault: BaseException | None) -> int:
    """What a process leaves with: 0 without a fault, 1 for one that nobody foresaw."""
    if fault is None:
        return 0
    if isinstance(fault, KeyboardInterrupt):
        return EXIT_INTERRUPTED
    code: int = getattr(fault, "exit_code", 1)
    return code


class NoMetrics(MetricLogger):
    """The metric log of a rank that keeps none."""

    def __init__(self) -> None:
        self._closed = False

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Nothing."""

    def position(self) -> int:
        """0."""
        return 0

    def truncate(self, position: int) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


class Nowhere(io.StringIO):
    """A stream that forgets what is written to it."""

    def write(self, text: str) -> int:
        return len(text)
