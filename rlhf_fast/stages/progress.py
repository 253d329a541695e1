"""Progress of long work, and where its time goes.

On a terminal: rich bars. Elsewhere (a log file, a pipe, `quiet`): a plain line now and then,
because a bar redrawn into a log file is thousands of lines.
"""

from __future__ import annotations

import contextlib
import re
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import TextIO, TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

T = TypeVar("T")

PLAIN_SECONDS = 10.0
QUIET_SECONDS = 60.0

_CONTROL = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]|[\x00-\x1f\x7f-\x9f]")


def printable(text: object) -> str:
    """`text` without escape sequences and control characters.

    Model output must not drive a terminal.
    """
    return _CONTROL.sub("", str(text))


class PhaseTimer:
    """Seconds spent in named phases of a step, by the host's clock.

    Work queued on a GPU counts where the host waits for it.
    """

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the duration of the block to `time/<name>`, also when it raises."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            elapsed = time.perf_counter() - begin
            key = f"time/{name}"
            self._seconds[key] = self._seconds.get(key, 0.0) + elapsed

    def take(self) -> dict[str, float]:
        """`{"time/<name>": seconds}` since the last call; starts again from zero."""
        taken, self._seconds = self._seconds, {}
        return taken


class ProgressBar:
    """One piece of work with a known or unknown number of steps; made by `ProgressDisplay.bar`."""

    def __init__(
        self, display: ProgressDisplay, description: str, total: int | None, start: int
    ) -> None:
        self.description = printable(description)
        self.total = total
        self.completed = start
        self._display = display
        self._task: TaskID | None = None
        self._fields = ""
        self._note = ""
        self._last_line = float("-inf")

    def advance(self, steps: int = 1, **fields: object) -> None:
        """Count `steps` more and show `fields` (numbers are shortened) beside the bar."""
        self.completed += steps
        if fields:
            self._fields = _joined(fields)
        self._display.update(self)

    def note(self, **fields: object) -> None:
        """Show `fields` after those of `advance` until the next note: how the step itself goes."""
        self._note = _joined(fields)
        self._display.update(self)

    @property
    def shown(self) -> str:
        """The fields, and the note if there is one."""
        return " ".join(part for part in (self._fields, self._note) if part)

    def line(self) -> str:
        """`sft: 120/400 (30%) loss=1.234`."""
        count = f"{self.completed}"
        if self.total:
            count += f"/{self.total} ({100 * self.completed // self.total}%)"
        return f"{self.description}: {count} {self.shown}".rstrip()


class ProgressDisplay:
    """All bars of a run on one screen.

    Args:
        quiet: plain lines, rarely, even on a terminal.
        stream: where to write; standard output by default.
    """

    def __init__(self, *, quiet: bool = False, stream: TextIO | None = None) -> None:
        self._stream = sys.stdout if stream is None else stream
        self._interval = QUIET_SECONDS if quiet else PLAIN_SECONDS
        self._rich: Progress | None = None
        self._open: list[ProgressBar] = []
        console = Console(file=self._stream)
        if console.is_terminal and not quiet:
            self._rich = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[shown]}", markup=False),
                console=console,
            )

    @contextlib.contextmanager
    def bar(
        self, description: str, total: int | None = None, *, start: int = 0
    ) -> Iterator[ProgressBar]:
        """Show one bar while the block runs.

        Args:
            description: what is being done.
            total: number of steps, None if unknown.
            start: steps done before, by the run that is being resumed.
        """
        bar = ProgressBar(self, description, total, start)
        self._begin(bar)
        try:
            yield bar
        finally:
            self._end(bar)

    def track(self, items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
        """Yield `items` and count them."""
        with self.bar(description, total) as bar:
            for item in items:
                yield item
                bar.advance()

    def note(self, **fields: object) -> None:
        """`ProgressBar.note` of the bar that was opened last, if one is open."""
        if self._open:
            self._open[-1].note(**fields)

    def update(self, bar: ProgressBar) -> None:
        """Redraw a bar, or print its line if the last one is long enough ago."""
        if self._rich is not None and bar._task is not None:
            self._rich.update(bar._task, completed=bar.completed, shown=bar.shown)
            return
        now = time.monotonic()
        if now - bar._last_line >= self._interval:
            bar._last_line = now
            self._print(bar.line())

    def _begin(self, bar: ProgressBar) -> None:
        self._open.append(bar)
        if self._rich is None:
            bar._last_line = time.monotonic()
            self._print(bar.line())
            return
        if len(self._open) == 1:
            self._rich.start()
        bar._task = self._rich.add_task(
            bar.description, total=bar.total, completed=bar.completed, shown=""
        )

    def _end(self, bar: ProgressBar) -> None:
        self._open.remove(bar)
        if self._rich is None:
            self._print(bar.line())
            return
        if not self._open:
            self._rich.stop()
            for task in list(self._rich.task_ids):
                self._rich.remove_task(task)

    def _print(self, line: str) -> None:
        # A closed pipe (`| head`) must not end a training run.
        with contextlib.suppress(OSError, ValueError):
            print(line, file=self._stream, flush=True)


def _joined(fields: Mapping[str, object]) -> str:
    return " ".join(f"{name}={_short(value)}" for name, value in fields.items())


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else printable(value)
