"""Reference and reward model cut over ranks, with the shards of their layers in host memory."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch.distributed.fsdp import FSDPModule

from rlhf_fast.config import PPOConfig
from rlhf_fast.distributed.sharding import shard_module
from rlhf_fast.distributed.world import World
from rlhf_fast.models.rewards import judges_of
from rlhf_fast.stages.ppo import PPOTrainer
from tests.distributed.ranks import on_ranks
from tests.engine.test_sharded_views import llama
from tests.models.tiny import random_sequences
from tests.stages.killed_runs import before_ppo, ppo_config
from tests.stages.tiny_runs import metric_lines


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return before_ppo(tmp_path_factory.mktemp("offloaded"))


def run_of(base: Path, name: str, place: str) -> PPOConfig:
    config = ppo_config(base, base)
    return dataclasses.replace(
        config,
        run=dataclasses.replace(config.run, output_dir=str(base / name)),
        memory=dataclasses.replace(config.memory, reference=place, reward_model=place),
        total_steps=2,
    )


def _away(module: torch.nn.Module) -> set[bool]:
    """Whether FSDP brings the shards of its units from host memory."""
    units = [part for part in module.modules() if isinstance(part, FSDPModule)]
    parameters = [
        p
        for unit in units
        for group in [unit._get_fsdp_state()._fsdp_param_group]
        if group is not None
        for p in group.fsdp_params
    ]
    assert parameters
    return {parameter.offload_to_cpu for parameter in parameters}


def _ppo(world: World, base: str, name: str) -> list[set[bool]]:
    trainer = PPOTrainer(run_of(Path(base), name, "offload"), quiet=True, world=world)
    trainer.train()
    roles = trainer.roles
    (judge,) = judges_of(roles.reward)
    assert roles.critic is not None
    modules = (roles.actor.module, roles.critic.module, roles.reference.module, judge.module)
    return [_away(module) for module in modules]


def test_offloaded_shards_say_what_resident_models_say(base: Path) -> None:
    PPOTrainer(run_of(base, "alone", "resident"), quiet=True).train()
    found = on_ranks(2, _ppo, str(base), "ranks")
    assert found == [[{False}, {False}, {True}, {True}]] * 2
    expected, lines = metric_lines(base / "alone"), metric_lines(base / "ranks")
    for line, wanted in zip(lines, expected, strict=True):
        shared = {key: value for key, value in wanted.items() if "preemptions" not in key}
        line.pop("rollout/preemptions")
        assert line == pytest.approx(shared, abs=1e-4, rel=1e-4)


def _hidden(world: World) -> tuple[float, int]:
    sequences = random_sequences([6, 3 + world.rank], seed=world.rank)
    outputs = []
    for offload in (False, True):
        module = llama().eval().requires_grad_(False)
        handle = shard_module(module, world, dtype="float32", offload=offload)
        with torch.no_grad():
            outputs.append(module.base_model(sequences.ids[None]).last_hidden_state)
    return float((outputs[0] - outputs[1]).abs().max()), handle.held_bytes


def test_where_a_shard_lies_changes_no_bit() -> None:
    for gap, held in on_ranks(2, _hidden):
        assert gap == 0.0
        assert held > 0
