"""One live run per output directory.

The lock is `flock` on `run.lock`: the kernel gives it back when its holder dies, `kill -9`
included, so a stale lock cannot exist on a local disk. The file also holds pid, host and start
time: for the message that refuses a second run, and as the lock itself on file systems without
`flock`. There a record of another host is believed, because nobody can ask whether that process
still lives.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import socket
import time
from pathlib import Path
from typing import Any

from rlhf_fast.errors import CheckpointError

LOCK_NAME = "run.lock"

_logger = logging.getLogger(__name__)
_held: set[int] = set()


class RunLock:
    """Exclusive use of a directory, from `acquire` to `release` or the end of the process.

    Args:
        directory: existing directory; the file `run.lock` stays there, empty when nobody holds it.
    """

    def __init__(self, directory: Path) -> None:
        self.path = Path(directory) / LOCK_NAME
        self._descriptor: int | None = None

    def acquire(self) -> None:
        """Take the lock or fail at once.

        Raises:
            CheckpointError: another run is using the directory (RF8201).
            OSError: the lock file cannot be created.
        """
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            self._take(descriptor)
        except BaseException:
            os.close(descriptor)
            raise
        self._descriptor = descriptor
        _held.add(descriptor)

    def release(self) -> None:
        """Give the lock back; harmless when it is not held."""
        if self._descriptor is None:
            return
        descriptor, self._descriptor = self._descriptor, None
        _held.discard(descriptor)
        # The file itself stays: unlinking a lock file races with whoever is just opening it.
        os.ftruncate(descriptor, 0)
        os.close(descriptor)

    def _take(self, descriptor: int) -> None:
        holder = _read_record(descriptor)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise self._in_use(_read_record(descriptor) or holder) from None
        except OSError:
            if holder and _may_be_alive(holder):
                raise self._in_use(holder) from None
        holder = _read_record(descriptor)
        if holder:
            _logger.warning(
                "took over %s: its run (pid %s on %s, since %s) ended without releasing it",
                self.path,
                holder.get("pid"),
                holder.get("host"),
                holder.get("since"),
            )
        record = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "since": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "process_start": process_start(os.getpid()),
        }
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(record).encode(), 0)

    def _in_use(self, holder: dict[str, Any]) -> CheckpointError:
        return CheckpointError(
            "RF8201",
            f"another run is using this directory: pid {holder.get('pid', 'unknown')} on "
            f"{holder.get('host', 'an unknown host')}, since {holder.get('since', 'unknown')}",
            where=str(self.path),
            remedy="wait for it or stop it, or choose another output_dir; if it ran on a host "
            f"that is gone, delete {LOCK_NAME}",
        )


def process_start(pid: int) -> str | None:
    """When a process started, only good for comparing; None if it cannot be known.

    A pid alone is not an identity: it is used again after a reboot or a few days.
    """
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return None
    # The command in parentheses may hold spaces; starttime is field 22, the 20th after it.
    return f"{boot}:{text.rpartition(')')[2].split()[19]}"


def _may_be_alive(holder: dict[str, Any]) -> bool:
    pid = holder.get("pid")
    if holder.get("host") != socket.gethostname() or not isinstance(pid, int):
        return True
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    recorded, current = holder.get("process_start"), process_start(pid)
    return recorded is None or current is None or recorded == current


def _read_record(descriptor: int) -> dict[str, Any]:
    try:
        record = json.loads(os.pread(descriptor, 4096, 0) or b"{}")
    except (ValueError, RecursionError):
        return {"pid": "unknown"}
    return record if isinstance(record, dict) else {"pid": "unknown"}


def _forget_in_child() -> None:
    # A forked worker shares the lock; if it outlived a killed parent, the directory would stay
    # locked.
    for descriptor in list(_held):
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_forget_in_child)
