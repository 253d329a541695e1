"""What runs out of device memory is done again in halves: the same step, on all ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from rlhf_fast.errors import EnvironmentFault, LoneOutOfMemory
from rlhf_fast.protocols import WorkSplit
from rlhf_fast.transfer import release_cached


def in_halves(
    call: Callable[[], object],
    split: WorkSplit,
    *,
    halve: Callable[[], object],
    start_anew: Callable[[], object] = lambda: None,
) -> int:
    """Run `call` until its memory suffices on all ranks; returns how often it was done again.

    What an attempt had made is the caller's to drop. No exception is kept: its frames would hold
    the tensors that did not fit.

    Args:
        call: takes what `halve` left. No collective in it but those inside of forwards and
            backwards, and those before the first: a rank that breaks off joins none that follow.
        split: the ranks.
        halve: makes the next attempt smaller on every rank, or raises.
        start_anew: before that; see `Roles`.

    Raises:
        LoneOutOfMemory: of this rank alone, and the others are stuck; the next run is to start with
            what was halved.
    """
    redone = 0
    while True:
        try:
            if not split.exhausted(_exhausts(call)):
                return redone
        except LoneOutOfMemory:
            halve()
            raise
        release_cached()
        start_anew()
        halve()
        redone += 1


def _exhausts(call: Callable[[], object]) -> bool:
    try:
        call()
    except torch.OutOfMemoryError:
        return True
    return False


class TokenBudget:
    """Tokens of one forward: as configured, or what was found to fit.

    Args:
        configured: `microbatch_tokens`.

    Attributes:
        tokens: of one forward at most.
    """

    def __init__(self, configured: int) -> None:
        self.configured = configured
        self.tokens = configured

    def halve(self, longest: int) -> None:
        """Half as many from now on, but no fewer than the longest row has.

        Raises:
            EnvironmentFault: RF7061, that is what there was already.
        """
        fewer = max(self.tokens // 2, longest)
        if fewer >= self.tokens:
            raise EnvironmentFault(
                "RF7061",
                f"out of memory with {self.tokens} tokens in a forward; the longest row has "
                f"{longest}",
                where="microbatch_tokens",
                remedy="set gradient_checkpointing=true, see `rlhf-fast plan` for what else saves "
                "memory, or shorten the rows (sampling.max_new_tokens)",
            )
        self.tokens = fewer

    def in_halves(
        self,
        forwards: Callable[[], object],
        split: WorkSplit,
        *,
        longest: int,
        start_anew: Callable[[], object] = lambda: None,
    ) -> None:
        """Make forwards of so many tokens; of half as many if memory runs out on some rank.

        Args:
            forwards, split, start_anew: as `call` and so on of `in_halves`.
            longest: tokens of the longest row.

        Raises:
            EnvironmentFault: as `halve`.
            LoneOutOfMemory: as `in_halves`.
        """
        in_halves(forwards, split, halve=lambda: self.halve(longest), start_anew=start_anew)

    def state_dict(self) -> dict[str, int]:
        """What a checkpoint must hold: a resumed run takes the forwards that this one took."""
        return {"configured": self.configured, "tokens": self.tokens}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a checkpoint; what was found under another setting does not count."""
        if state["configured"] == self.configured:
            self.tokens = int(state["tokens"])


def require_smaller_rollout(halve: Callable[[], bool]) -> None:
    """Have the generator hold half as many samples at a time.

    Raises:
        EnvironmentFault: RF7062, it cannot.
    """
    if not halve():
        raise EnvironmentFault(
            "RF7062",
            "out of memory while responses were drawn, with one sample at a time",
            where="rollout.max_batch",
            remedy="lower engine.kv_gb or engine.prefill_tokens, or see `rlhf-fast plan` for what "
            "saves memory",
        )
