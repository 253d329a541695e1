"""Damaged and malicious checkpoints: the file is named, and nothing outside the directory is
touched."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import rlhf_fast.distributed
import rlhf_fast.metrics
import rlhf_fast.stages.run
from rlhf_fast.distributed import load, manifest, save
from rlhf_fast.distributed.manifest import seal
from rlhf_fast.errors import CheckpointError

FILES = ("actor.safetensors", "state.json", "manifest.json")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for step in (1, 2):
        tensors = {"actor": {"w": torch.full((20,), float(step))}}
        save(tmp_path / "run", step, tensors=tensors, state={"step": step}, keep_last=2)
    return tmp_path / "run"


def newest(root: Path) -> Path:
    return root / "step-00000002"


def refused(root: Path, name: str, code: str = "RF8001") -> CheckpointError:
    """The explicit step is refused with the file named, `latest` falls back with a notice."""
    with pytest.raises(CheckpointError) as caught:
        load(root, 2)
    assert caught.value.code == code
    assert name in caught.value.where
    found = load(root)
    assert found.step == found.state["step"] == 1
    assert any("passed over" in notice and name in notice for notice in found.notices)
    return caught.value


def edit(root: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the manifest and seal it again, as an attacker would."""
    path = newest(root) / "manifest.json"
    body = json.loads(path.read_bytes())
    change(body)
    path.write_bytes(seal(body))


@pytest.mark.parametrize("name", FILES)
def test_any_flipped_bit_is_found(root: Path, name: str) -> None:
    path = newest(root) / name
    good = path.read_bytes()
    rng = random.Random(name)
    for place in {0, len(good) - 1, *(rng.randrange(len(good)) for _ in range(60))}:
        bad = bytearray(good)
        bad[place] ^= 1 << rng.randrange(8)
        path.write_bytes(bytes(bad))
        with pytest.raises(CheckpointError) as caught:
            load(root, 2)
        assert caught.value.code in ("RF8001", "RF8002")
        assert name in caught.value.where
    refused(root, name)


def test_a_byte_that_makes_a_number_infinite_costs_one_checkpoint(tmp_path: Path) -> None:
    tensors = {"actor": {"w": torch.zeros(32_000)}}
    for step in (1, 2):
        save(tmp_path, step, tensors=tensors, state={"step": step}, keep_last=None)
    path = newest(tmp_path) / "manifest.json"
    good = path.read_bytes()
    place = good.index(b'"size":128') + len(b'"size":1')
    path.write_bytes(good[:place] + b"e" + good[place + 1 :])  # "size":1e8104
    refused(tmp_path, "manifest.json")
    save(tmp_path, 3, tensors=tensors, state={"step": 3}, keep_last=2)
    assert load(tmp_path).step == 3
    assert load(tmp_path, 1).step == 1


@pytest.mark.parametrize("depth", [200, 900])
def test_a_manifest_that_can_be_read_but_not_written(
    root: Path, monkeypatch: pytest.MonkeyPatch, depth: int
) -> None:
    data = b'{"digest":"x","a":' + b"[" * depth + b"]" * depth + b"}"
    (newest(root) / "manifest.json").write_bytes(data)
    refused(root, "manifest.json")
    plain = manifest.seal

    def seal_in_less_stack(body: Any) -> bytes:
        if "a" in body:
            raise RecursionError("maximum recursion depth exceeded")
        return plain(body)

    monkeypatch.setattr(manifest, "seal", seal_in_less_stack)
    refused(root, "manifest.json")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("how", ["truncated", "empty", "longer", "missing", "directory"])
def test_damaged_files(root: Path, name: str, how: str) -> None:
    path = newest(root) / name
    good = path.read_bytes()
    path.unlink()
    if how == "directory":
        path.mkdir()
    elif how != "missing":
        path.write_bytes({"truncated": good[:-3], "empty": b"", "longer": good + b" "}[how])
    refused(root, name)


def test_an_empty_directory(root: Path) -> None:
    shutil.rmtree(newest(root))
    newest(root).mkdir()
    refused(root, "manifest.json")


def test_all_damaged_is_an_error_not_a_fresh_start(root: Path) -> None:
    for directory in root.glob("step-*"):
        (directory / "state.json").write_text("{}")
    with pytest.raises(CheckpointError, match="none of the 2 checkpoints") as caught:
        load(root)
    assert "step-00000001" in str(caught.value)
    assert "step-00000002" in str(caught.value)


@pytest.mark.parametrize("kind", ["symlink out", "symlink in", "fifo", "device"])
def test_special_files_are_refused_without_hanging(root: Path, tmp_path: Path, kind: str) -> None:
    path = newest(root) / "actor.safetensors"
    outside = tmp_path / "outside.safetensors"
    shutil.copy(path, outside)
    path.unlink()
    if kind == "symlink out":
        path.symlink_to(outside)  # same bytes, same checksum: still refused
    elif kind == "symlink in":
        path.symlink_to(root / "step-00000001" / "actor.safetensors")
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")
    refused(root, "actor.safetensors")


def test_a_linked_checkpoint_directory_is_refused(root: Path, tmp_path: Path) -> None:
    newest(root).rename(tmp_path / "elsewhere")
    newest(root).symlink_to(tmp_path / "elsewhere")
    refused(root, "step-00000002")


