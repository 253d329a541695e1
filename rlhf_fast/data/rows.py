"""A data row and where it came from; the checks every string in it must pass."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from rlhf_fast.errors import DataError

REPLACEMENT = "\ufffd"
_INVALID = re.compile("[\x00\ud800-\udfff]")


@dataclass(frozen=True)
class Row:
    """One row of a data source.

    Args:
        origin: the place to name in messages, `file:line` or `name[row]`.
        index: 0-based position in its source; blank lines do not count, bad rows do.
        fields: column name to value.
    """

    origin: str
    index: int
    fields: Mapping[str, Any]


class _InvalidText(Exception):
    """Raised inside a cleaner with the path and the reason of the first fault."""


class _Cleaner:
    def __init__(self, replace: bool) -> None:
        self.replace = replace
        self.replaced = False

    def string(self, text: str, path: str) -> str:
        reason = "a NUL character" if "\x00" in text else ""
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            reason = f"a lone surrogate \\u{ord(text[error.start]):04x}"
        if not reason:
            return text
        if not self.replace:
            raise _InvalidText(path, reason)
        self.replaced = True
        return _INVALID.sub(REPLACEMENT, text)

    def value(self, value: Any, path: str) -> Any:
        if isinstance(value, str):
            return self.string(value, path)
        if isinstance(value, Mapping):
            return {
                self.string(str(k), f"{path}{k!s} (key)"): self.value(
                    v, f"{path}.{k!s}" if path else str(k)
                )
                for k, v in value.items()
            }
        if isinstance(value, list | tuple):
            return [self.value(v, f"{path}[{i}]") for i, v in enumerate(value)]
        return value


def clean_row(row: Row, replace: bool) -> tuple[Row, bool]:
    """Check every string of a row, however deeply nested.

    NUL characters and lone surrogates are valid in JSON and fatal later: tokenizers and terminals
    refuse them with errors that name no row.

    Args:
        row: the row as read.
        replace: put U+FFFD in place of what is invalid instead of raising.

    Returns:
        The row with clean strings, and whether anything was replaced.

    Raises:
        DataError: RF2009, naming the column.
    """
    cleaner = _Cleaner(replace)
    try:
        fields = cleaner.value(row.fields, "")
    except _InvalidText as fault:
        path, reason = fault.args
        what = f"column '{_printable(path)}' holds {reason}"
        expected = "text that can be written as UTF-8, without NUL"
    except RecursionError:
        what, expected = "the row is nested too deeply to be checked", "a flat row"
    else:
        return Row(row.origin, row.index, fields), cleaner.replaced
    raise DataError(
        "RF2009",
        what,
        where=row.origin,
        expected=expected,
        remedy="repair the row, or skip such rows with data.on_bad_row=skip",
    )


def _printable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode("utf-8").replace("\x00", "\\x00")


def _canonical(value: Any) -> Any:
    """JSON form of the values that columnar files add to JSON's own."""
    if isinstance(value, bytes):
        return {"bytes": value.hex()}
    if hasattr(value, "isoformat"):
        return {"time": value.isoformat()}
    if hasattr(value, "tolist"):
        return value.tolist()
    return {"value": str(value)}


def fingerprint_rows(rows: Iterable[Mapping[str, Any]]) -> str:
    """sha256 (hex) of rows in order; the order of the columns inside a row does not matter."""
    digest = hashlib.sha256()
    for row in rows:
        text = json.dumps(dict(row), sort_keys=True, ensure_ascii=True, default=_canonical)
        digest.update(text.encode("ascii"))
        digest.update(b"\n")
    return digest.hexdigest()
