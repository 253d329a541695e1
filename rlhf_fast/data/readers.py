"""From a path, a hub name or rows in memory to a stream of `Row`s with their origin.

The kind of a file is read from its first bytes, not from its name: a gzip archive or a parquet file
called `train.jsonl` is recognised.
"""

from __future__ import annotations

import difflib
import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from rlhf_fast.data import columnar
from rlhf_fast.data.jsonl import UTF8_BOM, json_type, read_json_array, read_json_lines
from rlhf_fast.data.report import BadRowPolicy, DataReport
from rlhf_fast.data.rows import Row, clean_row, fingerprint_rows
from rlhf_fast.errors import DataError

MAX_ROW_BYTES = 8 << 20

RowSource = str | Path | Iterable[Mapping[str, Any]]
"""A path, a hub name, or rows: a list of dicts, a `datasets.Dataset`, any iterable of mappings."""

_TEXT_SUFFIXES = {".jsonl", ".json", ".ndjson"}
_COLUMNAR_SUFFIXES = {".parquet", ".arrow"}
_OTHER_SUFFIXES = {".csv", ".tsv", ".txt", ".gz", ".zst", ".zip", ".xz", ".bz2"}
_FOREIGN = {
    b"\x1f\x8b": ("gzip data", "gunzip it"),
    b"\x28\xb5\x2f\xfd": ("zstd data", "decompress it with unzstd"),
    b"PK\x03\x04": ("a zip archive", "unzip it"),
    b"BZh": ("bzip2 data", "bunzip2 it"),
    b"\xfd7zXZ\x00": ("xz data", "decompress it with unxz"),
    b"\xff\xfe": ("UTF-16 text", "convert it to UTF-8"),
    b"\xfe\xff": ("UTF-16 text", "convert it to UTF-8"),
}


def read_rows(
    source: RowSource,
    policy: BadRowPolicy,
    *,
    split: str = "train",
    max_row_bytes: int = MAX_ROW_BYTES,
    replace_invalid_text: bool = False,
) -> Iterator[Row]:
    """Stream the rows of a source.

    Args:
        source: a `.jsonl`, `.json`, `.parquet` or `.arrow` file, a saved dataset directory, a hub
            name (`owner/name`, `owner/name:config`), or rows in memory.
        policy: what a bad row means; its report counts every row read.
        split: split of a hub name, a saved dataset or a dataset dictionary.
        max_row_bytes: longest JSON line accepted, in bytes.
        replace_invalid_text: replace invalid UTF-8, lone surrogates and NUL by U+FFFD and count
            the rows, instead of rejecting them.

    Raises:
        DataError: RF2001 to RF2017.
        EnvironmentFault: RF7020 if the source needs `datasets` and it is not installed.
    """
    name = describe_source(source)
    policy.report.source = policy.report.source or name
    found = False
    for row in _open(source, name, policy, split, max_row_bytes, replace_invalid_text):
        found = True
        try:
            clean, replaced = clean_row(row, replace_invalid_text)
        except DataError as error:
            policy.reject(error)
            continue
        policy.report.replaced_text += replaced
        yield clean
    if not found and policy.report.read == 0:
        raise DataError(
            "RF2003",
            "the data source is empty: 0 rows",
            where=name,
            expected="at least one row",
            remedy="check that the file was written completely and is the one you meant",
        )


def describe_source(source: RowSource) -> str:
    """A short name of a source for messages and reports."""
    if isinstance(source, str | Path):
        return str(source)
    return f"<{type(source).__name__} in memory>"


def _open(
    source: RowSource,
    name: str,
    policy: BadRowPolicy,
    split: str,
    max_row_bytes: int,
    replace: bool,
) -> Iterator[Row]:
    if not isinstance(source, str | Path):
        return _rows_in_memory(source, name, policy, split)
    path = Path(os.path.expanduser(source))
    try:
        is_directory, exists = path.is_dir(), path.exists()
        if is_directory and columnar.is_saved_dataset(path):
            return _number(columnar.read_saved_dataset(path, split), name, policy)
        if is_directory:
            raise _directory(path)
        if exists:
            return _open_file(path, policy, max_row_bytes, replace)
    except (OSError, ValueError) as error:
        raise _unreadable(name, error) from error
    if isinstance(source, str) and _may_be_hub_name(source):
        return _number(columnar.read_hub(source, split), name, policy)
    raise _missing(path)


def _may_be_hub_name(source: str) -> bool:
    suffix = Path(source).suffix.lower()
    known = _TEXT_SUFFIXES | _COLUMNAR_SUFFIXES | _OTHER_SUFFIXES
    return suffix not in known and columnar.looks_like_hub_name(source)


