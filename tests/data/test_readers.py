"""Every way a data file can be wrong ends in one DataError that names the place and the remedy."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlhf_fast.data.readers import fingerprint_source, read_rows
from rlhf_fast.data.report import BadRowPolicy, DataReport
from rlhf_fast.data.rows import Row
from rlhf_fast.errors import DataError

Write = Callable[..., Path]


def policy(on_bad_row: str = "error", max_bad_rows: int = 100) -> BadRowPolicy:
    return BadRowPolicy(on_bad_row, max_bad_rows, DataReport("test"))


def read(source: Any, p: BadRowPolicy | None = None, **kwargs: Any) -> list[Row]:
    return list(read_rows(source, p or policy(), **kwargs))


def fault(source: Any, **kwargs: Any) -> DataError:
    with pytest.raises(DataError) as caught:
        read(source, **kwargs)
    assert caught.value.remedy
    assert caught.value.where
    return caught.value


def test_json_lines_keep_their_line_as_origin(write: Write) -> None:
    path = write(b'{"prompt": "a"}\n\n{"prompt": "b"}\n')
    rows = read(path)
    assert [r.fields for r in rows] == [{"prompt": "a"}, {"prompt": "b"}]
    assert [r.origin for r in rows] == [f"{path}:1", f"{path}:3"]
    assert [r.index for r in rows] == [0, 1]


def test_bom_crlf_and_missing_last_newline_are_fine(write: Write) -> None:
    path = write(b'\xef\xbb\xbf{"prompt": "\xc3\xa4"}\r\n{"prompt": "b"}')
    assert [r.fields["prompt"] for r in read(path)] == ["ä", "b"]


def test_json_array_and_bom(write: Write) -> None:
    path = write(b'\xef\xbb\xbf [{"prompt": "a"},\n {"prompt": "b"}]', "data.json")
    rows = read(path)
    assert [r.fields["prompt"] for r in rows] == ["a", "b"]
    assert rows[1].origin == f"{path}[1]"


def test_broken_json_array_names_its_line(write: Write) -> None:
    error = fault(write(b'[{"prompt": "a"},\n {"prompt": }]', "data.json"))
    assert error.code == "RF2005"
    assert error.where.endswith("data.json:2")
    assert "JSON Lines" in error.remedy


def test_missing_file_suggests_its_neighbour(tmp_path: Path, write: Write) -> None:
    write([{"prompt": "a"}], "train.jsonl")
    error = fault(str(tmp_path / "trian.jsonl"))
    assert error.code == "RF2001"
    assert error.where == str(tmp_path / "trian.jsonl")
    assert str(tmp_path / "train.jsonl") in error.remedy


def test_missing_folder_is_named(tmp_path: Path) -> None:
    error = fault(tmp_path / "nowhere" / "train.jsonl")
    assert error.code == "RF2001"
    assert "nowhere does not exist" in error.what


def test_directory_lists_the_files_in_it(tmp_path: Path, write: Write) -> None:
    write([{"prompt": "a"}], "train.jsonl")
    error = fault(tmp_path)
    assert error.code == "RF2002"
    assert "train.jsonl" in error.remedy


@pytest.mark.parametrize("content", [b"", b"\n \r\n\n", b"\xef\xbb\xbf", b"[]"])
def test_empty_file(write: Write, content: bytes) -> None:
    error = fault(write(content))
    assert error.code == "RF2003"
    assert "0 rows" in error.what
    assert error.where.endswith("data.jsonl")


def test_broken_json_names_line_and_column(write: Write) -> None:
    error = fault(write(b'{"prompt": "a"}\n{"prompt": oops}\n{"prompt": "c"}\n'))
    assert error.code == "RF2005"
    assert error.where.endswith("data.jsonl:2")
    assert "column 12" in error.what
    assert "data.on_bad_row=skip" in error.remedy


def test_truncated_last_line_is_told_apart_from_broken_json(write: Write) -> None:
    error = fault(write(b'{"prompt": "a"}\n{"prompt": "b'))
    assert error.code == "RF2006"
    assert error.where.endswith("data.jsonl:2")
    assert "cut off" in error.what


@pytest.mark.parametrize(
    ("line", "kind"),
    [(b"[1]\n", "a list"), (b'"x"\n', "text"), (b"null\n", "null"), (b"3\n", "a number")],
)
def test_row_that_is_no_object(write: Write, line: bytes, kind: str) -> None:
    error = fault(write(b'{"prompt": "a"}\n' + line))
    assert error.code == "RF2007"
    assert kind in error.what
    assert error.where.endswith(":2")


def test_invalid_utf8_names_the_byte(write: Write) -> None:
    error = fault(write(b'{"prompt": "a"}\n{"prompt": "\xff"}\n'))
    assert error.code == "RF2008"
    assert "0xff at byte 13" in error.what
    assert error.where.endswith(":2")


@pytest.mark.parametrize(
    ("text", "reason"), [("\\ud800", "lone surrogate \\ud800"), ("\\u0000", "NUL")]
)
def test_lone_surrogates_and_nul_name_the_column(write: Write, text: str, reason: str) -> None:
    line = f'{{"a": [1, {{"b": "x{text}"}}]}}\n'.encode()
    error = fault(write(b'{"a": "fine"}\n' + line))
    assert error.code == "RF2009"
    assert reason in error.what
    assert "'a[1].b'" in error.what
    assert error.where.endswith(":2")
    str(error).encode("utf-8")


def test_raw_nul_byte_is_broken_json(write: Write) -> None:
    error = fault(write(b'{"prompt": "a\x00b"}\n'))
    assert error.code == "RF2005"
    assert error.where.endswith(":1")


def test_invalid_text_is_replaced_only_if_asked(write: Write) -> None:
    path = write(b'{"p": "\xff"}\n{"p": "\\ud800"}\n{"p": "\\u0000"}\n{"p": "fine", "q": [1]}\n')
    p = policy()
    rows = read(path, p, replace_invalid_text=True)
    assert [r.fields["p"] for r in rows[1:]] == ["\ufffd", "\ufffd", "fine"]
    assert rows[0].fields["p"] == "\ufffd"
    assert p.report.replaced_text == 3


def test_row_of_10_mb_is_refused_without_being_parsed(write: Write) -> None:
    big = b'{"prompt": "' + b"x" * (10 << 20) + b'"}\n'
    path = write(b'{"prompt": "a"}\n' + big + b'{"prompt": "c"}\n')
    error = fault(path)
    assert error.code == "RF2010"
    assert error.where.endswith(":2")
    assert "split the row" in error.remedy
    p = policy("skip")
    assert [r.fields["prompt"] for r in read(path, p)] == ["a", "c"]
    assert p.report.filtered["bad row"] == 1
    assert len(read(path, max_row_bytes=11 << 20)) == 3


def test_row_of_exactly_the_limit_is_accepted(write: Write) -> None:
    line = b'{"prompt": "abc"}'
    assert len(read(write(line + b"\r\n"), max_row_bytes=len(line))) == 1
    assert fault(write(line + b"\n"), max_row_bytes=len(line) - 1).code == "RF2010"


@pytest.mark.parametrize("line", [b"[" * 100_000, b'{"a": ' + b"[" * 900 + b"]" * 900 + b"}"])
def test_deep_nesting_never_overflows_the_stack(write: Write, line: bytes) -> None:
    p = policy("skip")
    rows = read(write(b'{"a": "fine"}\n' + line + b"\n"), p)
    assert rows[0].fields == {"a": "fine"}
    assert len(rows) + p.skipped == 2


def test_number_with_thousands_of_digits(write: Write) -> None:
    error = fault(write(b'{"a": ' + b"9" * 5000 + b"}\n"))
    assert error.code == "RF2005"
    assert error.where.endswith(":1")


def test_gzip_named_jsonl_is_recognised(write: Write) -> None:
    error = fault(write(gzip.compress(b'{"prompt": "a"}\n')))
    assert error.code == "RF2011"
    assert "gzip" in error.what
    assert "gunzip" in error.remedy


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be"])
def test_utf16_is_recognised(write: Write, encoding: str) -> None:
    text = ("\ufeff" if encoding == "utf-16-be" else "") + '{"prompt": "a"}\n'
    error = fault(write(text.encode(encoding)))
    assert error.code == "RF2011"
    assert "UTF-16" in error.what


def test_csv_is_refused_with_a_way_out(write: Write) -> None:
    error = fault(write(b"prompt,completion\na,b\n", "data.csv"))
    assert error.code == "RF2011"
    assert "JSON Lines" in error.remedy


def test_unreadable_file(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")  # root reads everything, so say it ourselves

    path = write([{"prompt": "a"}])
    monkeypatch.setattr(Path, "open", refuse)
    error = fault(path)
    assert error.code == "RF2016"
    assert "Permission denied" in error.what
    assert error.where == str(path)


def test_path_longer_than_the_system_allows() -> None:
    error = fault("/" + "x" * 5000 + ".jsonl")
    assert error.code == "RF2016"
    assert "permissions" in error.remedy


def test_skip_counts_rows_and_keeps_their_places(write: Write) -> None:
    p = policy("skip")
    path = write(b'{"p": 1}\nbroken\n[]\n{"p": 2}\n{"p": "\\ud800"}\n{"p": 3')
    rows = read(path, p)
    assert [(r.fields["p"], r.index) for r in rows] == [(1, 0), (2, 3)]
    assert p.report.read == 6
    assert p.report.filtered == {"bad row": 4}
    assert p.report.bad_rows[0].startswith(f"{path}:2: broken JSON")


def test_skip_has_a_cap(write: Write) -> None:
    path = write(b'{"p": 1}\n' + b"broken\n" * 4)
    assert len(read(path, policy("skip", 4))) == 1
    with pytest.raises(DataError) as caught:
        read(path, policy("skip", 3))
    assert caught.value.code == "RF2013"
    assert caught.value.where == f"{path}:5"
    assert "data.max_bad_rows" in caught.value.remedy
    assert f"{path}:2" in caught.value.what


def test_rows_in_memory() -> None:
    rows = read([{"prompt": "a"}, {"prompt": ("b",)}])
    assert rows[1].origin == "<list in memory>[1]"
    assert rows[1].fields == {"prompt": ["b"]}
    assert read(iter([{"prompt": "a"}]))[0].fields == {"prompt": "a"}


def test_row_in_memory_that_is_no_mapping() -> None:
    error = fault([{"prompt": "a"}, "b"])
    assert error.code == "RF2007"
    assert error.where == "<list in memory>[1]"


@pytest.mark.parametrize("source", [None, 3, {"prompt": ["a"]}])
def test_source_of_the_wrong_type(source: Any) -> None:
    error = fault(source)
    assert error.code == "RF2017"
    assert "list" in error.remedy


def test_empty_list() -> None:
    assert fault([]).code == "RF2003"


def test_fingerprint_follows_content_and_order(write: Write) -> None:
    a, b = {"p": "a", "q": 1}, {"p": "b"}
    path = write([a, b])
    assert fingerprint_source(path) == fingerprint_source(str(path))
    assert fingerprint_source(path) != fingerprint_source(write([b, a], "other.jsonl"))
    assert fingerprint_source([a, b]) == fingerprint_source([{"q": 1, "p": "a"}, b])
    assert fingerprint_source([a, b]) != fingerprint_source([b, a])
    assert fingerprint_source([a, b]) != fingerprint_source([{"p": "a", "q": 2}, b])
    assert len(fingerprint_source([{"p": b"bytes", "q": {1, 2}}])) == 64


VALID = b"".join(
    json.dumps(row, ensure_ascii=False).encode() + b"\n"
    for row in (
        {"prompt": "the cät", "completion": "sat", "n": 1.5e3},
        {"messages": [{"role": "user", "content": 'hi \\ " \n'}], "x": None},
        {"prompt": "ende", "nested": {"a": [1, {"b": "c"}]}},
    )
)


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    data = bytearray(VALID)
    for _ in range(draw(st.integers(1, 6))):
        at = draw(st.integers(0, len(data)))
        how = draw(st.sampled_from(["cut", "insert", "flip", "swap"]))
        if how == "cut":
            del data[at : at + draw(st.integers(1, 40))]
        elif how == "insert":
            data[at:at] = draw(st.binary(min_size=1, max_size=8))
        elif how == "flip" and at < len(data):
            data[at] ^= 1 << draw(st.integers(0, 7))
        else:
            data[at:] = data[at:][::-1]
    return bytes(data)


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(content=mutated(), on_bad_row=st.sampled_from(["error", "skip"]), replace=st.booleans())
def test_mutated_files_yield_rows_or_one_data_error(
    tmp_path: Path, content: bytes, on_bad_row: str, replace: bool
) -> None:
    path = tmp_path / "mutated.jsonl"
    path.write_bytes(content)
    p = policy(on_bad_row)
    rows, error = [], None
    try:
        rows = read(path, p, replace_invalid_text=replace)
    except DataError as caught:
        error = caught
    if error is not None:
        assert error.code.startswith("RF20")
        assert str(path) in error.where
        assert error.remedy
        return
    assert len(rows) + p.skipped == p.report.read
    for row in rows:
        json.dumps(row.fields, ensure_ascii=False).encode("utf-8")
        assert "\\u0000" not in json.dumps(row.fields)
