"""What makes two runs the same run: comparing configurations key by key.

Hard keys decide what is being trained (model, tokenizer, data, seed): a checkpoint is meaningless
under other values. Every other key is soft: it may change between a stop and a resume, and the
change is listed. Secrets are redacted before anything is compared or written.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_fast.errors import CheckpointError
from rlhf_fast.metrics import redact

_ABSENT = "(absent)"
SHOWN = 20


@dataclass(frozen=True)
class ConfigDifference:
    """One key whose value changed; values as JSON text."""

    key: str
    before: str
    after: str
    hard: bool

    def __str__(self) -> str:
        kind = "hard" if self.hard else "soft"
        return f"{self.key}: {self.before} -> {self.after} ({kind})"


def plain_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A redacted copy made of JSON values only; anything else becomes its text."""
    plain: dict[str, Any] = json.loads(json.dumps(redact(config), default=str, sort_keys=True))
    return plain


def fingerprint(config: Mapping[str, Any]) -> str:
    """SHA-256, in hex, of the redacted configuration, whatever the order of its keys."""
    text = json.dumps(plain_config(config), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8", errors="backslashreplace")).hexdigest()


def compare(
    before: Mapping[str, Any], after: Mapping[str, Any], hard_keys: Sequence[str]
) -> list[ConfigDifference]:
    """Differences between two configurations, hard ones first.

    Args:
        before: nested configuration of the existing run.
        after: nested configuration of the run that wants to use its directory.
        hard_keys: dotted keys; each covers everything below it.
    """
    old, new = _flatten(plain_config(before)), _flatten(plain_config(after))
    found = []
    for key in sorted(set(old) | set(new)):
        left, right = old.get(key, _ABSENT), new.get(key, _ABSENT)
        if left != right:
            hard = any(key == name or key.startswith(f"{name}.") for name in hard_keys)
            found.append(ConfigDifference(key, left, right, hard))
    return sorted(found, key=lambda difference: not difference.hard)


def refuse_own_inputs(config: Mapping[str, Any], folder: Path, entries: Iterable[str]) -> None:
    """Refuse to delete entries of a run directory that the configuration names as input.

    Args:
        config: nested; a text in it may name a file or directory, also as `file.py:name`.
        folder: the run directory.
        entries: names in it.

    Raises:
        CheckpointError: RF8209.
    """
    places = [os.path.realpath(folder / entry) for entry in entries]
    own = [
        f"{key}={text}"
        for key, text in _texts(config)
        if any(_lies_in(name, places) for name in (text, text.rpartition(":")[0]) if name)
    ]
    if own:
        raise CheckpointError(
            "RF8209",
            f"run.overwrite would delete what the run reads: {', '.join(own)}",
            where=str(folder),
            expected="input that lies elsewhere",
            remedy="choose another output_dir",
        )


def _lies_in(name: str, places: Sequence[str]) -> bool:
    path = Path(os.path.realpath(os.path.expanduser(name)))
    return os.path.exists(path) and any(path.is_relative_to(place) for place in places)


def _texts(config: Any, key: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(config, str):
        yield key, config
    elif isinstance(config, Mapping):
        for name, value in config.items():
            yield from _texts(value, f"{key}.{name}" if key else str(name))
    elif isinstance(config, list | tuple):
        for value in config:
            yield from _texts(value, key)


def listed(differences: Sequence[ConfigDifference]) -> str:
    """The differences in one line each, the first twenty of them."""
    lines = [str(difference) for difference in differences[:SHOWN]]
    if len(differences) > SHOWN:
        lines.append(f"... and {len(differences) - SHOWN} more")
    return "\n            ".join(lines)


def _flatten(config: Any, prefix: str = "") -> dict[str, str]:
    if isinstance(config, Mapping) and config:
        flat: dict[str, str] = {}
        for key, value in config.items():
            flat.update(_flatten(value, f"{prefix}.{key}" if prefix else str(key)))
        return flat
    return {prefix: json.dumps(config, sort_keys=True)}