def _open_file(
    path: Path, policy: BadRowPolicy, max_row_bytes: int, replace: bool
) -> Iterator[Row]:
    with path.open("rb") as stream:
        head = stream.read(4096)
    if head.startswith(b"PAR1"):
        return _number(columnar.read_parquet(path), str(path), policy)
    if head.startswith((b"ARROW1", b"\xff\xff\xff\xff")):
        return _number(columnar.read_arrow(path), str(path), policy)
    for magic, (kind, remedy) in _FOREIGN.items():
        if head.startswith(magic):
            raise _wrong_kind(path, f"the file holds {kind}", remedy)
    if head and path.suffix.lower() in _COLUMNAR_SUFFIXES:
        what = f"the file is named {path.suffix} but does not begin like one"
        raise _wrong_kind(path, what, "copy or download the file again")
    if path.suffix.lower() in {".csv", ".tsv"}:
        raise _wrong_kind(path, "CSV is not supported", "convert it to JSON Lines")
    if head.removeprefix(UTF8_BOM).lstrip()[:1] == b"[":
        return read_json_array(path, policy, replace=replace)
    return read_json_lines(path, policy, max_row_bytes=max_row_bytes, replace=replace)


def _number(rows: Iterable[Mapping[str, Any]], name: str, policy: BadRowPolicy) -> Iterator[Row]:
    for index, fields in enumerate(rows):
        policy.report.read += 1
        yield Row(f"{name}[{index}]", index, fields)


def _rows_in_memory(
    source: Iterable[Mapping[str, Any]], name: str, policy: BadRowPolicy, split: str
) -> Iterator[Row]:
    is_dataset = type(source).__module__.split(".")[0] == "datasets"
    if isinstance(source, Mapping) and is_dataset:
        source = columnar.choose_split(source, split, name)
    if isinstance(source, Mapping) or not isinstance(source, Iterable):
        raise DataError(
            "RF2017",
            f"the data source is {json_type(source)}",
            where=name,
            expected="a path, a hub name, a list of dicts or a datasets.Dataset",
            remedy="put the rows into a list: [{'prompt': ...}, ...]",
        )
    for index, fields in enumerate(source):
        policy.report.read += 1
        origin = f"{name}[{index}]"
        if isinstance(fields, Mapping):
            yield Row(origin, index, fields)
            continue
        policy.reject(
            DataError(
                "RF2007",
                f"the row is {json_type(fields)}",
                where=origin,
                expected="a dict with named columns",
                remedy="give each row as a dict such as {'prompt': '...'}",
            )
        )


def _missing(path: Path) -> DataError:
    parent = path.parent
    names = [p.name for p in parent.iterdir()] if parent.is_dir() else []
    near = difflib.get_close_matches(path.name, names, n=1)
    place = "" if parent.is_dir() else f" (its folder {parent} does not exist either)"
    return DataError(
        "RF2001",
        f"the data file does not exist{place}",
        where=str(path),
        expected="a .jsonl, .json, .parquet or .arrow file, or a hub name owner/name",
        remedy=f"did you mean {parent / near[0]}?" if near else "check the path",
    )


def _directory(path: Path) -> DataError:
    suffixes = _TEXT_SUFFIXES | _COLUMNAR_SUFFIXES
    inside = sorted(p.name for p in path.iterdir() if p.suffix.lower() in suffixes)
    return DataError(
        "RF2002",
        "the data path is a directory",
        where=str(path),
        expected="a file, or a directory written by Dataset.save_to_disk",
        remedy=f"name one of its files: {', '.join(inside[:5])}" if inside else "name a data file",
    )


def _unreadable(name: str, error: Exception) -> DataError:
    return DataError(
        "RF2016",
        f"the data file cannot be opened: {getattr(error, 'strerror', None) or error}",
        where=name.replace("\x00", "\\x00"),
        expected="a file that this user may read",
        remedy="check the path and its permissions",
    )


def _wrong_kind(path: Path, what: str, remedy: str) -> DataError:
    return DataError(
        "RF2011",
        what,
        where=str(path),
        expected="JSON Lines or a JSON array in UTF-8, parquet, or arrow",
        remedy=f"{remedy}, then name the result",
    )


def fingerprint_source(source: RowSource, *, split: str = "train") -> str:
    """sha256 (hex) of a source: of a file's bytes, or else of its rows in order.

    Raises:
        DataError: as `read_rows`.
    """
    path = Path(os.path.expanduser(source)) if isinstance(source, str | Path) else None
    if path is not None and path.is_file():
        digest = hashlib.sha256()
        with path.open("rb") as stream:
            while chunk := stream.read(1 << 20):
                digest.update(chunk)
        return digest.hexdigest()
    policy = BadRowPolicy("error", 0, DataReport("fingerprint"))
    return fingerprint_rows(row.fields for row in read_rows(source, policy, split=split))
