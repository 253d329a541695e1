"""Files that are either there in full or not there at all.

Every byte a checkpoint or a run directory depends on goes through `FileSystem`, so that a test can
fail or stop the world at each single call. The order that makes a file durable on POSIX: write,
fsync the file, fsync the directory that names it, rename, fsync the directory again. Renaming
before the first fsync is the classic mistake: after a power cut the new name may point to an empty
file.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from rlhf_fast.errors import EnvironmentFault, RLHFError

# One write call stays below the 2 GiB limit of Linux and small enough to hash from the CPU cache.
_WRITE_CHUNK_BYTES = 1 << 24

_DISK_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


class FileSystem:
    """The system calls that change the disk, one method each."""

    def make_directory(self, path: Path) -> None:
        """Create one directory; its parent must exist and the name must be free."""
        os.mkdir(path)

    def create(self, path: Path) -> int:
        """Open a new file for writing; fails if the name is taken, symbolic links included."""
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)

    def write(self, descriptor: int, data: memoryview) -> int:
        """Write some of `data` and return how many bytes went through."""
        return os.write(descriptor, data)

    def sync(self, descriptor: int) -> None:
        """Return once the file's bytes are on stable storage."""
        os.fsync(descriptor)

    def close(self, descriptor: int) -> None:
        os.close(descriptor)

    def replace(self, source: Path, target: Path) -> None:
        """Rename atomically; a target directory must be absent or empty."""
        os.replace(source, target)

    def sync_directory(self, path: Path) -> None:
        """Return once the directory's names are on stable storage."""
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def remove_file(self, path: Path) -> None:
        os.unlink(path)

    def remove_tree(self, path: Path) -> None:
        shutil.rmtree(path)


LOCAL = FileSystem()


def unique_suffix() -> str:
    """`<pid>-<nonce>`: names the maker, never collides, and leaves every seeded RNG untouched."""
    return f"{os.getpid()}-{secrets.token_hex(4)}"


def write_file(
    path: Path, chunks: Iterable[bytes | memoryview], fs: FileSystem = LOCAL
) -> tuple[int, str]:
    """Write a new file and fsync it.

    Args:
        path: a name that must not exist.
        chunks: byte strings, written one after the other; a generator keeps only one in memory.
        fs: where the system calls go.

    Returns:
        size in bytes and SHA-256 in hex, taken from the same pass over the data.

    Raises:
        OSError: the file system refused; the partial file is the caller's to remove.
    """
    digest = hashlib.sha256()
    size = 0
    descriptor = fs.create(path)
    try:
        for chunk in chunks:
            view = memoryview(chunk).cast("B")
            for begin in range(0, len(view), _WRITE_CHUNK_BYTES):
                rest = view[begin : begin + _WRITE_CHUNK_BYTES]
                digest.update(rest)
                size += len(rest)
                while len(rest):
                    rest = rest[fs.write(descriptor, rest) :]
        fs.sync(descriptor)
    finally:
        fs.close(descriptor)
    return size, digest.hexdigest()


def write_atomically(path: Path, data: bytes, fs: FileSystem = LOCAL) -> None:
    """Replace a small file so that a reader, and a crash, sees the old bytes or the new ones.

    Raises:
        OSError: the old file is intact and the temporary one removed.
    """
    replace_atomically(path, [data], fs)


def replace_atomically(
    path: Path, chunks: Iterable[bytes | memoryview], fs: FileSystem = LOCAL
) -> None:
    """As `write_atomically`, of byte strings that come one after the other."""
    temporary = path.with_name(f".{path.name}.tmp-{unique_suffix()}")
    try:
        write_file(temporary, chunks, fs)
        fs.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            fs.remove_file(temporary)
        raise
    fs.sync_directory(path.parent)


