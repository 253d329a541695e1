"""Run a test's work in a forked child: torch is loaded already, so a child costs milliseconds."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch

from rlhf_fast.errors import RLHFError


def in_child(work: Callable[[], None]) -> int:
    """Fork and return the child's pid; the child exits 0, or with the error's exit code.

    The child stays on one thread: the parent's OpenMP workers do not exist in it, and a parallel
    operation would wait for them for ever.
    """
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            torch.set_num_threads(1)
            work()
            code = 0
        except RLHFError as error:
            code = error.exit_code
        finally:
            os._exit(code)
    return pid
