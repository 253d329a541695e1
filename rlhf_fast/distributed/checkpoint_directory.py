"""The checkpoints of a run directory: their names, which are whole, which are left over."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from rlhf_fast.distributed.durable import LOCAL, FileSystem, unique_suffix
from rlhf_fast.distributed.manifest import (
    MANIFEST_NAME,
    Manifest,
    corrupt,
    read_manifest,
    verify_file,
)
from rlhf_fast.errors import CheckpointError

LATEST_NAME = "LATEST"
STATE_NAME = "state.json"

_COMMITTED = re.compile(r"step-(\d{8,18})(\.superseded-[0-9a-z-]+)?")
_LEFTOVER = re.compile(r"step-\d{8,18}\.(tmp|pruned)-[0-9a-z-]+")
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Candidate:
    """A directory with a checkpoint's name; `problem` says why it has no manifest to go by."""

    path: Path
    step: int
    manifest: Manifest | None
    problem: CheckpointError | None

    @property
    def commit(self) -> int:
        """Its place in the order of saves; -1 without a manifest."""
        return self.manifest.commit if self.manifest else -1


def step_name(step: int) -> str:
    """Directory name of a step; eight digits keep the names in order up to 10^8 - 1."""
    return f"step-{step:08d}"


def committed_names(root: Path) -> list[str]:
    """Names of the directories that a save has committed, in their order; nothing is read."""
    if not root.is_dir():
        return []
    return sorted(p.name for p in root.iterdir() if _COMMITTED.fullmatch(p.name))


def candidates(root: Path, names: Iterable[str] | None = None) -> list[Candidate]:
    """The directories of these names (all that are there), with their manifests."""
    found = []
    for name in committed_names(root) if names is None else names:
        match = _COMMITTED.fullmatch(name)
        assert match is not None
        path, step = root / name, int(match[1])
        try:
            manifest = read_manifest(path)
            if manifest.step != step:
                raise corrupt(f"the manifest is of step {manifest.step}", path / MANIFEST_NAME)
        except CheckpointError as error:
            found.append(Candidate(path, step, None, error))
        else:
            found.append(Candidate(path, step, manifest, None))
    return found


def steps(root: Path) -> list[int]:
    """Steps with a committed directory, ascending; nothing is verified."""
    return sorted({candidate.step for candidate in candidates(Path(root))})


def unfinished(root: Path) -> list[Path]:
    """Directories of saves and prunes that a crash cut short; the next save removes them."""
    if not root.is_dir():
        return []
    return sorted(path for path in root.iterdir() if _LEFTOVER.fullmatch(path.name))


def superseded(root: Path) -> list[Path]:
    """Directories that stepped aside for a newer save of their step which did get committed."""
    names = {c.path.name for c in candidates(root) if c.manifest}
    return [root / name for name in sorted(names) if name.split(".")[0] in names - {name}]


def prune(root: Path, keep_last: int, fs: FileSystem = LOCAL) -> None:
    """Delete all but the `keep_last` newest intact checkpoints.

    Intact means: manifest readable, every file there with its size. Directories that are not intact
    neither count nor are deleted, so the only valid checkpoint always stays. A deletion that fails
    is a warning, never an error.
    """
    intact = [c for c in candidates(Path(root)) if c.manifest and _sizes_match(c)]
    intact.sort(key=lambda c: c.commit, reverse=True)
    for candidate in intact[max(keep_last, 1) :]:
        aside = candidate.path.with_name(f"{step_name(candidate.step)}.pruned-{unique_suffix()}")
        try:
            # Under its own name a half-deleted directory would be reported as damaged.
            fs.replace(candidate.path, aside)
        except OSError as error:
            _logger.warning("could not prune %s: %s", candidate.path, error)
        else:
            remove(aside, fs)


def remove(path: Path, fs: FileSystem) -> None:
    """Delete a directory; a failure is a warning."""
    try:
        fs.remove_tree(path)
    except OSError as error:
        _logger.warning("could not remove %s: %s", path, error)


def _sizes_match(candidate: Candidate) -> bool:
    assert candidate.manifest is not None
    try:
        for name, record in candidate.manifest.files.items():
            verify_file(candidate.path, name, record, digest=False)
    except CheckpointError:
        return False
    return True
