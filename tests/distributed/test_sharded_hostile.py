"""Damaged and malicious checkpoints of several ranks: refused by name, and nothing is executed."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_fast.distributed import load, save
from rlhf_fast.distributed.chunks import ChunkRecord, tiling_problem
from rlhf_fast.distributed.manifest import seal
from rlhf_fast.distributed.world import World
from rlhf_fast.errors import CheckpointError
from tests.distributed.ranks import on_ranks
from tests.distributed.test_sharded_faults import state_of

FIRST, SECOND = "actor.rank-00000.safetensors", "actor.rank-00001.safetensors"


def _write(world: World, root: Path) -> None:
    for step in (1, 2):
        tensors = state_of(world, float(step))
        save(root, step, tensors=tensors, state={"step": step}, keep_last=2, world=world)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two checkpoints of two ranks: `actor/w` [5, 3] as [3, 3] and [2, 3], `rng/plain` [2]."""
    root = tmp_path_factory.mktemp("hostile") / "run"
    on_ranks(2, _write, root)
    return root


@pytest.fixture
def root(template: Path, tmp_path: Path) -> Path:
    for directory in template.glob("step-*"):
        (tmp_path / "run" / directory.name).mkdir(parents=True)
        for file in directory.iterdir():
            (tmp_path / "run" / directory.name / file.name).write_bytes(file.read_bytes())
    return tmp_path / "run"


def newest(root: Path) -> Path:
    return root / "step-00000002"


def refused(root: Path, name: str, *words: str, code: str = "RF8001") -> None:
    """The step is refused with the file named; `latest` falls back with a notice."""
    with pytest.raises(CheckpointError) as caught:
        load(root, 2)
    assert caught.value.code == code
    assert name in caught.value.where
    assert all(word in caught.value.what for word in words)
    found = load(root)
    assert found.step == 1
    assert any("passed over" in notice and name in notice for notice in found.notices)


