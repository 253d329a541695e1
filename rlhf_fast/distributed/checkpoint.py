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
direction. `CheckpointWriter` is the seam for several ranks: each writes its files, one collects the
records and commits. One process per directory is assumed; a run directory's lock sees to that.
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from rlhf_fast.distributed.durable import (
    LOCAL,
    FileSystem,
    make_directories,
    replace_directory,
    storage_fault,
    unique_suffix,
    write_atomically,
    write_file,
)
from rlhf_fast.distributed.json_state import dump_json, from_json, parse_json, to_json
from rlhf_fast.distributed.manifest import (
    MANIFEST_NAME,
    FileRecord,
    Manifest,
    TensorRecord,
    corrupt,
    library_versions,
    read_manifest,
    read_verified,
    valid_file_name,
    verify_file,
)
from rlhf_fast.distributed.tensor_file import DTYPE_NAMES, SUFFIX, TensorFile, stream
from rlhf_fast.errors import CheckpointError

LATEST_NAME = "LATEST"
STATE_NAME = "state.json"

_COMMITTED = re.compile(r"step-(\d{8,18})(\.superseded-[0-9a-z-]+)?")
_LEFTOVER = re.compile(r"step-\d{8,18}\.(tmp|pruned)-[0-9a-z-]+")
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
    tensors: Mapping[str, TensorFile]
    state: Any
    notices: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Candidate:
    path: Path
    step: int
    manifest: Manifest | None
    problem: CheckpointError | None


def step_name(step: int) -> str:
    """Directory name of a step; eight digits keep the names in order up to 10^8 - 1."""
    return f"step-{step:08d}"


