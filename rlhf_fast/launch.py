"""What torchrun says of itself in the environment."""

from __future__ import annotations

import os

from rlhf_fast.errors import EnvironmentFault


def launched_ranks() -> int:
    """Processes that torchrun started for this run; 1 without it.

    Raises:
        EnvironmentFault: RF7055, WORLD_SIZE is no number of processes.
    """
    text = os.environ.get("WORLD_SIZE") or "1"
    if not (text.isascii() and text.isdecimal() and int(text) > 0):
        raise EnvironmentFault(
            "RF7055",
            f"WORLD_SIZE={text!r} is no number of processes",
            where="environment",
            expected="a whole number from 1 on, as torchrun sets it",
            remedy="start under torchrun, or unset it",
        )
    return int(text)
