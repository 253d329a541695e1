"""A sharded model exports the directory that one process exports, byte for byte."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from transformers import AutoModelForCausalLM

from rlhf_fast.distributed.durable import LOCAL
from rlhf_fast.distributed.world import World
from rlhf_fast.errors import EnvironmentFault
from rlhf_fast.models.adapters import AdapterModule, SharedTrunk, weights_digest
from rlhf_fast.models.export import export_gathered, export_model
from rlhf_fast.models.heads import set_calibration
from rlhf_fast.models.sharded_export import GatheredWeights, own_weights
from rlhf_fast.stages.adapted import export_adapted
from tests.distributed.ranks import on_ranks
from tests.models.test_adapters import shared, stir
from tests.models.tiny import build, tokenizer

SMALL = "6KB"  # several files
CASES = {"llama": False, "qwen3": True}


def model(family: str) -> Any:
    return build(family, tie_word_embeddings=CASES[family])


def shard(module: Any, world: World) -> Any:
    """Blocks by FSDP2, some weights along dim 1; embedding and head by hand, with uneven rows."""
    embed, head = module.get_input_embeddings(), module.get_output_embeddings()
    tied = head.weight is embed.weight
    placements = [Replicate(), Shard(0)]
    embed.weight = nn.Parameter(distribute_tensor(embed.weight.detach(), world.mesh, placements))
    head.weight = (
        embed.weight
        if tied
        else nn.Parameter(distribute_tensor(head.weight.detach(), world.mesh, placements))
    )
    for block in module.model.layers:
        narrow = block.mlp.down_proj.weight
        fully_shard(
            block,
            mesh=world.shard_mesh,
            shard_placement_fn=lambda p, narrow=narrow: Shard(1) if p is narrow else Shard(0),
        )
    fully_shard(module.model, mesh=world.shard_mesh, ignored_params={embed.weight})
    return module


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def _export(world: World, folder: Path, digests: dict[str, str]) -> None:
    for family in CASES:
        module = shard(model(family), world)
        assert isinstance(next(module.parameters()), DTensor)
        assert weights_digest(module) == digests[family]
        export_model(module, tokenizer(), folder / f"{family}-{world.size}", world=world)
        small = GatheredWeights(module, own_weights(module), max_file=SMALL)
        export_gathered(module, small, tokenizer(), folder / f"{family}-{world.size}-small", world)


def adapted(family: str) -> SharedTrunk:
    """A trunk with two roles, one with a calibrated head."""
    return stir(shared(module=model(family), targets=("q_proj", "down_proj")), "actor", "critic")


def judge(trunk: SharedTrunk) -> AdapterModule:
    module = trunk.role_module("critic", head=True)
    torch.nn.init.ones_(module.score.weight)
    set_calibration(module, 2.0, 0.5)
    return module


def _export_adapted(world: World, folder: Path) -> None:
    trunk = adapted("llama")
    head = judge(trunk)
    shard(trunk.model, world)
    export_adapted(head, tokenizer(), folder / "k" / "judge", merge=True, world=world)
    fresh = adapted("llama")
    shard(fresh.model, world)
    actor = fresh.role_module("actor")
    assert any(isinstance(p, DTensor) for p in actor.parameters())
    export_adapted(actor, tokenizer(), folder / "k2" / "actor", merge=True, world=world)


def _full_disk(world: World, folder: Path) -> None:
    module, target = shard(model("llama"), world), folder / "model"
    export_model(module, tokenizer(), target, world=world)
    before = files(target)

    def refuse(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    sync = LOCAL.sync
    try:
        if world.is_main:
            LOCAL.sync = refuse  # type: ignore[method-assign]
        with pytest.raises(EnvironmentFault, match="RF7201"):
            export_model(module, tokenizer(), target, world=world)
    finally:
        LOCAL.sync = sync  # type: ignore[method-assign]
    assert files(target) == before
    assert [path.name for path in folder.iterdir()] == ["model"]


def test_the_same_bytes_as_one_process(tmp_path: Path) -> None:
    digests = {family: weights_digest(model(family)) for family in CASES}
    on_ranks(4, _export, tmp_path, digests, replicas=2)
    for family in CASES:
        alone = model(family)
        export_model(alone, tokenizer(), tmp_path / family)
        assert files(tmp_path / f"{family}-4") == files(tmp_path / family)
        alone.save_pretrained(tmp_path / f"{family}-small", max_shard_size=SMALL)
        small, expected = files(tmp_path / f"{family}-4-small"), files(tmp_path / f"{family}-small")
        weights = {name for name in expected if "safetensors" in name}
        assert len(weights) > 3
        assert {name: small[name] for name in weights} == {n: expected[n] for n in weights}
        back = AutoModelForCausalLM.from_pretrained(tmp_path / f"{family}-4-small")
        for name, tensor in alone.state_dict().items():
            assert torch.equal(back.state_dict()[name], tensor), name


def test_adapters_and_what_they_merge_to_are_the_same_bytes(tmp_path: Path) -> None:
    trunk = adapted("llama")
    export_adapted(judge(trunk), tokenizer(), tmp_path / "1" / "judge", merge=True)
    export_adapted(trunk.role_module("actor"), tokenizer(), tmp_path / "2" / "actor", merge=True)
    on_ranks(2, _export_adapted, tmp_path)
    for alone, sharded in (("1/judge", "k/judge"), ("1/adapter", "k/adapter")):
        assert files(tmp_path / sharded) == files(tmp_path / alone)
    for alone, sharded in (("2/actor", "k2/actor"), ("2/adapter", "k2/adapter")):
        assert files(tmp_path / sharded) == files(tmp_path / alone)


def test_a_full_disk_is_an_error_on_all_ranks_and_the_old_export_stays(tmp_path: Path) -> None:
    on_ranks(2, _full_disk, tmp_path)
