"""The checkpoints that a run writes, at once or in the background."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from rlhf_fast.distributed import BackgroundSaver, save
from rlhf_fast.distributed.world import World


class Saves:
    """Writes checkpoints and knows the last one.

    Args:
        root, keep_last, world: as for `rlhf_fast.distributed.save`.
        in_background: see `rlhf_fast.distributed.background`.

    Attributes:
        last: directory of the last checkpoint that is complete, or None.
    """

    def __init__(
        self, root: Path, *, keep_last: int | None, world: World, in_background: bool
    ) -> None:
        self.last: Path | None = None
        self._root, self._keep_last, self._world = root, keep_last, world
        self._background: BackgroundSaver | None = None
        if in_background:
            self._background = BackgroundSaver(root, keep_last=keep_last, world=world)

    def save(
        self, step: int, *, tensors: Mapping[str, Mapping[str, Tensor]], state: Any
    ) -> Path | None:
        """Commit a checkpoint and return its directory; None if it is written in the background."""
        if self._background is not None:
            self.finish()
            self._background.save(step, tensors=tensors, state=state)
            return None
        self.last = save(
            self._root,
            step,
            tensors=tensors,
            state=state,
            keep_last=self._keep_last,
            world=self._world,
        )
        return self.last

    def poll(self) -> None:
        """Commit a save in the background if it is written."""
        if self._background is not None:
            self.last = self._background.poll() or self.last

    def finish(self) -> Path | None:
        """Wait for a save in the background and commit it; None if there is none."""
        path = None if self._background is None else self._background.wait()
        self.last = path or self.last
        return path

    def abandon(self) -> None:
        """End without talking to other ranks; see `BackgroundSaver.abandon`."""
        if self._background is not None:
            self.last = self._background.abandon() or self.last