@pytest.mark.parametrize(
    "name",
    [
        *("../step-00000001/state.json", "/etc/passwd", "a/b", "..", ".", "", "a\\b", "x\x00y"),
        *("c..d", "manifest.json", "-" * 300),
    ],
)
def test_names_that_leave_the_directory(root: Path, name: str) -> None:
    def change(body: dict[str, Any]) -> None:
        body["files"][name] = body["files"]["state.json"]

    edit(root, change)
    assert "outside its directory" in refused(root, "manifest.json").what


HUGE = 2**62


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [2**32, 2**32]},
        {"dtype": "F64", "shape": [HUGE] * 64},
        {"dtype": "F32", "shape": [1] * 10_000},
        {"dtype": "F32", "shape": [-1, -80]},
        {"dtype": "F32", "shape": [20.0]},
        {"dtype": "F32", "shape": [True]},
        {"dtype": "F32", "shape": [21]},
        {"dtype": "F32", "shape": [4, 5]},
        {"dtype": "I32", "shape": [20]},
        {"dtype": "object", "shape": [20]},
        {"dtype": ["F32"], "shape": [20]},
        {"dtype": "F32"},
        [],
        None,
    ],
    ids=str,
)
def test_tensors_that_are_not_there(root: Path, entry: Any) -> None:
    def change(body: dict[str, Any]) -> None:
        body["files"]["actor.safetensors"]["tensors"]["w"] = entry

    edit(root, change)
    refused(root, "step-00000002")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("step", 3),
        ("step", -1),
        ("step", "2"),
        ("step", 10**30),
        ("commit", None),
        ("commit", True),
        ("files", []),
        ("files", {}),
        ("versions", 7),
        ("format_version", None),
        ("format_version", "1"),
    ],
)
def test_malformed_manifests(root: Path, key: str, value: Any) -> None:
    edit(root, lambda body: body.__setitem__(key, value))
    refused(root, "manifest.json")


@pytest.mark.parametrize(("key", "value"), [("size", 10**18), ("size", -1), ("sha256", "00")])
def test_malformed_file_records(root: Path, key: str, value: Any) -> None:
    edit(root, lambda body: body["files"]["actor.safetensors"].__setitem__(key, value))
    refused(root, "step-00000002")


@pytest.mark.parametrize(
    "data",
    [
        b"[" * 100_000,
        b'{"a": NaN}',
        b'{"digest":"x","a":1e999}',
        b"\xff\xfe",
        b"[]",
        b"1",
        b"{",
        b'{"step": 1' + b"0" * 9999,
    ],
    ids=["deep", "nan", "inf", "encoding", "list", "number", "cut", "digits"],
)
def test_manifests_that_are_not_ours(root: Path, data: bytes) -> None:
    (newest(root) / "manifest.json").write_bytes(data)
    refused(root, "manifest.json")


@pytest.mark.parametrize(
    "head",
    [2**63 - 1, 2**40, 10**6],
)
def test_a_huge_safetensors_header(root: Path, head: int) -> None:
    path = newest(root) / "actor.safetensors"
    data = head.to_bytes(8, "little") + path.read_bytes()[8:]
    path.write_bytes(data)

    def change(body: dict[str, Any]) -> None:
        body["files"]["actor.safetensors"]["sha256"] = hashlib.sha256(data).hexdigest()

    edit(root, change)
    refused(root, "actor.safetensors")


@pytest.mark.parametrize(
    "data", [b'{"$":"exec","value":"1"}', b'{"$":"dict","value":[1]}', b'{"$":"dict"}', b"{,}"]
)
def test_a_state_that_was_never_saved(root: Path, data: bytes) -> None:
    (newest(root) / "state.json").write_bytes(data)

    def change(body: dict[str, Any]) -> None:
        record = body["files"]["state.json"]
        record.update(size=len(data), sha256=hashlib.sha256(data).hexdigest())

    edit(root, change)
    refused(root, "state.json")


@pytest.mark.parametrize("version", [0, 3, 99])
def test_other_format_versions_are_refused_with_both_versions(root: Path, version: int) -> None:
    edit(root, lambda body: body.__setitem__("format_version", version))
    for step in (2, None):  # falling back would throw away what the other release has trained
        with pytest.raises(CheckpointError, match=f"version {version}.* reads 1 and 2") as caught:
            load(root, step)
        assert caught.value.code == "RF8002"


def test_no_module_can_unpickle_or_evaluate() -> None:
    banned = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}
    calls = {"eval", "exec", "compile", "__import__"}
    here = Path(rlhf_fast.distributed.__file__).parent
    stages = Path(rlhf_fast.stages.run.__file__).parent
    sources = [*here.glob("*.py"), Path(rlhf_fast.metrics.__file__)]
    sources += [stages / f"{name}.py" for name in ("run", "run_config", "run_lock", "saves")]
    assert len(sources) > 8
    for source in sources:
        for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                assert not banned & {alias.name.split(".")[0] for alias in node.names}, source
            elif isinstance(node, ast.ImportFrom):
                assert (node.module or "").split(".")[0] not in banned, source
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in calls, source
            elif isinstance(node, ast.Attribute):
                assert ast.unparse(node) not in ("torch.load", "torch.save"), source
