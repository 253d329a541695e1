"""SIGTERM and Ctrl-C as a flag that a training loop reads at its safe points.

The handler does nothing but set the flag and write one line: saving from a signal handler would run
in the middle of an optimizer step. A second signal leaves at once through `os._exit`, without
cleanup; that is safe because a checkpoint exists either in full or not at all.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from rlhf_fast.errors import (
    EXIT_INTERRUPTED,
    EXIT_PREEMPTED,
    Interrupted,
    PeerError,
    Preempted,
    StoppedEarly,
)

# Wrappers (make, timeout, job managers) often pass a signal on that the terminal has already sent.
_ECHO_SECONDS = 0.25
_HANDLED = (signal.SIGTERM, signal.SIGINT)


@contextlib.contextmanager
def ending_at_once() -> Iterator[None]:
    """SIGTERM raises, until `StopSignals` takes over: while models load there is nothing to save.

    Raises:
        StoppedEarly: RF8303, where the signal arrives. Whoever catches it there may go on, or leave
            with an error of its own (a model that cannot be loaded), which becomes this one.
    """

    def stop(number: int, _frame: FrameType | None) -> None:
        # What is raised within a destructor or a callback of C code goes nowhere.
        _early.append(signal.Signals(number))
        raise _stopped_early()

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except (StoppedEarly, PeerError):
        raise
    except Exception as error:
        if not _early:
            raise
        raise _stopped_early() from error
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if previous is None else previous)
        _early.clear()


def _stopped_early() -> StoppedEarly:
    return StoppedEarly(
        "RF8303",
        "SIGTERM: the run stopped before its first step",
        remedy="start the same command again",
    )


# Signals that no `StopSignals` has taken over yet.
_early: list[signal.Signals] = []


class StopSignals:
    """Handlers from `__enter__` to `__exit__`; none are installed off the main thread.

    Args:
        once: a second signal is ignored, as who sends it knows to end what does not stop in time.
        silent: nothing is printed.

    Attributes:
        received: the first signal, or None.
    """

    def __init__(self, *, once: bool = False, silent: bool = False) -> None:
        self._once = once
        self._silent = silent
        self.received: signal.Signals | None = None
        self._received_at = 0.0
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in _HANDLED:
                self._previous[number] = signal.signal(number, self._handle)
            self.received = _early[0] if _early else self.received
            _early.clear()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            # None stands for a handler installed by C code, which Python cannot put back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous.clear()

    def raise_if_received(self, saved: Path | None) -> None:
        """Leave the run if a signal has arrived.

        Args:
            saved: the checkpoint to resume from, or None if there is none.

        Raises:
            Preempted: SIGTERM (RF8301, exit 75).
            Interrupted: SIGINT (RF8302, exit 130).
        """
        if self.received is None:
            return
        remedy = "start the same command again to go on from there"
        what = "the run stopped at a safe point and saved its state"
        if saved is None:
            remedy, what = (
                "start the same command again",
                "the run stopped before its first checkpoint",
            )
        where = "" if saved is None else str(saved)
        if self.received == signal.SIGTERM:
            raise Preempted("RF8301", f"SIGTERM: {what}", where=where, remedy=remedy)
        raise Interrupted("RF8302", f"interrupted: {what}", where=where, remedy=remedy)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.received is None:
            self.received, self._received_at = signal.Signals(number), now
            second = "" if self._once else "; a second signal leaves at once"
            if not self._silent:
                _say(f"stopping at the next safe point{second}")
        elif self._once:
            return
        elif now - self._received_at > _ECHO_SECONDS:
            _say("leaving at once; the last complete checkpoint is intact")
            os._exit(EXIT_PREEMPTED if number == signal.SIGTERM else EXIT_INTERRUPTED)


def _say(text: str) -> None:
    # os.write, because a buffered stream may be in the middle of a write when the signal arrives.
    with contextlib.suppress(OSError):
        os.write(2, f"\nrlhf_fast: {text}\n".encode())