def edit(root: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the manifest and seal it again, as an attacker would."""
    path = newest(root) / "manifest.json"
    body = json.loads(path.read_bytes())
    change(body)
    path.write_bytes(seal(body))


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp", "model.bin", "x.PT", "a.pkl"])
@pytest.mark.parametrize("how", ["present", "instead", "named"])
def test_pickles_are_refused_and_never_opened(
    root: Path, tmp_path: Path, name: str, how: str
) -> None:
    fired = tmp_path / "fired"
    data = pickle.dumps(Payload(fired))
    (newest(root) / name).write_bytes(data)
    if how == "instead":  # a directory as DCP itself writes it
        for file in newest(root).iterdir():
            if file.name != name:
                file.unlink()
    elif how == "named" and name[0] != ".":
        record = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        edit(root, lambda body: body["files"].__setitem__(name, record))
        (newest(root) / name).rename(newest(root) / "elsewhere")
    refused(root, name, "pickled", code="RF8009")
    assert not fired.exists()


@pytest.mark.parametrize("name", [SECOND, "rng.rank-00000.safetensors", "manifest.json"])
@pytest.mark.parametrize("how", ["flipped", "truncated", "missing", "link"])
def test_damaged_files(root: Path, tmp_path: Path, name: str, how: str) -> None:
    path = newest(root) / name
    good = path.read_bytes()
    path.unlink()
    if how == "flipped":
        path.write_bytes(good[:-2] + bytes([good[-2] ^ 1]) + good[-1:])
    elif how == "truncated":
        path.write_bytes(good[:-3])
    elif how == "link":
        (tmp_path / "outside").write_bytes(good)
        path.symlink_to(tmp_path / "outside")
    refused(root, name)


def test_shards_that_are_swapped(root: Path) -> None:
    first, second = newest(root) / FIRST, newest(root) / SECOND
    data = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(data)
    refused(root, ".safetensors")


HUGE = 2**60


def place(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda body: body["files"][SECOND]["tensors"]["w"].update(changes)


def whole_everywhere(body: dict[str, Any]) -> None:
    for file in (FIRST, SECOND):
        body["files"][file]["tensors"]["w"]["whole"] = [HUGE, 3]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (place(offsets=[2, 0]), "overlap"),
        (place(offsets=[0, 0]), "overlap"),
        (place(offsets=[4, 0]), "do not cover"),
        (place(offsets=[HUGE, 0]), "do not cover"),
        (place(whole=[6, 3]), "of different tensors"),
        (whole_everywhere, "do not cover"),
        (place(offsets=[3]), "another number of dims"),
        (place(offsets=[-1, 0]), "malformed"),
        (place(offsets=[3.0, 0]), "malformed"),
        (place(offsets=None), "malformed"),
        (place(shape=[HUGE, 3]), "would need"),
        (place(dtype="I32"), "of different tensors"),
        (lambda body: body["files"].pop(SECOND), "do not cover"),
        (lambda body: body["files"][SECOND].pop("group"), "no group"),
        (lambda body: body["files"][SECOND].update(group="../actor"), "no group"),
        (lambda body: body["files"][SECOND].update(group="critic"), "do not cover"),
        (
            lambda body: body["files"].__setitem__("../x.safetensors", body["files"][SECOND]),
            "outside its directory",
        ),
        (
            lambda body: body["files"].__setitem__("/x.safetensors", body["files"][SECOND]),
            "outside its directory",
        ),
        (
            lambda body: body["files"].__setitem__("twin.safetensors", body["files"][SECOND]),
            "overlap",
        ),
    ],
)
def test_chunks_that_do_not_make_up_the_tensor(root: Path, change: Any, words: str) -> None:
    edit(root, change)
    refused(root, "manifest.json", words)


def test_a_shape_that_the_file_does_not_have(root: Path) -> None:
    def change(body: dict[str, Any]) -> None:
        for file in (FIRST, SECOND):
            record = body["files"][file]["tensors"]["w"]
            record.update(
                shape=record["shape"][::-1], whole=[3, 5], offsets=record["offsets"][::-1]
            )

    edit(root, change)
    refused(root, ".safetensors", "holds other tensors")


def test_keys_that_occur_twice(root: Path) -> None:
    path = newest(root) / "manifest.json"
    data = path.read_bytes()
    start = data.index(b'"offsets"')
    path.write_bytes(data[:start] + b'"offsets":[9,9],' + data[start:])
    refused(root, "manifest.json", "its own checksum")


@pytest.mark.parametrize(
    ("shape", "boxes", "problem"),
    [
        ((), [((), ())], ""),
        ((), [], "do not cover it"),
        ((0, 4), [((0, 0), (0, 4))], ""),
        ((0, 4), [((0, 0), (0, 2)), ((0, 2), (0, 2))], "do not cover it"),
        ((4, 2), [((0, 0), (2, 2)), ((2, 0), (2, 2))], ""),
        ((2, 2), [((r, c), (1, 1)) for r in (0, 1) for c in (0, 1)], ""),
        ((2, 2), [((0, 0), (1, 1)), ((0, 1), (1, 1)), ((1, 0), (1, 1))], "do not cover it"),
        ((2, 2), [((0, 0), (1, 1)), ((1, 1), (1, 1))], "do not cover it"),
        ((4,), [((0,), (2,)), ((2,), (3,))], "reach beyond it"),
        ((4,), [((0,), (3,)), ((2,), (2,))], "overlap"),
        ((4,), [((0,), (4,)), ((4,), (0,))], "do not cover it"),
    ],
)
def test_tiling(shape: Any, boxes: Any, problem: str) -> None:
    chunks = tuple(ChunkRecord("f", offsets, lengths) for offsets, lengths in boxes)
    assert tiling_problem(shape, chunks) == problem


def test_many_overlapping_chunks_are_refused_without_comparing_every_pair() -> None:
    chunks = tuple(ChunkRecord("f", (i,), (2,)) for i in range(30_000))
    assert tiling_problem((30_001,), chunks) == "overlap"


def test_what_is_intact_loads(root: Path) -> None:
    found = load(root, 2)
    assert torch.equal(found.tensors["actor"]["w"], torch.full((5, 3), 2.0))
    assert found.tensors["actor"].describe() == {"w": ("F32", (5, 3))}
