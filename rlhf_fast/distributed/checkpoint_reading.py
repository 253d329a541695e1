"""Opening a checkpoint: which one, whether every byte of it is what was written, what is in it.

Among several ranks rank 0 says which directories there are; each file is hashed by one rank; and
what one finds, all act on. So every rank opens the same checkpoint or raises.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from rlhf_fast.distributed.agreement import ALONE, agree, on_main, share
from rlhf_fast.distributed.checkpoint_directory import (
    LATEST_NAME,
    STATE_NAME,
    Candidate,
    candidates,
    committed_names,
    unfinished,
)
from rlhf_fast.distributed.json_state import from_json, parse_json
from rlhf_fast.distributed.manifest import MANIFEST_NAME, Manifest, corrupt, read_verified
from rlhf_fast.distributed.stored import ShardFile, StoredTensors, dealt
from rlhf_fast.distributed.world import World
from rlhf_fast.errors import CheckpointError
from rlhf_fast.small_files import read_small

_MAX_POINTER_BYTES = 4096
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint.

    Attributes:
        step: the training step it was saved at.
        path: its directory.
        tensors: file stem -> lazily read, read-only mapping of name to tensor (on the CPU).
        state: the JSON tree that was saved, tuples and non-finite floats restored.
        notices: what the user should know: damaged newer checkpoints, unfinished saves.
    """

    step: int
    path: Path
    tensors: Mapping[str, StoredTensors]
    state: Any
    notices: tuple[str, ...] = ()
    _files: tuple[ShardFile, ...] = field(default=(), repr=False)

    def close(self) -> None:
        """Let go of its files, once all that is wanted of them is copied.

        An open file takes room on the disk after it is deleted, as older checkpoints are.
        """
        for file in self._files:
            file.close()


def load(
    root: Path, step: int | Literal["latest"] | None = None, *, world: World = ALONE
) -> Checkpoint:
    """Open a checkpoint after verifying every byte of it.

    Any number of ranks may have saved it; it may be loaded into tensors sharded in any way.

    Args:
        root: directory given to `save`.
        step: a step, or None or `latest` for the newest state. A damaged newest one is passed over,
            with a notice, for the newest that verifies; an explicit step is never replaced by
            another.
        world: the ranks that load together, each of which calls this.

    Raises:
        CheckpointError: no checkpoint there (RF8003), none that verifies or a damaged explicit
            step, the file named (RF8001), another format version (RF8002), or pickled files in it
            (RF8009).
    """
    root = Path(root)
    found = _candidates(root, world)
    if step is None or step == "latest":
        opened = _load_newest(root, found, world)
    else:
        opened = _load_step(root, found, step, world)
    if world.is_main:
        for notice in opened.notices:
            _logger.warning("%s", notice)
    return opened


def _candidates(root: Path, world: World) -> list[Candidate]:
    """Those that rank 0 lists; one that some rank cannot read, or reads otherwise, is no good."""
    found = candidates(root, on_main(world, lambda: committed_names(root)))
    return [_as_all_see_it(candidate, world) for candidate in found]


def _as_all_see_it(candidate: Candidate, world: World) -> Candidate:
    try:
        agree(world, candidate.problem)
        digests = share(world, candidate.manifest.digest if candidate.manifest else "")
        if len(set(digests)) > 1:
            raise corrupt("ranks read different manifests", candidate.path / MANIFEST_NAME)
    except CheckpointError as problem:
        return replace(candidate, manifest=None, problem=problem)
    return candidate


def _load_newest(root: Path, found: list[Candidate], world: World) -> Checkpoint:
    notices = _leftover_notices(root, found)
    readable = [c for c in found if c.manifest]
    last_readable = max((c.step for c in readable), default=-1)
    problems = []
    for candidate in found:
        if candidate.problem is None:
            continue
        if candidate.problem.code == "RF8002" and candidate.step > last_readable:
            # Going back to an older state would throw away what a newer release has trained.
            raise candidate.problem
        problems.append(candidate.problem)
    for candidate in sorted(readable, key=lambda c: c.commit, reverse=True):
        try:
            opened = _open(candidate, world)
        except CheckpointError as error:
            if error.code == "RF8010":  # a rank is leaving
                raise
            problems.append(error)
            continue
        notices += [f"passed over a checkpoint: {p.what} ({p.where})" for p in problems]
        if problems:
            notices.append(f"using {candidate.path.name} instead")
        return replace(opened, notices=tuple(notices))
    if not problems:
        raise _absent(root, "there is no checkpoint to load", found)
    listing = "; ".join(f"{p.what} ({p.where})" for p in problems)
    raise CheckpointError(
        "RF8001",
        f"none of the {len(problems)} checkpoints can be used: {listing}",
        where=str(root),
        remedy="restore one from a copy, or start over with run.overwrite=true",
    )


def _load_step(root: Path, found: list[Candidate], step: int, world: World) -> Checkpoint:
    matching = [candidate for candidate in found if candidate.step == step]
    if not matching:
        raise _absent(root, f"there is no checkpoint of step {step}", found)
    # `step-N` sorts before `step-N.superseded-*`, which counts only when a crash left it alone.
    if matching[0].problem is not None:
        raise matching[0].problem
    return _open(matching[0], world)


def _absent(root: Path, what: str, found: list[Candidate]) -> CheckpointError:
    available = ", ".join(str(step) for step in sorted({c.step for c in found})) or "none"
    return CheckpointError(
        "RF8003",
        what,
        where=str(root),
        expected=f"one of the steps there: {available}",
        remedy="set run.resume_step to one of them, or leave it out for the newest",
    )


def _leftover_notices(root: Path, found: list[Candidate]) -> list[str]:
    notices = [f"ignored an unfinished save: {path}" for path in unfinished(root)]
    pointer = root / LATEST_NAME
    if not found or not pointer.exists():
        return notices
    try:
        name = read_small(pointer, _MAX_POINTER_BYTES).decode("ascii").strip()
    except (OSError, ValueError):
        name = ""
    if name not in {candidate.path.name for candidate in found}:
        notices.append(f"{pointer} does not name a checkpoint; it is not needed and was ignored")
    return notices


def _open(candidate: Candidate, world: World) -> Checkpoint:
    manifest = candidate.manifest
    assert manifest is not None
    files = {
        name: ShardFile(candidate.path, name, record)
        for name, record in manifest.files.items()
        if record.tensors is not None
    }
    state, error = None, None
    try:
        for file in dealt(files.values(), world.size)[world.rank]:
            file.verify()
        state = _read_state(candidate.path, manifest)
    except Exception as caught:
        error = caught
    agree(world, error)
    tensors = {
        group: StoredTensors.in_files(records, files)
        for group, records in manifest.groups(candidate.path / MANIFEST_NAME).items()
    }
    return Checkpoint(manifest.step, candidate.path, tensors, state, _files=tuple(files.values()))


def _read_state(directory: Path, manifest: Manifest) -> Any:
    if STATE_NAME not in manifest.files:
        raise corrupt(f"the manifest lists no {STATE_NAME}", directory / MANIFEST_NAME)
    data = read_verified(directory, STATE_NAME, manifest.files[STATE_NAME])
    try:
        return from_json(parse_json(data))
    except (ValueError, TypeError, RecursionError) as error:
        path = directory / STATE_NAME
        raise corrupt(f"{STATE_NAME} is not a saved state: {error}", path) from error
