"""The small JSON files of a run directory."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlhf_fast.distributed.durable import storage_fault, write_atomically
from rlhf_fast.errors import CheckpointError, RLHFError


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a file; None if there is no such file.

    Raises:
        CheckpointError: RF8206, it is there and cannot be read.
    """
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise _unreadable(path, str(error)) from error
    if not isinstance(value, dict):
        raise _unreadable(path, "not a JSON object")
    return value


def _unreadable(path: Path, reason: str) -> RLHFError:
    return CheckpointError(
        "RF8206",
        f"{path.name} cannot be read: {reason}",
        where=str(path),
        remedy="restore it from a copy, or start over with run.overwrite=true",
    )


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Replace the file, atomically.

    Raises:
        EnvironmentFault: RF7101, writing failed.
    """
    data = json.dumps(value, indent=2, sort_keys=True).encode("utf-8") + b"\n"
    try:
        write_atomically(path, data)
    except OSError as error:
        raise storage_fault(error, path) from error
