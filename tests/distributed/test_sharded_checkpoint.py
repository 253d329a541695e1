"""What k ranks have saved, m ranks load to the bit, for every k and m, one process included."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from rlhf_fast.distributed import load, make_newest, save
from rlhf_fast.distributed.manifest import seal
from rlhf_fast.distributed.world import World
from rlhf_fast.errors import CheckpointError
from tests.distributed.ranks import on_ranks
from tests.distributed.sharded_net import Training, build, local, training, whole

# ranks, replicas
LAYOUTS = {"one": (1, 1), "two": (2, 1), "four": (4, 1), "replicas": (4, 2)}


def begin(layout: str, seed: int, world: World | None) -> Training:
    """With an embedding on a mesh of each replica's own, and an optimizer of shards, in some."""
    net = build(seed + (layout == "replicas"), world)
    return training(net, steps_shards=layout == "four")


def saved(world: World | None, folder: Path, name: str) -> None:
    """Train two steps and save, with the whole state beside the checkpoint for comparison."""
    run = begin(name, 4, world)
    for seed in (1, 2):
        run.step(seed)
    torch.manual_seed(5 if world is None else 50 * world.rank + 5)  # rank 0's counts
    torch.rand(3)
    tensors, state = run.groups()
    options: dict[str, Any] = {} if world is None else {"world": world}
    path = save(folder / name, 7, tensors=tensors, state=state, keep_last=1, **options)
    assert path == folder / name / "step-00000007"
    full = whole(tensors)
    if world is None or world.is_main:
        save_file(full, folder / f"{name}.safetensors")


def loaded(world: World | None, folder: Path, into: str) -> None:
    """Load every checkpoint into a module that begins elsewhere, compare, and go on."""
    drawn = []
    for name in LAYOUTS:
        run = begin(into, 10, world)
        run.step(0)
        places = [local(p).data_ptr() for p in run.net.parameters()]
        checkpoint = load(folder / name, **({} if world is None else {"world": world}))
        run.restore(checkpoint)
        tensors, state = run.groups()
        assert state == checkpoint.state
        assert state["aliases"] == {"head.weight": "embed.weight"}
        assert [local(p).data_ptr() for p in run.net.parameters()] == places, "storage was replaced"
        expected, found = load_file(folder / f"{name}.safetensors"), whole(tensors)
        assert expected.keys() == found.keys()
        for key, tensor in expected.items():
            assert tensor.dtype == found[key].dtype, key
            assert torch.equal(tensor, found[key]), f"{name} -> {into}: {key}"
        run.step(3)  # what came back can be trained
        drawn.append(torch.rand(3))
    torch.manual_seed(5)
    values = torch.rand(6)[3:]
    assert all(torch.equal(draw, values) for draw in drawn)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of every layout."""
    folder = tmp_path_factory.mktemp("sharded")
    saved(None, folder, "one")
    for name, (size, replicas) in LAYOUTS.items():
        if size > 1:
            on_ranks(size, saved, folder, name, replicas=replicas)
    return folder


@pytest.mark.parametrize("into", LAYOUTS)
def test_every_layout_loads_every_other(folder: Path, into: str) -> None:
    size, replicas = LAYOUTS[into]
    if size == 1:
        loaded(None, folder, into)
    else:
        on_ranks(size, loaded, folder, into, replicas=replicas)


@pytest.mark.parametrize("name", ["two", "four", "replicas"])
def test_every_byte_is_written_once(folder: Path, name: str) -> None:
    body = json.loads((folder / name / "step-00000007" / "manifest.json").read_bytes())
    assert body["format_version"] == 2
    held: dict[str, int] = {}
    for file, record in body["files"].items():
        for key, tensor in record.get("tensors", {}).items():
            count = int(torch.Size(tensor["shape"]).numel())
            assert count or key == "empty" or key.startswith("empty/"), f"{file}: empty {key}"
            full = f"{record['group']}/{key}"
            held[full] = held.get(full, 0) + count
    expected = load_file(folder / f"{name}.safetensors")
    assert held == {key: tensor.numel() for key, tensor in expected.items()}
    ranks = {file.split(".")[1] for file in body["files"] if file != "state.json"}
    assert len(ranks) == LAYOUTS[name][0], "every rank has written some of it"


def test_shards_of_an_older_state_are_made_the_newest(folder: Path, tmp_path: Path) -> None:
    for step in (7, 8):
        shutil.copytree(folder / "two" / "step-00000007", tmp_path / f"step-{step:08d}")
    manifest = tmp_path / "step-00000008" / "manifest.json"
    body = json.loads(manifest.read_bytes()) | {"step": 8, "commit": 5}
    manifest.write_bytes(seal(body))
    assert load(tmp_path).step == 8
    make_newest(tmp_path / "step-00000007")
    opened = load(tmp_path)
    assert opened.step == 7
    for group, tensors in load(folder / "two").tensors.items():
        for name, tensor in tensors.items():
            assert torch.equal(opened.tensors[group][name], tensor)


def test_one_process_writes_what_it_always_wrote(folder: Path) -> None:
    path = folder / "one" / "step-00000007"
    names = {f"{group}.safetensors" for group in ("actor", "moments", "rng")}
    names |= {"state.json", "manifest.json"}
    assert {entry.name for entry in path.iterdir()} == names
    body = json.loads((path / "manifest.json").read_bytes())
    assert body["format_version"] == 1
    assert set(body["files"]["actor.safetensors"]) == {"size", "sha256", "tensors"}
    assert body["files"]["actor.safetensors"]["tensors"]["norm.weight"] == {
        "dtype": "F32",
        "shape": [6],
    }


def _other_shape(world: World) -> None:
    run = training(build(4, world), steps_shards=True)
    run.step(1)
    for slots in run.optimizer.state.values():
        slots["rows"] = torch.ones(3)
    with pytest.raises(CheckpointError, match=r"RF8004.*rows.*not sharded as its parameter"):
        run.groups()


def test_state_in_the_layout_of_one_rank_is_refused() -> None:
    on_ranks(2, _other_shape)
