"""Parquet, arrow, saved datasets and hub names."""

from __future__ import annotations

import builtins
import importlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlhf_fast.data import columnar, load_sft
from rlhf_fast.data.readers import fingerprint_source, read_rows
from rlhf_fast.data.report import BadRowPolicy, DataReport
from rlhf_fast.data.rows import Row
from rlhf_fast.errors import EXIT_ENVIRONMENT, DataError, EnvironmentFault

datasets = pytest.importorskip("datasets")

ROWS = [{"prompt": "a", "n": 1}, {"prompt": "b", "n": 2}, {"prompt": "c", "n": 3}]


def read(source: Any, split: str = "train") -> list[Row]:
    return list(read_rows(source, BadRowPolicy("error", 0, DataReport("test")), split=split))


def fault(source: Any, split: str = "train") -> DataError:
    with pytest.raises(DataError) as caught:
        read(source, split)
    assert caught.value.remedy
    return caught.value


def parquet(path: Path) -> Path:
    datasets.Dataset.from_list(ROWS).to_parquet(str(path))
    return path


def arrow(path: Path, kind: str) -> Path:
    pyarrow = importlib.import_module("pyarrow")
    ipc = importlib.import_module("pyarrow.ipc")
    table = pyarrow.Table.from_pylist(ROWS)
    with getattr(ipc, f"new_{kind}")(str(path), table.schema) as writer:
        writer.write_table(table)
    return path


@pytest.mark.parametrize("name", ["data.parquet", "named.jsonl"])
def test_parquet_is_recognised_by_content(tmp_path: Path, name: str) -> None:
    path = parquet(tmp_path / name)
    rows = read(path)
    assert [r.fields for r in rows] == ROWS
    assert rows[2].origin == f"{path}[2]"


@pytest.mark.parametrize("kind", ["file", "stream"])
@pytest.mark.parametrize("name", ["data.arrow", "named.jsonl"])
def test_arrow_is_recognised_by_content(tmp_path: Path, kind: str, name: str) -> None:
    assert [r.fields for r in read(arrow(tmp_path / name, kind))] == ROWS


@pytest.mark.parametrize(
    "make", [parquet, lambda p: arrow(p, "file"), lambda p: arrow(p, "stream")]
)
def test_truncated_columnar_file(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    path = make(tmp_path / "data.bin")
    # Deep enough to reach into a stream's last batch: a stream has no footer to miss.
    path.write_bytes(path.read_bytes()[:-140])
    error = fault(path)
    assert error.code == "RF2012"
    assert error.where == str(path)
    assert "again" in error.remedy


def test_garbage_named_parquet(tmp_path: Path) -> None:
    path = tmp_path / "data.parquet"
    path.write_bytes(b"not parquet")
    error = fault(path)
    assert error.code == "RF2011"
    assert "named .parquet" in error.what


def test_dataset_and_dictionary_in_memory() -> None:
    dataset = datasets.Dataset.from_list(ROWS)
    assert [r.fields for r in read(dataset)] == ROWS
    assert [r.fields for r in read(dataset.to_iterable_dataset())] == ROWS
    both = datasets.DatasetDict({"train": dataset, "test": dataset.select([1])})
    assert [r.fields for r in read(both, "test")] == ROWS[1:2]
    error = fault(both, "validation")
    assert error.code == "RF2015"
    assert "train, test" in error.expected
    assert "data.split" in error.remedy


def test_saved_dataset_directory(tmp_path: Path) -> None:
    dataset = datasets.Dataset.from_list(ROWS)
    dataset.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": dataset}).save_to_disk(str(tmp_path / "many"))
    assert [r.fields for r in read(tmp_path / "one")] == ROWS
    assert [r.fields for r in read(tmp_path / "many")] == ROWS
    assert fault(tmp_path / "many", "test").code == "RF2015"
    assert fingerprint_source(tmp_path / "one") == fingerprint_source(ROWS)
    for file in (tmp_path / "one").glob("*.arrow"):
        file.write_bytes(b"garbage")
    assert fault(tmp_path / "one").code == "RF2012"


def test_missing_package_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = parquet(tmp_path / "data.parquet")
    real = importlib.import_module

    def without(name: str, package: str | None = None) -> Any:
        if name.split(".")[0] in ("pyarrow", "datasets"):
            raise ImportError(name)
        return real(name, package)

    monkeypatch.setattr(columnar.importlib, "import_module", without)
    for source in (str(path), "owner/name"):
        with pytest.raises(EnvironmentFault) as caught:
            read(source)
        assert caught.value.code == "RF7020"
        assert "rlhf-fast[data]" in caught.value.remedy
        assert caught.value.exit_code == EXIT_ENVIRONMENT


def test_json_lines_need_no_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"prompt": "a"}\n')
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        assert name.split(".")[0] not in ("pyarrow", "datasets", "pandas")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    assert read(path)[0].fields == {"prompt": "a"}


