"""The small files of a run directory, which may have been touched between two runs."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import stat
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from rlhf_fast.distributed.durable import (
    replace_atomically,
    replace_together,
    storage_fault,
    write_atomically,
)
from rlhf_fast.errors import CheckpointError, EnvironmentFault, RLHFError
from rlhf_fast.small_files import open_regular, read_small

# Of one file. A configuration has thousands of bytes; what is larger is not ours and is not read.
MAX_JSON_BYTES = 1 << 22
# Of a line of `samples.jsonl`: longer ones are dropped.
MAX_LINE_BYTES = 1 << 22
_MAX_DEPTH = 64
_NESTS = (dict, list)


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a file; None if there is no such file.

    Raises:
        CheckpointError: RF8206, it is there and cannot be read: no regular file, more than
            `MAX_JSON_BYTES`, or no JSON object.
    """
    try:
        value = json.loads(read_small(path, MAX_JSON_BYTES))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise unreadable(path, error.strerror or str(error)) from error
    except (ValueError, RecursionError) as error:
        raise unreadable(path, str(error)) from error
    if not isinstance(value, dict):
        raise unreadable(path, "not a JSON object")
    if _is_deeper(value, _MAX_DEPTH):
        raise unreadable(path, f"nested more than {_MAX_DEPTH} levels deep")
    return value


def _is_deeper(value: Any, depth: int) -> bool:
    level = [value]
    for _ in range(depth):
        inner = [v.values() if isinstance(v, dict) else v for v in level if isinstance(v, _NESTS)]
        level = [item for items in inner for item in items]
    return bool(level)


def keep_samples(path: Path, steps_done: int) -> None:
    """Drop the lines of a `samples.jsonl` that are of later steps, or of nothing.

    Bytes that are no text are replaced. Memory is taken for one line of `MAX_LINE_BYTES` at a time.

    Args:
        path: the file; nothing happens if there is none.
        steps_done: steps that will not be done again.

    Raises:
        CheckpointError: RF8206, it cannot be read, or is no regular file.
        EnvironmentFault: RF7101, writing failed.
    """
    try:
        descriptor = open_regular(path)
    except FileNotFoundError:
        return
    except OSError as error:
        raise unreadable(path, error.strerror or str(error)) from error
    with os.fdopen(descriptor, "rb") as file:
        try:
            replace_atomically(path, (line for line in _lines(file) if _is_kept(line, steps_done)))
        except OSError as error:
            raise storage_fault(error, path) from error


def _lines(file: BinaryIO) -> Iterator[bytes]:
    """The lines of a file as UTF-8; of a longer one than allowed, nothing."""
    while line := file.readline(MAX_LINE_BYTES):
        whole = line.endswith(b"\n") or len(line) < MAX_LINE_BYTES
        while not line.endswith(b"\n") and len(line) == MAX_LINE_BYTES:
            line = file.readline(MAX_LINE_BYTES)
        if whole:
            text = line.decode("utf-8", errors="replace").rstrip("\r\n")
            yield f"{text}\n".encode()


def _is_kept(line: bytes, steps_done: int) -> bool:
    try:
        return bool(json.loads(line)["step"] <= steps_done)
    except (ValueError, KeyError, TypeError, RecursionError):
        return False  # cut off by a crash, or never one of ours


def unreadable(path: Path, reason: str) -> RLHFError:
    """A file of a run directory that cannot be used (RF8206)."""
    return CheckpointError(
        "RF8206",
        f"{path.name} cannot be read: {reason}",
        where=str(path),
        remedy="restore it from a copy, or start over with run.overwrite=true",
    )


def write_json(
    path: Path, value: Mapping[str, Any], results: Mapping[str, bytes] | None = None
) -> None:
    """Replace the file, atomically; with files beside it if there are any.

    Args:
        path: of the file.
        value: its content.
        results: further files of the directory; see `replace_together`.

    Raises:
        EnvironmentFault: RF7101, writing failed.
    """
    data = json.dumps(value, indent=2, sort_keys=True).encode("utf-8") + b"\n"
    try:
        if results:
            replace_together(path.parent, {path.name: data, **results})
        else:
            write_atomically(path, data)
    except OSError as error:
        raise storage_fault(error, path) from error


def bytes_of(entries: Iterable[Path]) -> int:
    """Bytes of files, and of those in directories; links, and what just vanishes, are nothing."""
    total = 0
    for entry in entries:
        files = [entry]
        if not entry.is_symlink():
            files += [Path(d, name) for d, _, names in os.walk(entry) for name in names]
        for file in files:
            with contextlib.suppress(OSError):
                found = file.lstat()
                total += found.st_size if stat.S_ISREG(found.st_mode) else 0
    return total


def require_directory(path: Path, name: str) -> None:
    """Refuse what is there and is no directory, a link that leads nowhere included.

    Args:
        path: what may be missing.
        name: what to call it.

    Raises:
        CheckpointError: RF8205.
    """
    if os.path.lexists(path) and not path.is_dir():
        leads = "a file, not a directory" if path.exists() else "a link that leads nowhere"
        raise CheckpointError(
            "RF8205",
            f"{path} is {leads}",
            where=name,
            expected="a directory, or a path where one can be created",
            remedy="choose another output_dir, or mount or remove what is there",
        )


def require_space(directory: Path, needed: int) -> None:
    """Refuse a run that its disk cannot hold.

    Args:
        directory: existing.
        needed: bytes beyond those that are taken; less than 0 if it gives back more than it takes.

    Raises:
        EnvironmentFault: RF7102.
    """
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise EnvironmentFault(
            "RF7102",
            f"the run needs about {needed / 2**20:,.0f} MiB more, {free / 2**20:,.0f} MiB are free",
            where=str(directory),
            remedy="free some space, keep fewer checkpoints, or move output_dir",
        )


def delete(entries: Iterable[Path]) -> None:
    """Delete files and directories in this order; of links, the link.

    Raises:
        EnvironmentFault: RF7101.
    """
    for entry in entries:
        try:
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink(missing_ok=True)
        except OSError as error:
            raise storage_fault(error, entry) from error
