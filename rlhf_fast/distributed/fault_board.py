"""Who failed first, and what every rank is doing: notes in the store that made the process group.

The store outlives a broken collective. So of all ranks that leave because one has failed, the one
that was first can say why, and those after it can keep quiet.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from datetime import timedelta

import torch.distributed as dist
from torch.distributed.distributed_c10d import Store

_PREFIX = "rlhf_fast"
# What torch's backends call it, when a peer's end of a connection is gone, or it never came.
_TIMED_OUT = ("timed out", "timeout")
_GONE = (
    "connection closed",
    "connection reset",
    "broken pipe",
    "connection refused",
    "gloo",
    "nccl",
)


class FaultBoard:
    """Notes of the ranks.

    Args:
        store: of the process group; None: a world of one, nothing is written.
        rank: of this process.
        size: number of ranks.
    """

    def __init__(self, store: Store | None, rank: int, size: int) -> None:
        self._store = store
        self._rank = rank
        self._size = size
        self._meetings = 0

    def note(self, doing: str) -> None:
        """Say what this rank is doing now."""
        if self._store is not None:
            with _unless_gone():
                self._store.set(f"{_PREFIX}/doing/{self._rank}", doing)

    def doing(self) -> list[str]:
        """What each rank said last."""
        found = []
        for rank in range(self._size):
            text = "nothing yet"
            key = f"{_PREFIX}/doing/{rank}"
            with _unless_gone():
                if self._store is not None and self._store.check([key]):
                    text = self._store.get(key).decode("utf-8", errors="replace")
            found.append(text)
        return found

    def come(self, wait_seconds: float = 0.0) -> bool:
        """Come to the next meeting of all ranks; whether all others came within the time.

        Every rank has to call it as often as any other. Who does not wait is told false.
        """
        self._meetings += 1
        if self._store is None:
            return True
        with _unless_gone():
            self._store.set(self._meeting(self._meetings, self._rank), "here")
            # Who came to this one is past the last: nobody asks for it any more.
            if self._meetings > 1:
                self._store.delete_key(self._meeting(self._meetings - 1, self._rank))
            if wait_seconds > 0:
                others = [self._meeting(self._meetings, rank) for rank in range(self._size)]
                self._store.wait(others, timedelta(seconds=wait_seconds))
                return True
        return False

    @staticmethod
    def _meeting(number: int, rank: int) -> str:
        return f"{_PREFIX}/meeting/{number}/{rank}"

    def failures(self) -> int:
        """How many ranks have reported that they failed."""
        count = 0
        if self._store is not None:
            with _unless_gone():
                count = self._store.add(f"{_PREFIX}/failed", 0)
        return count

    def report_failure(self) -> bool:
        """Whether this rank is the first of all to have failed, and so the one to say why."""
        first = True
        if self._store is not None:
            with _unless_gone():
                first = self._store.add(f"{_PREFIX}/failed", 1) == 1
        return first


@contextlib.contextmanager
def _unless_gone() -> Iterator[None]:
    """The store may have ended with the process that held it; a note is not worth a failure."""
    with contextlib.suppress(dist.DistError, RuntimeError):
        yield


def collective_fault(error: BaseException) -> str | None:
    """`timeout`, `gone`, or None where an error does not come from a collective."""
    if not isinstance(error, RuntimeError):
        return None
    text = str(error).lower()
    known = isinstance(error, dist.DistError) or any(word in text for word in _GONE)
    if not known and not any(word in text for word in _TIMED_OUT):
        return None
    return "timeout" if any(word in text for word in _TIMED_OUT) else "gone"