def replace_together(folder: Path, files: Mapping[str, bytes], fs: FileSystem = LOCAL) -> None:
    """Replace files that belong together: the last is never there beside any but its own.

    All are written under other names first, so a full disk leaves everything as it was. A crash
    leaves the old files, or the new ones, or those of both without the last.

    Args:
        folder: where they lie.
        files: contents by name, in the order in which they appear.
        fs: where the system calls go.

    Raises:
        OSError: the file system refused.
    """
    suffix = unique_suffix()
    drafts = [folder / f".{name}.tmp-{suffix}" for name in files]
    *places, last = [folder / name for name in files]
    try:
        for draft, data in zip(drafts, files.values(), strict=True):
            write_file(draft, [data], fs)
        with contextlib.suppress(FileNotFoundError):
            fs.remove_file(last)
        fs.sync_directory(folder)
        for draft, place in zip(drafts[:-1], places, strict=True):
            fs.replace(draft, place)
        fs.sync_directory(folder)
        fs.replace(drafts[-1], last)
    except OSError:
        for draft in drafts:
            with contextlib.suppress(OSError):
                fs.remove_file(draft)
        raise
    fs.sync_directory(folder)


def make_directories(path: Path, fs: FileSystem = LOCAL) -> None:
    """Create `path` and its missing parents, each name made durable in its parent."""
    missing = []
    current = path
    while not current.exists():
        missing.append(current)
        current = current.parent
    for directory in reversed(missing):
        with contextlib.suppress(FileExistsError):  # another process was faster
            fs.make_directory(directory)
        fs.sync_directory(directory.parent)


def replace_directory(temporary: Path, final: Path, fs: FileSystem = LOCAL) -> Path | None:
    """Give a complete, fsynced directory its final name.

    POSIX cannot rename over a directory that has entries, so an existing one steps aside first
    under the name `<final>.superseded-<pid>-<nonce>`. A crash between the two renames leaves that
    name as the only complete copy; whoever reads must accept it when `final` is absent.

    Returns:
        where the old directory went, for the caller to remove, or None if there was none.
    """
    old: Path | None = None
    if final.exists() or final.is_symlink():
        old = final.with_name(f"{final.name}.superseded-{unique_suffix()}")
        fs.replace(final, old)
    try:
        fs.replace(temporary, final)
    except OSError:
        if old is not None:
            fs.replace(old, final)
        raise
    fs.sync_directory(final.parent)
    return old


@contextlib.contextmanager
def staged_directory(final: Path, fs: FileSystem = LOCAL) -> Iterator[Path]:
    """Fill a directory under a temporary name; it appears as `final` only when the block succeeds.

    For exports: an interrupted one never leaves a half-written model behind, and never damages the
    model that was there before. The files are fsynced here, whoever wrote them.

    Args:
        final: the directory to publish; an existing one is replaced.
        fs: where the system calls go.

    Yields:
        the temporary directory, a sibling of `final`.

    Raises:
        EnvironmentFault: the disk refused (RF7101).
    """
    final = final.absolute()
    temporary = final.with_name(f".{final.name}.tmp-{unique_suffix()}")
    try:
        make_directories(final.parent, fs)
        fs.make_directory(temporary)
        yield temporary
        _sync_tree(temporary, fs)
        old = replace_directory(temporary, final, fs)
        if old is not None:
            fs.remove_tree(old)
    except BaseException as error:
        if temporary.exists():
            with contextlib.suppress(OSError):
                fs.remove_tree(temporary)
        if isinstance(error, OSError):
            raise storage_fault(error, final) from error
        raise


def _sync_tree(root: Path, fs: FileSystem) -> None:
    for directory, _, names in os.walk(root):
        for name in names:
            descriptor = os.open(Path(directory, name), os.O_RDONLY | os.O_CLOEXEC)
            try:
                fs.sync(descriptor)
            finally:
                os.close(descriptor)
        fs.sync_directory(Path(directory))


def storage_fault(error: OSError, path: Path) -> RLHFError:
    """Say what an `OSError` of a write means and how much room is left (RF7101)."""
    place = path
    while not place.exists() and place != place.parent:
        place = place.parent
    try:
        free = f"{shutil.disk_usage(place).free / 2**20:,.0f} MiB free on that file system"
    except OSError:
        free = "the file system does not say how much room is left"
    reason = error.strerror or str(error) or type(error).__name__
    if error.errno in _DISK_FULL:
        remedy = "free some disk space, lower the number of kept checkpoints, or move output_dir"
    else:
        remedy = "check the disk, its mount options and the permissions of the directory"
    return EnvironmentFault(
        "RF7101",
        f"could not write to disk: {reason} ({free})",
        where=str(error.filename or path),
        remedy=f"{remedy}; what was complete before is untouched",
    )
