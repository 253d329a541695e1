"""The commit protocol of checkpoints: a crash at any instant leaves a complete old or new state.

    root/step-00000010.tmp-<pid>-<nonce>/   being written; never read
    root/step-00000010/                     committed: the rename is the commit
        <name>.safetensors ...  state.json  manifest.json (written last)
    root/LATEST                             the last committed name, for people and scripts

A save writes into a fresh directory, fsyncs every file, writes the manifest, fsyncs the directory,
renames it, fsyncs the parent, replaces `LATEST`, and only then prunes. Reading never depends on
`LATEST`: it orders the directories by the commit number in their manifests and takes the newest
that verifies. So a lost or damaged `LATEST`, or a crash between rename and pointer, costs nothing.

State is a set of flat tensor dictionaries plus one JSON tree. There is no pickle in either
direction. Several ranks write into the one directory that rank 0 has made, each the boxes that it
holds into files of its own (`<name>.rank-<r>.safetensors`), fsynced and hashed by itself. Rank 0
writes what is the same everywhere, `state.json` among it, and commits when all ranks have said that
they are done; if one says that it has failed, the directory is removed and all raise. One run per
directory is assumed; a run directory's lock sees to that.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from rlhf_fast.distributed.agreement import ALONE, agree
from rlhf_fast.distributed.checkpoint_directory import STATE_NAME, prune
from rlhf_fast.distributed.checkpoint_writer import CheckpointWriter
from rlhf_fast.distributed.dcp import ShardWriter, ShareOfState, check_placements, full_name
from rlhf_fast.distributed.durable import LOCAL, FileSystem, storage_fault
from rlhf_fast.distributed.host_buffers import HostBuffers
from rlhf_fast.distributed.json_state import dump_json, to_json
from rlhf_fast.distributed.manifest import valid_file_name
from rlhf_fast.distributed.tensor_file import SUFFIX, check_storable
from rlhf_fast.distributed.world import World


class Save:
    """A save in three parts: made here, then `write`, then `finish`.

    `__init__` and `finish` are collective and belong to the main thread. `write` works on this
    rank's disk alone, without any collective: it may run in another thread.

    Args, errors of `__init__`: as for `save`.
        buffers: the state is copied there first, so that it may change while it is written.
    """

    def __init__(
        self,
        root: Path,
        step: int,
        *,
        tensors: Mapping[str, Mapping[str, Tensor]],
        state: Any,
        keep_last: int | None,
        world: World = ALONE,
        fs: FileSystem = LOCAL,
        buffers: HostBuffers | None = None,
    ) -> None:
        if keep_last is not None and keep_last < 1:
            raise ValueError(f"keep_last must be >= 1 or None, got {keep_last}")
        for name in tensors:
            if not valid_file_name(name) or name.endswith(SUFFIX):
                raise ValueError(f"tensors keys are file stems without {SUFFIX}, got {name!r}")
        self._root, self._keep_last, self._fs, self._world = Path(root), keep_last, fs, world
        self._writer = CheckpointWriter(root, step, fs, world=world)
        self._storage = ShardWriter(self._writer, groups=tuple(tensors))
        self._planner = ShareOfState(world)
        self._state = b""
        self._error: Exception | None = None
        try:
            self._plan_for(tensors, state)
            if buffers is not None:
                self._planner.stage(buffers)
        except Exception as error:
            self._error = error
        agree(world, self._error)
        try:
            self._writer.begin()
        except BaseException:
            self._writer.abort()
            raise

    def _plan_for(self, tensors: Mapping[str, Mapping[str, Tensor]], state: Any) -> None:
        self._state = dump_json(to_json(state), sort_keys=False)
        flat: dict[str, Any] = {}
        for group, named in tensors.items():
            for name, tensor in named.items():
                check_storable(name, tensor)
                check_placements(name, tensor, self._world)
                flat[full_name(group, name)] = tensor
        self._planner.set_up_planner(flat, is_coordinator=self._world.is_main)
        plan = self._planner.create_local_plan()
        self._plan = self._planner.finish_plan(self._storage.prepare_local_plan(plan))

    def write(self) -> None:
        """Write and fsync this rank's files. An error is kept for `finish`, where all learn it."""
        try:
            self._storage.write_data(self._plan, self._planner)
            if self._world.is_main:
                self._writer.add_bytes(STATE_NAME, self._state)
        except OSError as error:
            self._error = storage_fault(error, self._root)
            self._error.__cause__ = error
        except Exception as error:
            self._error = error
        except BaseException:
            self._writer.abort()
            raise

    def finish(self) -> Path:
        """Commit if every rank has written its files, prune, and return the directory.

        Raises:
            CheckpointError, EnvironmentFault: as `save`, on all ranks if it is one's.
        """
        try:
            agree(self._world, self._error)
            self._writer.collect()
            path = self._writer.commit()
        except BaseException:
            self._writer.abort()
            raise
        if self._keep_last is not None and self._world.is_main:
            prune(self._root, self._keep_last, self._fs)
        return path


def save(
    root: Path,
    step: int,
    *,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Any,
    keep_last: int | None,
    world: World = ALONE,
    fs: FileSystem = LOCAL,
) -> Path:
    """Save a checkpoint and commit it atomically, then prune old ones.

    Args:
        root: directory that holds the checkpoints of a run; created if missing. All ranks see it.
        step: training step, >= 0. Saving a step again replaces it.
        tensors: file stem (`actor`, `actor_optimizer`, ...) -> flat dictionary of tensors. Views of
            a shared storage are written in full each; use `module_tensors` to store tied ones once.
            Ranks give the same names; DTensors are written by those that hold their shards,
            ordinary tensors by rank 0.
        state: tree of None, bool, int, float, str, list, tuple, dict; floats come back bit-exact.
            That of rank 0 is stored.
        keep_last: how many checkpoints to keep, this one included, >= 1; None keeps all.
        world: the ranks that save together, each of which calls this.
        fs: where the system calls go.

    Returns:
        the committed directory `root/step-<8 digits>`.

    Raises:
        CheckpointError: something that cannot be stored, before anything is written (RF8004);
            another rank could not take part (RF8010).
        EnvironmentFault: the disk is full or refuses (RF7101), or the ranks do not share it
            (RF7106); older checkpoints are intact and the unfinished directory is gone.
    """
    started = Save(
        root, step, tensors=tensors, state=state, keep_last=keep_last, world=world, fs=fs
    )
    started.write()
    return started.finish()
