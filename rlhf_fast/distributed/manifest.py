"""The manifest of a checkpoint: what was written, how long it is, and its checksums.

`manifest.json` is written last, in canonical form, and carries a digest of itself: any flipped
byte, in a file or in the manifest, is found. Nothing it says is believed before it is checked:
names stay inside the directory, files are regular files of the stated size, and shapes multiply (in
Python's unbounded integers) to no more bytes than the file holds.

Every format version keeps the keys `format_version` and `digest`, so that an older program can tell
"made by a newer one" from "damaged".
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import math
import os
import platform
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from rlhf_fast.distributed.json_state import dump_json, parse_json
from rlhf_fast.distributed.tensor_file import ITEM_BYTES
from rlhf_fast.errors import CheckpointError

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"

# A 10^5-tensor model needs about 15 MB; beyond this cap the file is not ours and is not read.
_MAX_MANIFEST_BYTES = 256 << 20
_MAX_DIMS = 64
_READ_CHUNK_BYTES = 1 << 22
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class TensorRecord:
    """dtype as safetensors names it (`F32`, `BF16`, ...) and shape."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class FileRecord:
    """One file: size in bytes, SHA-256 in hex, and its tensors (None for a JSON file)."""

    size: int
    sha256: str
    tensors: Mapping[str, TensorRecord] | None = None


@dataclass(frozen=True)
class Manifest:
    """A checkpoint's table of contents.

    Attributes:
        step: the training step that the state belongs to.
        commit: counts the saves of a run directory; the highest number is the newest state, even
            after a run went back to an earlier step.
        files: file name -> record.
        versions: library versions at the time of writing, for people.
    """

    step: int
    commit: int
    files: Mapping[str, FileRecord]
    versions: Mapping[str, str] = field(default_factory=dict)

    def dump(self) -> bytes:
        """The bytes of `manifest.json`."""
        files: dict[str, Any] = {}
        for name, record in self.files.items():
            entry: dict[str, Any] = {"size": record.size, "sha256": record.sha256}
            if record.tensors is not None:
                entry["tensors"] = {
                    key: {"dtype": tensor.dtype, "shape": list(tensor.shape)}
                    for key, tensor in record.tensors.items()
                }
            files[name] = entry
        return seal(
            {
                "format_version": FORMAT_VERSION,
                "step": self.step,
                "commit": self.commit,
                "files": files,
                "versions": dict(self.versions),
            }
        )


def seal(body: Mapping[str, Any]) -> bytes:
    """Canonical JSON of `body` with its own SHA-256 under `digest`."""
    plain = {key: value for key, value in body.items() if key != "digest"}
    digest = hashlib.sha256(dump_json(plain, sort_keys=True)).hexdigest()
    return dump_json({**plain, "digest": digest}, sort_keys=True)


