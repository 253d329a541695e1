"""What an engine is doing, and that it does one thing at a time."""

from __future__ import annotations

import enum
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from rlhf_fast.errors import GenerationError


class Mode(enum.Enum):
    """What the engine is doing."""

    TRAIN = "train"
    GENERATE = "generate"
    SCORE = "score"


class Modes:
    """The mode of an engine: TRAIN outside of all blocks."""

    _mode = Mode.TRAIN

    @property
    def mode(self) -> Mode:
        """What the engine is doing."""
        return self._mode

    @contextmanager
    def _in(self, mode: Mode) -> Iterator[None]:
        if self._mode is not Mode.TRAIN:
            raise GenerationError(
                "RF4033",
                f"the engine cannot {mode.value} while it is in mode {self._mode.value}",
                expected="one mode at a time: generate, then score, then train",
                remedy="leave the block of the other mode first",
            )
        self._mode = mode
        try:
            yield
        finally:
            self._mode = Mode.TRAIN

    @contextmanager
    def scoring(self) -> Iterator[None]:
        """While roles read finished sequences: weights may not change."""
        with self._in(Mode.SCORE):
            yield

    def guard(self, optimizer: torch.optim.Optimizer) -> None:
        """Make every step of `optimizer` outside TRAIN an error (RF4034)."""

        def refuse(*_: Any) -> None:
            if self._mode is not Mode.TRAIN:
                raise GenerationError(
                    "RF4034",
                    f"an optimizer step while the engine is in mode {self._mode.value}",
                    expected="weights that do not change while they are read",
                    remedy="step after the rollout and its scoring",
                )

        optimizer.register_step_pre_hook(refuse)
