"""Small files that others may have touched: read without waiting and without filling the memory.

A named pipe makes `open` wait for a writer, a device never ends, and a file may have grown to any
size. What is read when a run starts is a regular file of bounded size, or an error.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path


def open_regular(path: Path, *, follow_links: bool = True) -> int:
    """Open a regular file for reading; returns the descriptor.

    Raises:
        OSError: it is not there, may not be read, is a link that shall not be followed, or is no
            regular file.
    """
    # Asked before it is opened, because opening alone can do something to a device; and again
    # after, because another may lie there by then. O_NONBLOCK keeps a named pipe from waiting.
    if not follow_links and path.is_symlink():
        raise OSError(errno.ELOOP, "is a symbolic link", str(path))
    _require_regular(os.stat(path), path)
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
    descriptor = os.open(path, flags if follow_links else flags | os.O_NOFOLLOW)
    try:
        _require_regular(os.fstat(descriptor), path)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _require_regular(found: os.stat_result, path: Path) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "is not a regular file", str(path))


def read_small(path: Path, limit: int, *, follow_links: bool = True) -> bytes:
    """The bytes of a regular file that has at most `limit` of them.

    Raises:
        OSError: as `open_regular`, or it is larger; no more than the limit is read then.
    """
    with os.fdopen(open_regular(path, follow_links=follow_links), "rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise OSError(errno.EFBIG, f"is larger than {limit} bytes", str(path))
    return data