@pytest.mark.parametrize("flag", ["set", "probed"])
def test_hub_name_without_network_fails_within_seconds(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, flag: str
) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", flag == "set")
    monkeypatch.setattr(columnar, "hub_reachable", lambda: False)
    start = time.monotonic()
    error = fault("no-such-owner/no-such-dataset")
    assert time.monotonic() - start < 5
    assert error.code == "RF2014"
    assert error.where == "no-such-owner/no-such-dataset"
    assert "local path" in error.expected
    assert "cache" in error.expected
    assert (flag == "set") == datasets.config.HF_HUB_OFFLINE


def test_probe_is_bounded_when_nobody_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    def hang(*_: Any, **__: Any) -> None:
        time.sleep(30)
        raise OSError("nobody answers")

    monkeypatch.setattr(columnar, "PROBE_SECONDS", 0.2)
    monkeypatch.setattr(columnar.socket, "create_connection", hang)
    start = time.monotonic()
    assert columnar.hub_reachable() is False
    assert time.monotonic() - start < 2


def test_hub_fault_with_network_names_dataset_and_split(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str, config: str | None, split: str) -> Any:
        assert (name, config, split) == ("owner/name", "subset", "train")
        raise ValueError("Unknown split\nmore")

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(columnar, "hub_reachable", lambda: True)
    monkeypatch.setattr(datasets, "load_dataset", refuse)
    error = fault("owner/name:subset")
    assert error.code == "RF2015"
    assert "Unknown split" in error.what
    assert "owner/name:subset" in error.where


def test_hub_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(columnar, "hub_reachable", lambda: True)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_list(ROWS))
    rows = read("owner/name")
    assert [r.fields for r in rows] == ROWS
    assert rows[1].origin == "owner/name[1]"


def test_a_file_name_is_never_taken_for_a_hub_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(columnar, "read_hub", lambda *_: pytest.fail("asked the hub"))
    assert fault("train.jsonl").code == "RF2001"
    assert fault("data/train.parquet").code == "RF2001"
    assert fault("./owner/name").code == "RF2001"


def test_text_that_is_no_utf8(tmp_path: Path) -> None:
    arrow, parquet_files = (
        pytest.importorskip("pyarrow"),
        importlib.import_module("pyarrow.parquet"),
    )
    offsets = arrow.py_buffer((0).to_bytes(4, "little") + (6).to_bytes(4, "little"))
    text = arrow.Array.from_buffers(
        arrow.string(), 1, [None, offsets, arrow.py_buffer(b"hel\xfflo")]
    )
    table = arrow.table({"prompt": text})
    parquet_files.write_table(table, tmp_path / "x.parquet")
    with arrow.ipc.new_file(tmp_path / "x.arrow", table.schema) as writer:
        writer.write_table(table)
    for name in ("x.parquet", "x.arrow"):
        error = fault(tmp_path / name)
        assert error.code == "RF2012"
        assert name in error.where


def test_a_table_holds_rows_of_several_formats(bpe: Any) -> None:
    rows = [
        {"prompt": "hello", "completion": " there"},
        {"text": "the cat sat"},
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]},
    ]
    columns = {name: [row.get(name) for row in rows] for row in rows for name in row}
    mixed = load_sft(datasets.Dataset.from_dict(columns), bpe)
    apart = [load_sft([row], bpe)[0] for row in rows]
    assert [e.key for e in mixed.examples] == [e.key for e in apart]
