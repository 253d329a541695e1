"""Checkpoints: what is saved comes back, in the right order, and pruning never goes too far."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from rlhf_fast.distributed import load, make_newest, save, staged_directory, steps
from rlhf_fast.distributed.checkpoint_directory import LATEST_NAME, unfinished
from rlhf_fast.distributed.tensor_file import DTYPE_NAMES
from rlhf_fast.errors import CheckpointError


def write(root: Path, step: int, value: float | None = None, keep_last: int | None = None) -> Path:
    value = float(step) if value is None else value
    tensors = {"actor": {"w": torch.full((3, 2), value)}, "optim": {"m": torch.full((5,), value)}}
    return save(root, step, tensors=tensors, state={"value": value}, keep_last=keep_last)


def value_of(root: Path, step: int | None = None) -> float:
    found = load(root, step)
    values = {found.state["value"], *found.tensors["actor"]["w"].flatten().tolist()}
    values |= set(found.tensors["optim"]["m"].tolist())
    assert len(values) == 1, "files of different saves are mixed"
    return values.pop()


def test_layout_on_disk(tmp_path: Path) -> None:
    path = write(tmp_path / "a b" / "prüfung", 10)
    assert path.name == "step-00000010"
    assert (path.parent / LATEST_NAME).read_text() == "step-00000010\n"
    files = {"actor.safetensors", "optim.safetensors", "state.json", "manifest.json"}
    assert {entry.name for entry in path.iterdir()} == files
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["format_version"] == 1
    assert manifest["step"] == 10
    assert manifest["files"]["actor.safetensors"]["tensors"]["w"] == {
        "dtype": "F32",
        "shape": [3, 2],
    }
    assert {"torch", "python", "safetensors"} <= set(manifest["versions"])


@pytest.mark.parametrize("dtype", list(DTYPE_NAMES), ids=str)
def test_every_dtype_comes_back_to_the_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    raw = torch.randint(0, 2 if dtype == torch.bool else 256, (7, 8), generator=generator)
    base = raw.to(torch.uint8)
    values = base.bool() if dtype == torch.bool else base.view(dtype)
    named = {
        "all": values,
        "scalar": values[0, 0],
        "empty": values[:0],
        "strided": values.t()[::2],
        "überschrift/with spaces": values[1],
    }
    path = save(tmp_path, 0, tensors={"x": named}, state=None, keep_last=1)
    loaded = load(tmp_path).tensors["x"]
    others = load_file(path / "x.safetensors")  # the format, read by its own library
    assert set(loaded) == set(named) == set(others)
    for name, tensor in named.items():
        assert loaded[name].dtype == dtype
        assert loaded[name].shape == tensor.shape
        expected = tensor.contiguous().reshape(-1).view(torch.uint8)
        assert torch.equal(loaded[name].reshape(-1).view(torch.uint8), expected)
        assert torch.equal(others[name].reshape(-1).view(torch.uint8), expected)


@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    shapes=st.lists(st.lists(st.integers(0, 4), max_size=3), max_size=5),
    dtypes=st.lists(st.sampled_from(list(DTYPE_NAMES)), min_size=5, max_size=5),
)
def test_any_mixture_of_shapes_and_dtypes(
    tmp_path: Path, shapes: list[list[int]], dtypes: list[torch.dtype]
) -> None:
    named = {
        f"t{i}": (torch.rand(shape) * 2).to(dtype)
        for i, (shape, dtype) in enumerate(zip(shapes, dtypes, strict=False))
    }
    save(tmp_path, 1, tensors={"x": named}, state={}, keep_last=1)
    loaded = load(tmp_path).tensors["x"]
    assert set(loaded) == set(named)
    for name, tensor in named.items():
        assert torch.equal(loaded[name].float(), tensor.float())
        assert loaded[name].dtype == tensor.dtype


def test_state_keeps_types_and_exact_floats(tmp_path: Path) -> None:
    state = {
        "floats": [0.1, 1 / 3, 5e-324, -0.0, 1.7976931348623157e308],
        "special": [float("inf"), float("-inf")],
        "tuple": (0.9, 0.999),
        "nested": {"none": None, "flag": True, "big": 2**200, "text": "ä\ud800\n"},
        "int keys": {1: "a", (2, 3): "b"},
        "tagged": {"$": "tuple", "value": [1]},
        "numpy": np.float64(0.1),
    }
    save(tmp_path, 0, tensors={}, state=state, keep_last=1)
    assert repr(load(tmp_path).state) == repr({**state, "numpy": 0.1})


def test_newest_and_explicit_steps(tmp_path: Path) -> None:
    for step in (1, 2, 30):
        write(tmp_path, step)
    assert steps(tmp_path) == [1, 2, 30]
    assert value_of(tmp_path) == 30
    assert load(tmp_path, "latest").step == 30
    assert value_of(tmp_path, 2) == 2
    with pytest.raises(CheckpointError, match=r"RF8003.*step 4") as caught:
        load(tmp_path, 4)
    assert "1, 2, 30" in str(caught.value)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="RF8003"):
        load(tmp_path / "absent")
    assert steps(tmp_path / "absent") == []


def test_keep_last_and_saving_a_step_again(tmp_path: Path) -> None:
    for step in range(1, 6):
        write(tmp_path, step, keep_last=2)
    assert steps(tmp_path) == [4, 5]
    write(tmp_path, 5, value=5.5, keep_last=2)
    assert steps(tmp_path) == [4, 5]
    assert value_of(tmp_path) == 5.5
    write(tmp_path, 5, value=5.75, keep_last=1)
    assert value_of(tmp_path) == 5.75
    assert {path.name for path in tmp_path.iterdir()} == {"step-00000005", LATEST_NAME}


def test_after_going_back_the_new_branch_is_the_newest(tmp_path: Path) -> None:
    for step in (10, 20):
        write(tmp_path, step)
    assert load(tmp_path, 10).step == 10
    write(tmp_path, 15, keep_last=2)
    assert load(tmp_path).step == 15
    assert steps(tmp_path) == [15, 20]


def test_an_older_state_is_made_the_newest_and_kept_as_that(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        write(tmp_path, step)
    manifest = tmp_path / "step-00000003" / "manifest.json"
    before = manifest.read_bytes()
    make_newest(manifest.parent)
    assert manifest.read_bytes() == before, "it was that already"
    first = json.loads((tmp_path / "step-00000001" / "manifest.json").read_text())
    make_newest(tmp_path / "step-00000001")
    again = json.loads((tmp_path / "step-00000001" / "manifest.json").read_text())
    assert {key for key in first if first[key] != again[key]} == {"commit", "digest"}
    assert (value_of(tmp_path), value_of(tmp_path, 3)) == (1.0, 3.0)
    assert (tmp_path / LATEST_NAME).read_text() == "step-00000001\n"
    write(tmp_path, 2, 2.5, keep_last=2)
    assert steps(tmp_path) == [1, 2], "the other branch goes first"
    assert value_of(tmp_path) == 2.5


def test_pruning_leaves_what_it_does_not_understand(tmp_path: Path) -> None:
    write(tmp_path, 1)
    broken = write(tmp_path, 2)
    (broken / "actor.safetensors").unlink()
    write(tmp_path, 3, keep_last=1)
    assert steps(tmp_path) == [2, 3]
    assert value_of(tmp_path) == 3


def test_pruning_survives_a_failed_deletion(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, 1)

    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", refuse)
        write(tmp_path, 2, keep_last=1)
    assert "could not remove" in caplog.text
    assert value_of(tmp_path) == 2
    assert len(unfinished(tmp_path)) == 1
    write(tmp_path, 3, keep_last=1)
    assert unfinished(tmp_path) == []


def test_a_reader_survives_the_pruning_of_its_checkpoint(tmp_path: Path) -> None:
    write(tmp_path, 1)
    old = load(tmp_path)
    write(tmp_path, 2, keep_last=1)
    assert not old.path.exists()
    assert old.tensors["actor"]["w"].tolist() == [[1.0, 1.0]] * 3


def test_unfinished_saves_are_listed_then_cleaned(tmp_path: Path) -> None:
    write(tmp_path, 1)
    leftover = tmp_path / "step-00000002.tmp-1-abcd"
    leftover.mkdir()
    (leftover / "actor.safetensors").write_bytes(b"half")
    found = load(tmp_path)
    assert found.step == 1
    assert any(str(leftover) in notice for notice in found.notices)
    write(tmp_path, 2)
    assert not leftover.exists()
    assert load(tmp_path).notices == ()


@pytest.mark.parametrize("content", [b"", b"step-00000099\n", b"\xff\xfe\x00", b"../../etc"])
def test_garbage_in_latest_is_a_notice(tmp_path: Path, content: bytes) -> None:
    write(tmp_path, 1)
    write(tmp_path, 2)
    (tmp_path / LATEST_NAME).write_bytes(content)
    found = load(tmp_path)
    assert found.step == 2
    assert any(LATEST_NAME in notice for notice in found.notices)
    (tmp_path / LATEST_NAME).unlink()
    assert load(tmp_path).notices == ()


@pytest.mark.parametrize(
    ("tensors", "state", "place"),
    [
        ({"x": {"w": [1.0]}}, {}, "'w'"),
        ({"x": {"w": torch.zeros(2, device="meta")}}, {}, "meta"),
        ({"x": {"w": torch.zeros(2, dtype=torch.complex64)}}, {}, "complex64"),
        ({"x": {"w": torch.zeros(2).to_sparse()}}, {}, "sparse"),
        ({"x": {"__metadata__": torch.zeros(2)}}, {}, "reserved"),
        ({}, {"a": [{"b": torch.zeros(1)}]}, r"state\.a\[0\]\.b"),
        ({}, {"a": {"b": {1, 2}}}, r"state\.a\.b"),
    ],
)
def test_what_cannot_be_stored_is_named_and_nothing_is_left(
    tmp_path: Path, tensors: dict, state: dict, place: str
) -> None:
    write(tmp_path, 1)
    with pytest.raises(CheckpointError, match=place) as caught:
        save(tmp_path, 2, tensors=tensors, state=state, keep_last=1)
    assert caught.value.code == "RF8004"
    assert {path.name for path in tmp_path.iterdir()} == {"step-00000001", LATEST_NAME}


@pytest.mark.parametrize("name", ["../x", "a/b", "", ".x", "x.safetensors", "a..b"])
def test_file_stems_are_checked(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="stems"):
        save(tmp_path, 1, tensors={name: {}}, state={}, keep_last=1)
    assert list(tmp_path.iterdir()) == []


def test_bad_arguments(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="keep_last"):
        save(tmp_path, 1, tensors={}, state={}, keep_last=0)
    with pytest.raises(ValueError, match="step"):
        save(tmp_path, -1, tensors={}, state={}, keep_last=1)


def test_exports_appear_whole_or_not_at_all(tmp_path: Path) -> None:
    final = tmp_path / "deep" / "model"
    with staged_directory(final) as directory:
        (directory / "weights").write_text("one")
        assert not final.exists()

    def interrupted_export() -> None:
        with staged_directory(final) as directory:
            (directory / "weights").write_text("two")
            raise KeyError("interrupted")

    with pytest.raises(KeyError):
        interrupted_export()
    assert (final / "weights").read_text() == "one"
    with staged_directory(final) as directory:
        (directory / "weights").write_text("three")
    assert (final / "weights").read_text() == "three"
    assert [path.name for path in final.parent.iterdir()] == ["model"]