@functools.cache
def library_versions() -> Mapping[str, str]:
    """Versions worth knowing when a checkpoint is opened years later."""
    found = {"python": platform.python_version(), "torch": str(torch.__version__)}
    for package in ("rlhf-fast", "transformers", "safetensors"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def corrupt(what: str, where: Path) -> CheckpointError:
    """A checkpoint file that cannot be trusted (RF8001)."""
    return CheckpointError(
        "RF8001",
        what,
        where=str(where),
        expected="the bytes that were written when the checkpoint was saved",
        remedy="resume from another step, or copy the checkpoint again from its source",
    )


def valid_file_name(name: str) -> bool:
    """One path component of harmless characters: no separator, no `..`, no leading dot."""
    return _FILE_NAME.fullmatch(name) is not None and ".." not in name


def read_manifest(directory: Path) -> Manifest:
    """Read and check `manifest.json`; the files it names are not opened.

    Raises:
        CheckpointError: unreadable or inconsistent (RF8001); another format version (RF8002).
    """
    path = directory / MANIFEST_NAME
    if directory.is_symlink() or not directory.is_dir():
        raise corrupt("a checkpoint must be a real directory, not a link or a file", directory)
    data = _read_bounded(path, _MAX_MANIFEST_BYTES)
    try:
        body = parse_json(data)
    except ValueError as error:
        raise corrupt(f"the manifest is not JSON: {error}", path) from error
    if not isinstance(body, dict):
        raise corrupt("the manifest is not a JSON object", path)
    if "digest" in body and seal(body) != data:
        raise corrupt("the manifest does not match its own checksum", path)
    version = body.get("format_version")
    if _is_count(version) and version != FORMAT_VERSION:
        raise CheckpointError(
            "RF8002",
            f"the checkpoint has format version {version}, this program reads {FORMAT_VERSION}",
            where=str(path),
            remedy="use the release that wrote it (the manifest's `versions` names it)",
        )
    if "digest" not in body or version != FORMAT_VERSION:
        raise corrupt("the manifest has no checksum or no format version", path)
    return _parse_body(body, path)


def _parse_body(body: Mapping[str, Any], path: Path) -> Manifest:
    step: Any = body.get("step")
    commit: Any = body.get("commit")
    files, versions = body.get("files"), body.get("versions")
    if not (_is_count(step) and _is_count(commit) and isinstance(files, dict)):
        raise corrupt("the manifest lacks step, commit or files", path)
    if not isinstance(versions, dict):
        raise corrupt("the manifest lacks versions", path)
    for name in files:
        if not valid_file_name(name) or name == MANIFEST_NAME:
            raise corrupt(f"the manifest names a file outside its directory: {name!r}", path)
    records = {name: _parse_file(name, entry, path) for name, entry in files.items()}
    texts = {str(key): str(value) for key, value in versions.items()}
    return Manifest(step=step, commit=commit, files=records, versions=texts)


def _parse_file(name: str, entry: Any, path: Path) -> FileRecord:
    if not isinstance(entry, dict) or not _is_count(entry.get("size")):
        raise corrupt(f"the manifest gives no size for {name}", path)
    digest = entry.get("sha256")
    if not isinstance(digest, str) or _SHA256.fullmatch(digest) is None:
        raise corrupt(f"the manifest gives no SHA-256 for {name}", path)
    if "tensors" not in entry:
        return FileRecord(entry["size"], digest)
    if not isinstance(entry["tensors"], dict):
        raise corrupt(f"the manifest's tensor list of {name} is not an object", path)
    tensors = {key: _parse_tensor(key, value, path) for key, value in entry["tensors"].items()}
    claimed = sum(math.prod(t.shape) * ITEM_BYTES[t.dtype] for t in tensors.values())
    if claimed > entry["size"]:
        raise corrupt(
            f"the tensors of {name} would need {claimed} bytes, the file has {entry['size']}", path
        )
    return FileRecord(entry["size"], digest, tensors)


def _parse_tensor(name: str, entry: Any, path: Path) -> TensorRecord:
    dtype = entry.get("dtype") if isinstance(entry, dict) else None
    shape = entry.get("shape") if isinstance(entry, dict) else None
    known = isinstance(dtype, str) and dtype in ITEM_BYTES
    shaped = isinstance(shape, list) and len(shape) <= _MAX_DIMS and all(map(_is_count, shape))
    if not known or not shaped:
        raise corrupt(f"the manifest's entry of tensor {name!r} is malformed", path)
    return TensorRecord(str(dtype), tuple(shape or ()))


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def verify_file(directory: Path, name: str, record: FileRecord, *, digest: bool = True) -> None:
    """Check that a named file is a regular file with the recorded size and SHA-256.

    Raises:
        CheckpointError: it is missing, a link, a device, or differs (RF8001).
    """
    path = directory / name
    descriptor = _open_regular(path)
    with os.fdopen(descriptor, "rb", buffering=0) as file:
        size = os.fstat(descriptor).st_size
        if size != record.size:
            raise corrupt(f"{name} has {size} bytes, the manifest says {record.size}", path)
        if not digest:
            return
        actual = hashlib.sha256()
        while chunk := file.read(_READ_CHUNK_BYTES):
            actual.update(chunk)
    if actual.hexdigest() != record.sha256:
        raise corrupt(f"{name} does not match its checksum", path)


def _open_regular(path: Path) -> int:
    # O_NOFOLLOW refuses links; O_NONBLOCK keeps a named pipe from hanging the open.
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        reason = "is a symbolic link" if path.is_symlink() else (error.strerror or str(error))
        raise corrupt(f"{path.name} cannot be read: {reason}", path) from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise corrupt(f"{path.name} is not a regular file", path)
    return descriptor


def _read_bounded(path: Path, limit: int) -> bytes:
    with os.fdopen(_open_regular(path), "rb") as file:
        try:
            data = file.read(limit + 1)
        except OSError as error:
            raise corrupt(f"{path.name} cannot be read: {error.strerror}", path) from error
    if len(data) > limit:
        raise corrupt(f"{path.name} is larger than {limit} bytes", path)
    return data


def read_verified(directory: Path, name: str, record: FileRecord) -> bytes:
    """The bytes of a small file, checked against the manifest.

    Raises:
        CheckpointError: the file differs from its record (RF8001).
    """
    verify_file(directory, name, record, digest=False)
    data = _read_bounded(directory / name, record.size)
    if hashlib.sha256(data).hexdigest() != record.sha256:
        raise corrupt(f"{name} does not match its checksum", directory / name)
    return data
