"""Independent models on the cores of a CPU: each on its share of them, at the same time.

Most operations of a small model are too short for two threads, and every one of them would wait for
the slower. Two models side by side wait for each other once a minibatch. On an accelerator
nothing is gained: one model fills it.
"""

from __future__ import annotations

import contextvars
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TypeVar

import torch

T = TypeVar("T")


class SideBySide:
    """Runs calls that share nothing, several at a time where that pays.

    Args:
        independent: no two calls use the same module or config; otherwise they run one by one.
        most: calls at a time; 0: as many as PyTorch has threads.
    """

    def __init__(self, independent: bool, most: int = 0) -> None:
        self._independent = independent
        self._most = most
        self._pool: ThreadPoolExecutor | None = None

    def run(self, calls: Sequence[Callable[[], T]], device: torch.device) -> list[T]:
        """The results of all calls, in their order.

        The calling thread takes part; grad mode and context variables are the caller's everywhere.
        What would leave half of the threads idle in the last round runs by itself, on all of them:
        of three equal calls on two threads, the last. The bits of a result depend on the number of
        threads that its call gets, as those of any product of PyTorch, and on nothing else.

        Args:
            calls: independent of each other.
            device: where they compute; side by side on a CPU only.

        Raises:
            BaseException: what the earliest call in order raised, when all have ended.
        """
        threads = torch.get_num_threads()
        workers = min(len(calls), self._most or threads)
        if not self._independent or device.type != "cpu" or workers < 2:
            return [call() for call in calls]
        left = len(calls) % workers
        alone = left if 2 * left <= workers and threads >= workers else 0
        together = self._together(calls[: len(calls) - alone], workers, threads)
        return together + [call() for call in calls[len(calls) - alone :]]

    def _together(self, calls: Sequence[Callable[[], T]], workers: int, threads: int) -> list[T]:
        """The results of calls that several workers take in turns."""
        share, grad = max(1, threads // workers), torch.is_grad_enabled()
        todo = deque(enumerate(calls))
        done: dict[int, T] = {}
        failed: dict[int, BaseException] = {}

        def work() -> None:
            torch.set_num_threads(share)  # of this thread
            with torch.set_grad_enabled(grad):
                while not failed:
                    try:
                        index, call = todo.popleft()
                    except IndexError:
                        return
                    try:
                        done[index] = call()
                    except BaseException as error:
                        failed[index] = error

        if self._pool is None:
            most = (self._most or threads) - 1
            self._pool = ThreadPoolExecutor(most, thread_name_prefix="side-by-side")
        others = [
            self._pool.submit(contextvars.copy_context().run, work) for _ in range(workers - 1)
        ]
        try:
            work()
            for other in others:
                other.result()
        finally:
            wait(others)  # whatever stopped this thread: nobody computes on when it has returned
            torch.set_num_threads(threads)
        if failed:
            raise failed[min(failed)]
        return [done[index] for index in range(len(calls))]
