"""JSON Lines and JSON arrays by the standard library, one line in memory at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from rlhf_fast.data.report import BadRowPolicy
from rlhf_fast.data.rows import Row
from rlhf_fast.errors import DataError

UTF8_BOM = b"\xef\xbb\xbf"
_CHUNK = 1 << 20
_SKIP_HINT = "or skip such rows with data.on_bad_row=skip"


class _Line(NamedTuple):
    number: int
    data: bytes
    too_long: bool
    complete: bool


def _lines(stream: BinaryIO, max_bytes: int) -> Iterator[_Line]:
    """Lines of a binary stream; of a line over `max_bytes` only the head is ever held."""
    number = 0
    while data := stream.readline(max_bytes + 2):
        number += 1
        complete = data.endswith(b"\n")
        too_long = len(data.rstrip(b"\r\n")) > max_bytes
        if too_long and not complete:
            while chunk := stream.readline(_CHUNK):
                if chunk.endswith(b"\n"):
                    complete = True
                    break
        if number == 1:
            data = data.removeprefix(UTF8_BOM)
        yield _Line(number, data.strip(b" \t\r\n"), too_long, complete)


def _decode(data: bytes, origin: str, replace: bool) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        if replace:
            # Bytes become lone surrogates, which `clean_row` then replaces and counts.
            return data.decode("utf-8", "surrogateescape")
        raise DataError(
            "RF2008",
            f"invalid UTF-8: byte 0x{data[error.start]:02x} at byte {error.start + 1} of the line",
            where=origin,
            expected="a file in UTF-8",
            remedy=f"convert the file to UTF-8, {_SKIP_HINT}",
        ) from None


def _parse(text: str, origin: str, complete: bool) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        if not complete:
            raise DataError(
                "RF2006",
                f"the last line is cut off: {error.msg} at column {error.colno}",
                where=origin,
                expected="a JSON object and a newline",
                remedy=f"write the file again (was a copy or download cut short?), {_SKIP_HINT}",
            ) from None
        raise DataError(
            "RF2005",
            f"broken JSON: {error.msg} at column {error.colno}",
            where=origin,
            expected="one JSON object per line",
            remedy=f"repair the line, {_SKIP_HINT}",
        ) from None
    except (ValueError, RecursionError) as error:
        # Integers of thousands of digits and nesting beyond the interpreter's limit.
        raise DataError(
            "RF2005",
            f"JSON beyond what can be read: {str(error).split(';')[0]}",
            where=origin,
            expected="one JSON object per line",
            remedy=f"repair the line, {_SKIP_HINT}",
        ) from None


def require_object(value: Any, origin: str) -> dict[str, Any]:
    """`value` if it is a mapping.

    Raises:
        DataError: RF2007 for any other type.
    """
    if isinstance(value, dict):
        return value
    raise DataError(
        "RF2007",
        f"the row is {json_type(value)}",
        where=origin,
        expected="a JSON object with named columns",
        remedy=f'write each row as an object such as {{"prompt": "..."}}, {_SKIP_HINT}',
    )


def json_type(value: Any) -> str:
    """The JSON word for the type of a value, with an article."""
    if value is None:
        return "null"
    names = {bool: "a boolean", int: "a number", float: "a number", str: "text"}
    names |= {list: "a list", tuple: "a list", dict: "an object"}
    return names.get(type(value), f"of type {type(value).__name__}")


def read_json_lines(
    path: Path, policy: BadRowPolicy, *, max_row_bytes: int, replace: bool
) -> Iterator[Row]:
    """Rows of a JSON Lines file. A BOM, CRLF line ends and blank lines are fine.

    Args:
        path: the file.
        policy: what a bad line means.
        max_row_bytes: bytes of the longest line that is accepted.
        replace: decode invalid UTF-8 to U+FFFD instead of rejecting the row.
    """
    index = 0
    with path.open("rb") as stream:
        for line in _lines(stream, max_row_bytes):
            if not line.data:
                continue
            origin = f"{path}:{line.number}"
            policy.report.read += 1
            try:
                if line.too_long:
                    raise _row_too_large(origin, max_row_bytes)
                text = _decode(line.data, origin, replace)
                fields = require_object(_parse(text, origin, line.complete), origin)
            except DataError as error:
                policy.reject(error)
            else:
                yield Row(origin, index, fields)
            index += 1


def _row_too_large(origin: str, max_row_bytes: int) -> DataError:
    return DataError(
        "RF2010",
        f"the row is longer than {max_row_bytes} bytes",
        where=origin,
        expected="one training example per row",
        remedy=f"split the row (are newlines missing between rows?), {_SKIP_HINT}",
    )


def read_json_array(path: Path, policy: BadRowPolicy, *, replace: bool) -> Iterator[Row]:
    """Rows of a file that holds one JSON array of objects.

    Raises:
        DataError: RF2005 or RF2008; a broken array has no row to skip.
    """
    text = _decode(path.read_bytes().removeprefix(UTF8_BOM), str(path), replace)
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(
            "RF2005",
            f"broken JSON array: {error.msg} at column {error.colno}",
            where=f"{path}:{error.lineno}",
            expected="one JSON array of objects",
            remedy="repair the file, or write it as JSON Lines: one object per line",
        ) from None
    except (ValueError, RecursionError) as error:
        raise DataError(
            "RF2005",
            f"JSON beyond what can be read: {str(error).split(';')[0]}",
            where=str(path),
            expected="one JSON array of objects",
            remedy="repair the file, or write it as JSON Lines: one object per line",
        ) from None
    for index, value in enumerate(values):
        origin = f"{path}[{index}]"
        policy.report.read += 1
        try:
            fields = require_object(value, origin)
        except DataError as error:
            policy.reject(error)
        else:
            yield Row(origin, index, fields)
