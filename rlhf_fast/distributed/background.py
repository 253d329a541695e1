"""Saves whose files are written in the background, while training goes on.

`BackgroundSaver.save` copies the state to host memory and returns; a thread writes the files. The
thread uses no collective at all, so nothing that the main thread and FSDP exchange can wait for it.
In a world of one it commits too. Among several ranks the commit needs all of them: they agree on it
in `poll`, on the main thread, which every rank calls at the same places. A process group of the
thread's own would let it commit a little earlier. But ranks would learn of an error at different
steps, one leaving while others enter the next forward, so they would have to agree on the main
thread all the same; and a rank that died would hold the others' threads in a collective.

Until the commit the old checkpoint is the newest one, whatever happens.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from rlhf_fast.distributed.agreement import ALONE, share
from rlhf_fast.distributed.checkpoint import Save
from rlhf_fast.distributed.durable import LOCAL, FileSystem
from rlhf_fast.distributed.host_buffers import HostBuffers
from rlhf_fast.distributed.world import World

_logger = logging.getLogger(__name__)


class BackgroundSaver:
    """Saves checkpoints one at a time in the background.

    All methods but `abandon` are collective: call them on the main threads of all ranks, in the
    same order.

    Args:
        root, keep_last, world, fs: as for `save`.
    """

    def __init__(
        self,
        root: Path,
        *,
        keep_last: int | None,
        world: World = ALONE,
        fs: FileSystem = LOCAL,
    ) -> None:
        self._root, self._keep_last, self._world, self._fs = Path(root), keep_last, world, fs
        self._buffers = HostBuffers()
        self._save: Save | None = None
        self._thread: threading.Thread | None = None
        self._path: Path | None = None
        self._error: BaseException | None = None

    def save(self, step: int, *, tensors: Mapping[str, Mapping[str, Tensor]], state: Any) -> None:
        """Wait for the save before this one, copy the state, and return: it may change now.

        Host memory for one state (this rank's part) is kept from the first save on.

        Raises:
            CheckpointError, EnvironmentFault: as `save`; also those of the save before.
        """
        self.wait()
        self._save = Save(
            self._root,
            step,
            tensors=tensors,
            state=state,
            keep_last=self._keep_last,
            world=self._world,
            fs=self._fs,
            buffers=self._buffers,
        )
        # Not a daemon: a process that ends in good order writes to the end.
        self._thread = threading.Thread(target=self._work, args=(self._save,), name="checkpoint")
        self._thread.start()

    def poll(self) -> Path | None:
        """Commit the save in the background if all its files are written.

        Returns:
            the committed directory, once; None while there is nothing to commit.

        Raises:
            CheckpointError, EnvironmentFault: it failed, on whatever rank; raised once, on all.
        """
        if self._thread is None:
            return None
        if not all(share(self._world, not self._thread.is_alive())):
            return None
        return self._settle()

    def wait(self) -> Path | None:
        """As `poll`, after the files have been written."""
        return None if self._thread is None else self._settle()

    def abandon(self) -> Path | None:
        """Let the thread end, and commit nothing among several ranks; not collective.

        For a run that ends with an error, of which the other ranks may not know. In a world of one
        the save is committed as ever; its own error is only logged.

        Returns:
            the committed directory, or None.
        """
        if self._thread is None:
            return None
        self._thread.join()
        path, error = self._path, self._error
        self._thread = self._save = self._path = self._error = None
        if error is not None:
            _logger.warning("the save in the background failed: %s", error)
        elif path is None:
            _logger.warning("the save in the background was not committed")
        return path

    def _work(self, save: Save) -> None:
        try:
            save.write()
            if self._world.size == 1:
                self._path = save.finish()
        except BaseException as error:  # it is raised on the main thread
            self._error = error

    def _settle(self) -> Path:
        assert self._thread is not None
        assert self._save is not None
        self._thread.join()
        save, path, error = self._save, self._path, self._error
        self._thread = self._save = self._path = self._error = None
        if error is not None:
            raise error
        return save.finish() if path is None else path