class CheckpointWriter:
    """One save in progress: files first, then `commit`, or `abort`.

    Args:
        root: directory that holds the checkpoints of a run; created if missing.
        step: training step, >= 0.
        fs: where the system calls go.

    Raises:
        OSError: from every method that writes; call `abort` then.
    """

    def __init__(self, root: Path, step: int, fs: FileSystem = LOCAL) -> None:
        if step < 0 or step >= 10**18:
            raise ValueError(f"step must be in [0, 10**18), got {step}")
        self.root = Path(root)
        self.step = step
        self.records: dict[str, FileRecord] = {}
        self._fs = fs
        self._committed = False
        self._directory = self.root / f"{step_name(step)}.tmp-{unique_suffix()}"

    def begin(self) -> None:
        """Remove what unfinished saves left behind, then create the fresh directory."""
        make_directories(self.root, self._fs)
        for leftover in [*unfinished(self.root), *_superseded(self.root)]:
            _remove(leftover, self._fs)
        self._fs.make_directory(self._directory)

    def add_tensors(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Write `<name>.safetensors`.

        Raises:
            CheckpointError: a tensor that cannot be stored (RF8004).
        """
        file_name = f"{name}{SUFFIX}"
        size, digest = write_file(self._directory / file_name, stream(tensors), self._fs)
        listing = {
            key: TensorRecord(DTYPE_NAMES[tensor.dtype], tuple(tensor.shape))
            for key, tensor in tensors.items()
        }
        self.records[file_name] = FileRecord(size, digest, listing)

    def add_bytes(self, file_name: str, data: bytes) -> None:
        """Write a small file as it is."""
        size, digest = write_file(self._directory / file_name, [data], self._fs)
        self.records[file_name] = FileRecord(size, digest)

    def commit(self) -> Path:
        """Write the manifest, rename, point `LATEST` here.

        Returns:
            the committed directory.
        """
        newest = max((c.manifest.commit for c in _candidates(self.root) if c.manifest), default=0)
        manifest = Manifest(self.step, newest + 1, self.records, library_versions())
        write_file(self._directory / MANIFEST_NAME, [manifest.dump()], self._fs)
        self._fs.sync_directory(self._directory)
        final = self.root / step_name(self.step)
        old = replace_directory(self._directory, final, self._fs)
        self._committed = True
        write_atomically(self.root / LATEST_NAME, f"{final.name}\n".encode(), self._fs)
        if old is not None:
            _remove(old, self._fs)
        return final

    def abort(self) -> None:
        """Remove the unfinished directory; a committed one stays."""
        if not self._committed and self._directory.exists():
            with contextlib.suppress(OSError):
                self._fs.remove_tree(self._directory)


def save(
    root: Path,
    step: int,
    *,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Any,
    keep_last: int | None,
    fs: FileSystem = LOCAL,
) -> Path:
    """Save a checkpoint and commit it atomically, then prune old ones.

    Args:
        root: directory that holds the checkpoints of a run; created if missing.
        step: training step, >= 0. Saving a step again replaces it.
        tensors: file stem (`actor`, `actor_optimizer`, ...) -> flat dictionary of tensors. Views of
            a shared storage are written in full each; use `module_tensors` to store tied ones once.
        state: tree of None, bool, int, float, str, list, tuple, dict; floats come back bit-exact.
        keep_last: how many checkpoints to keep, this one included, >= 1; None keeps all.
        fs: where the system calls go.

    Returns:
        the committed directory `root/step-<8 digits>`.

    Raises:
        CheckpointError: something that cannot be stored, before anything is written (RF8004).
        EnvironmentFault: the disk is full or refuses (RF7101); older checkpoints are intact and the
            unfinished directory is gone.
    """
    if keep_last is not None and keep_last < 1:
        raise ValueError(f"keep_last must be >= 1 or None, got {keep_last}")
    for name in tensors:
        if not valid_file_name(name) or name.endswith(SUFFIX):
            raise ValueError(f"tensors keys are file stems without {SUFFIX}, got {name!r}")
    encoded = dump_json(to_json(state), sort_keys=False)
    writer = CheckpointWriter(root, step, fs)
    try:
        writer.begin()
        for name, group in tensors.items():
            writer.add_tensors(name, group)
        writer.add_bytes(STATE_NAME, encoded)
        path = writer.commit()
    except BaseException as error:
        writer.abort()
        if isinstance(error, OSError):
            raise storage_fault(error, Path(root)) from error
        raise
    if keep_last is not None:
        prune(root, keep_last, fs)
    return path


def load(root: Path, step: int | Literal["latest"] | None = None) -> Checkpoint:
    """Open a checkpoint after verifying every byte of it.

    Args:
        root: directory given to `save`.
        step: a step, or None or `latest` for the newest state. A damaged newest one is passed over,
            with a notice, for the newest that verifies; an explicit step is never replaced by
            another.

    Raises:
        CheckpointError: no checkpoint there (RF8003), none that verifies or a damaged explicit
            step, the file named (RF8001), or another format version (RF8002).
    """
    root = Path(root)
    candidates = _candidates(root)
    if step is None or step == "latest":
        found = _load_newest(root, candidates)
    else:
        found = _load_step(root, candidates, step)
    for notice in found.notices:
        _logger.warning("%s", notice)
    return found


def steps(root: Path) -> list[int]:
    """Steps with a committed directory, ascending; nothing is verified."""
    return sorted({candidate.step for candidate in _candidates(Path(root))})


def unfinished(root: Path) -> list[Path]:
    """Directories of saves and prunes that a crash cut short; the next save removes them."""
    if not root.is_dir():
        return []
    return sorted(path for path in root.iterdir() if _LEFTOVER.fullmatch(path.name))


def prune(root: Path, keep_last: int, fs: FileSystem = LOCAL) -> None:
    """Delete all but the `keep_last` newest intact checkpoints.

    Intact means: manifest readable, every file there with its size. Directories that are not intact
    neither count nor are deleted, so the only valid checkpoint always stays. A deletion that fails
    is a warning, never an error.
    """
    intact = [c for c in _candidates(Path(root)) if c.manifest and _sizes_match(c)]
    intact.sort(key=_commit_order, reverse=True)
    for candidate in intact[max(keep_last, 1) :]:
        aside = candidate.path.with_name(f"{step_name(candidate.step)}.pruned-{unique_suffix()}")
        try:
            # Under its own name a half-deleted directory would be reported as damaged.
            fs.replace(candidate.path, aside)
        except OSError as error:
            _logger.warning("could not prune %s: %s", candidate.path, error)
        else:
            _remove(aside, fs)


def _candidates(root: Path) -> list[_Candidate]:
    if not root.is_dir():
        return []
    found = []
    for path in sorted(root.iterdir()):
        match = _COMMITTED.fullmatch(path.name)
        if match is None:
            continue
        manifest, problem = None, None
        try:
            manifest = read_manifest(path)
            if manifest.step != int(match[1]):
                raise corrupt(f"the manifest is of step {manifest.step}", path / MANIFEST_NAME)
        except CheckpointError as error:
            manifest, problem = None, error
        found.append(_Candidate(path, int(match[1]), manifest, problem))
    return found


def _superseded(root: Path) -> list[Path]:
    """Directories that stepped aside for a newer save of their step which did get committed."""
    names = {c.path.name for c in _candidates(root) if c.manifest}
    return [root / name for name in sorted(names) if name.split(".")[0] in names - {name}]


def _commit_order(candidate: _Candidate) -> int:
    return candidate.manifest.commit if candidate.manifest else -1


def _sizes_match(candidate: _Candidate) -> bool:
    assert candidate.manifest is not None
    try:
        for name, record in candidate.manifest.files.items():
            verify_file(candidate.path, name, record, digest=False)
    except CheckpointError:
        return False
    return True


def _load_newest(root: Path, candidates: list[_Candidate]) -> Checkpoint:
    notices = _leftover_notices(root, candidates)
    readable = [c for c in candidates if c.manifest]
    last_readable = max((c.step for c in readable), default=-1)
    problems = []
    for candidate in candidates:
        if candidate.problem is None:
            continue
        if candidate.problem.code == "RF8002" and candidate.step > last_readable:
            # Going back to an older state would throw away what a newer release has trained.
            raise candidate.problem
        problems.append(candidate.problem)
    for candidate in sorted(readable, key=_commit_order, reverse=True):
        try:
            found = _open(candidate)
        except CheckpointError as error:
            problems.append(error)
            continue
        notices += [f"passed over a checkpoint: {p.what} ({p.where})" for p in problems]
        if problems:
            notices.append(f"using {candidate.path.name} instead")
        return Checkpoint(found.step, found.path, found.tensors, found.state, tuple(notices))
    if not problems:
        raise _absent(root, "there is no checkpoint to load", candidates)
    listing = "; ".join(f"{p.what} ({p.where})" for p in problems)
    raise CheckpointError(
        "RF8001",
        f"none of the {len(problems)} checkpoints can be used: {listing}",
        where=str(root),
        remedy="restore one from a copy, or start over with run.overwrite=true",
    )


def _load_step(root: Path, candidates: list[_Candidate], step: int) -> Checkpoint:
    matching = [candidate for candidate in candidates if candidate.step == step]
    if not matching:
        raise _absent(root, f"there is no checkpoint of step {step}", candidates)
    # `step-N` sorts before `step-N.superseded-*`, which counts only when a crash left it alone.
    if matching[0].problem is not None:
        raise matching[0].problem
    return _open(matching[0])


def _absent(root: Path, what: str, candidates: list[_Candidate]) -> CheckpointError:
    available = ", ".join(str(step) for step in sorted({c.step for c in candidates})) or "none"
    return CheckpointError(
        "RF8003",
        what,
        where=str(root),
        expected=f"one of the steps there: {available}",
        remedy="set run.resume_step to one of them, or leave it out for the newest",
    )


def _leftover_notices(root: Path, candidates: list[_Candidate]) -> list[str]:
    notices = [f"ignored an unfinished save: {path}" for path in unfinished(root)]
    pointer = root / LATEST_NAME
    if not candidates or not pointer.exists():
        return notices
    try:
        name = pointer.read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        name = ""
    if name not in {candidate.path.name for candidate in candidates}:
        notices.append(f"{pointer} does not name a checkpoint; it is not needed and was ignored")
    return notices


def _open(candidate: _Candidate) -> Checkpoint:
    manifest = candidate.manifest
    assert manifest is not None
    if STATE_NAME not in manifest.files:
        raise corrupt(f"the manifest lists no {STATE_NAME}", candidate.path / MANIFEST_NAME)
    tensors: dict[str, TensorFile] = {}
    for name, record in manifest.files.items():
        if record.tensors is None:
            continue
        verify_file(candidate.path, name, record)
        file = TensorFile(candidate.path / name)
        listed = {key: (t.dtype, t.shape) for key, t in record.tensors.items()}
        if file.describe() != listed:
            raise corrupt(f"{name} holds other tensors than the manifest lists", file.path)
        tensors[name.removesuffix(SUFFIX)] = file
    data = read_verified(candidate.path, STATE_NAME, manifest.files[STATE_NAME])
    try:
        state = from_json(parse_json(data))
    except (ValueError, TypeError, RecursionError) as error:
        path = candidate.path / STATE_NAME
        raise corrupt(f"{STATE_NAME} is not a saved state: {error}", path) from error
    return Checkpoint(manifest.step, candidate.path, tensors, state)


def _remove(path: Path, fs: FileSystem) -> None:
    try:
        fs.remove_tree(path)
    except OSError as error:
        _logger.warning("could not remove %s: %s", path, error)
