"""The manifest of a checkpoint: what was written, how long it is, and its checksums.

`manifest.json` is written last, in canonical form, and carries a digest of itself: any flipped
byte, in a file or in the manifest, is found. Nothing it says is believed before it is checked:
names stay inside the directory, files are regular files of the stated size, and shapes multiply (in
Python's unbounded integers) to no more bytes than the file holds.

Every format version keeps the keys `format_version` and `digest`, so that an older program can tell
"made by a newer one" from "damaged". Version 1 is what one process writes: every file a group of
whole tensors. Version 2 is what several ranks write: a group is spread over files, and a tensor
over them in chunks; each file's list says where its chunks lie, so there is no second index that
could contradict it.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import math
import os
import platform
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from rlhf_fast.distributed.chunks import ChunkRecord, StoredRecord, tiling_problem
from rlhf_fast.distributed.json_state import dump_json, parse_json
from rlhf_fast.distributed.tensor_file import ITEM_BYTES, SUFFIX
from rlhf_fast.errors import CheckpointError
from rlhf_fast.small_files import open_regular, read_small

WHOLE_VERSION, SHARDED_VERSION = 1, 2
MANIFEST_NAME = "manifest.json"

# A 10^5-tensor model needs about 15 MB; beyond this cap the file is not ours and is not read.
_MAX_MANIFEST_BYTES = 256 << 20
_MAX_DIMS = 64
_READ_CHUNK_BYTES = 1 << 22
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
# What unpickles when the usual loaders open it; `.metadata` is the index of a plain DCP directory.
_PICKLES = re.compile(r"\.metadata|.*\.(metadata|distcp|bin|pt|pth|ckpt|pkl|pickle)", re.IGNORECASE)


@dataclass(frozen=True)
class TensorRecord:
    """dtype as safetensors names it (`F32`, `BF16`, ...), shape, and of a chunk its place.

    `offsets` and `whole` are where the chunk begins in the whole tensor, and the shape of that;
    both None for a tensor stored in one piece.
    """

    dtype: str
    shape: tuple[int, ...]
    offsets: tuple[int, ...] | None = None
    whole: tuple[int, ...] | None = None


@dataclass(frozen=True)
class FileRecord:
    """One file: size in bytes, SHA-256 in hex, and its tensors (None for a JSON file).

    `group` names what the tensors belong to; None means the file's stem.
    """

    size: int
    sha256: str
    tensors: Mapping[str, TensorRecord] | None = None
    group: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """As `manifest.json` has it."""
        entry: dict[str, Any] = {"size": self.size, "sha256": self.sha256}
        if self.group is not None:
            entry["group"] = self.group
        if self.tensors is not None:
            entry["tensors"] = {key: _tensor_to_dict(t) for key, t in self.tensors.items()}
        return entry


def _tensor_to_dict(tensor: TensorRecord) -> dict[str, Any]:
    entry: dict[str, Any] = {"dtype": tensor.dtype, "shape": list(tensor.shape)}
    if tensor.offsets is not None and tensor.whole is not None:
        entry |= {"offsets": list(tensor.offsets), "whole": list(tensor.whole)}
    return entry


@dataclass(frozen=True)
class Manifest:
    """A checkpoint's table of contents.

    Attributes:
        step: the training step that the state belongs to.
        commit: counts the saves of a run directory; the highest number is the newest state, even
            after a run went back to an earlier step.
        files: file name -> record.
        versions: library versions at the time of writing, for people.
        digest: of a manifest that was read: the checksum it carries.
    """

    step: int
    commit: int
    files: Mapping[str, FileRecord]
    versions: Mapping[str, str] = field(default_factory=dict)
    digest: str = ""

    def dump(self) -> bytes:
        """The bytes of `manifest.json`."""
        sharded = any(record.group is not None for record in self.files.values())
        return seal(
            {
                "format_version": SHARDED_VERSION if sharded else WHOLE_VERSION,
                "step": self.step,
                "commit": self.commit,
                "files": {name: record.to_dict() for name, record in self.files.items()},
                "versions": dict(self.versions),
            }
        )

    def groups(self, where: Path) -> dict[str, dict[str, StoredRecord]]:
        """Every group's tensors by name.

        Args:
            where: named in errors.

        Raises:
            CheckpointError: chunks that disagree about their tensor, or do not tile it (RF8001).
        """
        found: dict[str, dict[str, list[tuple[ChunkRecord, TensorRecord]]]] = {}
        for file, record in self.files.items():
            if record.tensors is None:
                continue
            group = found.setdefault(record.group or file.removesuffix(SUFFIX), {})
            for name, tensor in record.tensors.items():
                offsets = tensor.offsets or (0,) * len(tensor.shape)
                chunk = ChunkRecord(file, offsets, tensor.shape)
                group.setdefault(name, []).append((chunk, tensor))
        return {
            group: {name: _joined(f"{group}/{name}", parts, where) for name, parts in names.items()}
            for group, names in found.items()
        }


def _joined(name: str, parts: list[tuple[ChunkRecord, TensorRecord]], where: Path) -> StoredRecord:
    kinds = {(t.dtype, t.shape if t.whole is None else t.whole) for _, t in parts}
    if len(kinds) != 1:
        raise corrupt(f"the chunks of {name} are of different tensors: {sorted(kinds)}", where)
    dtype, shape = kinds.pop()
    chunks = tuple(chunk for chunk, _ in parts)
    problem = tiling_problem(shape, chunks)
    if problem:
        raise corrupt(f"the chunks of {name} {list(shape)} {problem}", where)
    return StoredRecord(dtype, shape, chunks)


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


def refuse_pickles(names: Iterable[str], where: Path) -> None:
    """Refuse a checkpoint with a file that runs code where it is unpickled.

    Nothing here would open it; but it was not written by this program, and other tools would.

    Raises:
        CheckpointError: RF8009, with the names.
    """
    pickles = sorted(name for name in names if _PICKLES.fullmatch(name))
    if pickles:
        raise CheckpointError(
            "RF8009",
            f"the checkpoint holds pickled files, which can run code: {', '.join(pickles[:5])}",
            where=str(where / pickles[0]),
            expected="JSON and safetensors, all that is ever written into a checkpoint",
            remedy="find out who put them there, and copy the checkpoint again from its source",
        )


def read_manifest(directory: Path) -> Manifest:
    """Read and check `manifest.json`; the files it names are not opened.

    Raises:
        CheckpointError: unreadable or inconsistent (RF8001); another format version (RF8002);
            pickled files in the directory or in the list (RF8009).
    """
    path = directory / MANIFEST_NAME
    if directory.is_symlink() or not directory.is_dir():
        raise corrupt("a checkpoint must be a real directory, not a link or a file", directory)
    refuse_pickles(_entries(directory), directory)
    data = _read_bounded(path, _MAX_MANIFEST_BYTES)
    try:
        return _parse_manifest(data, path)
    except (ValueError, RecursionError) as error:
        # Of whatever kind: one damaged manifest must not keep the others from being used.
        raise corrupt(f"the manifest cannot be understood: {error}", path) from error


def _parse_manifest(data: bytes, path: Path) -> Manifest:
    body = parse_json(data)
    if not isinstance(body, dict):
        raise corrupt("the manifest is not a JSON object", path)
    if "digest" in body and seal(body) != data:
        raise corrupt("the manifest does not match its own checksum", path)
    version = body.get("format_version")
    known = (WHOLE_VERSION, SHARDED_VERSION)
    if _is_count(version) and version not in known:
        raise CheckpointError(
            "RF8002",
            f"the checkpoint has format version {version}, this program reads 1 and 2",
            where=str(path),
            remedy="use the release that wrote it (the manifest's `versions` names it)",
        )
    if "digest" not in body or version not in known or isinstance(version, bool):
        raise corrupt("the manifest has no checksum or no format version", path)
    return _parse_body(body, path)


def _entries(directory: Path) -> list[str]:
    try:
        return os.listdir(directory)
    except OSError as error:
        raise corrupt(f"the directory cannot be read: {error.strerror}", directory) from error


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
    refuse_pickles(files, path.parent)
    sharded = body["format_version"] == SHARDED_VERSION
    records = {
        name: parse_file(name, entry, path, sharded=sharded) for name, entry in files.items()
    }
    texts = {str(key): str(value) for key, value in versions.items()}
    manifest = Manifest(step, commit, records, texts, str(body["digest"]))
    manifest.groups(path)
    return manifest


def parse_file(name: str, entry: Any, path: Path, *, sharded: bool) -> FileRecord:
    """One entry of `files`, undoing `FileRecord.to_dict`.

    Raises:
        CheckpointError: it is malformed, or claims more than the file can hold (RF8001).
    """
    if not isinstance(entry, dict) or not _is_count(entry.get("size")):
        raise corrupt(f"the manifest gives no size for {name}", path)
    digest = entry.get("sha256")
    if not isinstance(digest, str) or _SHA256.fullmatch(digest) is None:
        raise corrupt(f"the manifest gives no SHA-256 for {name}", path)
    if "tensors" not in entry:
        return FileRecord(entry["size"], digest)
    group = entry.get("group") if sharded else None
    if sharded and not (isinstance(group, str) and valid_file_name(group)):
        raise corrupt(f"the manifest gives no group for {name}", path)
    if not isinstance(entry["tensors"], dict):
        raise corrupt(f"the manifest's tensor list of {name} is not an object", path)
    tensors = {
        key: _parse_tensor(key, value, path, sharded=sharded)
        for key, value in entry["tensors"].items()
    }
    claimed = sum(math.prod(t.shape) * ITEM_BYTES[t.dtype] for t in tensors.values())
    if claimed > entry["size"]:
        raise corrupt(
            f"the tensors of {name} would need {claimed} bytes, the file has {entry['size']}", path
        )
    return FileRecord(entry["size"], digest, tensors, group)


def _parse_tensor(name: str, entry: Any, path: Path, *, sharded: bool) -> TensorRecord:
    fields = entry if isinstance(entry, dict) else {}
    dtype = fields.get("dtype")
    known = isinstance(dtype, str) and dtype in ITEM_BYTES
    chunk = sharded and ("offsets" in fields or "whole" in fields)
    places = [fields.get(key) for key in (("shape", "offsets", "whole") if chunk else ("shape",))]
    if not known or not all(map(_is_place, places)):
        raise corrupt(f"the manifest's entry of tensor {name!r} is malformed", path)
    return TensorRecord(str(dtype), *(tuple(place or ()) for place in places))


def _is_place(value: Any) -> bool:
    return isinstance(value, list) and len(value) <= _MAX_DIMS and all(map(_is_count, value))


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
    try:
        return open_regular(path, follow_links=False)
    except OSError as error:
        raise _cannot_be_read(path, error) from error


def _read_bounded(path: Path, limit: int) -> bytes:
    try:
        return read_small(path, limit, follow_links=False)
    except OSError as error:
        raise _cannot_be_read(path, error) from error


def _cannot_be_read(path: Path, error: OSError) -> CheckpointError:
    return corrupt(f"{path.name} cannot be read: {error.strerror or error}", path)


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
