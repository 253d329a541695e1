"""Run a command under a time limit, and end all that it started when the limit is up."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
INSTALLED = not (ROOT / "setup.py").exists()
GRACE = 10.0  # seconds between interrupting a command and killing it


class Outcome(NamedTuple):
    """How a command ended; `exit_code` is None if the limit ended it."""

    exit_code: int | None
    seconds: float


def run(
    command: Sequence[str],
    limit: float,
    *,
    log: IO[bytes] | None = None,
    environment: Mapping[str, str] | None = None,
) -> Outcome:
    """Run in the folder of our package; what it prints goes to `log`, or where ours goes."""
    start = time.monotonic()
    try:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=None if environment is None else dict(environment),
            stdout=log,
            stderr=None if log is None else subprocess.STDOUT,
            start_new_session=True,
        )
    except OSError as problem:  # no such program: the exit code of a shell
        if log is not None:
            log.write(f"{problem}\n".encode())
        return Outcome(127, time.monotonic() - start)
    try:
        code: int | None = process.wait(timeout=max(limit, 0.0))
    except subprocess.TimeoutExpired:
        code = None
    finally:
        _end(process)
    return Outcome(code, time.monotonic() - start)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Also what it left running: a worker that holds the GPU would slow the next command.

    An interrupted pytest still tells what failed so far, and Python where it was.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=GRACE / 2)


def python_path() -> dict[str, str]:
    """The environment in which `bench` and both packages are found, kernels compiled for real.

    An installation finds them without help, and `kernels` may be somebody else's package there.
    """
    found = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    if not INSTALLED:
        ours = [str(ROOT), str(ROOT / "kernels")]
        found["PYTHONPATH"] = os.pathsep.join([*ours, *filter(None, [found.get("PYTHONPATH")])])
    found["PYTHONUNBUFFERED"] = "1"
    return found
