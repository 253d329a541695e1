"""Predicted against held memory of a PPO run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from rlhf_fast.config import PPOConfig
from rlhf_fast.config_loading import with_values
from rlhf_fast.distributed.agreement import ALONE
from rlhf_fast.distributed.world import World
from rlhf_fast.engine.memory_held import MemoryWatch, role_models
from rlhf_fast.engine.memory_ledger import PHASES, Ledger, MemoryPlan, Slot
from rlhf_fast.engine.memory_models import ModelConfigs
from rlhf_fast.engine.memory_plan import plan_memory
from rlhf_fast.engine.memory_sharded import Sharding
from rlhf_fast.engine.settings import cache_budget
from rlhf_fast.models.adapter_roles import AdapterActor, AdapterReference
from rlhf_fast.ppo.roles import Roles
from rlhf_fast.stages.generation import engine_of


@dataclass(frozen=True)
class MemoryReport:
    """What was predicted and what was held.

    Args:
        plan: from the config and the models' configs alone.
        sharding: how it is spread over the ranks; what is held is this rank's.
        held: phase -> bytes counted from tensors, of the phases that were watched.
        allocated: phase -> peak of `torch.cuda.memory_allocated`; empty without CUDA.
    """

    plan: MemoryPlan
    held: Mapping[str, Ledger]
    allocated: Mapping[str, int]
    sharding: Sharding = field(default_factory=Sharding)

    def rows(self) -> Iterator[tuple[str, Slot, int, int]]:
        """(phase, slot, predicted bytes, held bytes) of all that is held, not of activations."""
        for phase in (p for p in PHASES if p in self.held):
            predicted, held = self.sharding.ledger(self.plan, phase), self.held[phase]
            passes = self.plan.passes[phase] if self.sharding.shards == 1 else {}  # FSDP fetches
            for role, parts in passes.items():
                slot = Slot(role, "streamed")
                # The actor's pass is beside the reference's head, which the reference streamed.
                lives_in_host_memory = Slot(role, "weights", "host") in predicted
                # Whether samples are scored in a rollout depends on how long they are.
                seen = phase != "generate" or slot in held
                if "streamed" in parts and lives_in_host_memory and seen:
                    predicted[slot] = parts["streamed"]
            for slot in dict.fromkeys([*predicted, *held]):
                yield phase, slot, predicted.get(slot, 0), held.get(slot, 0)

    def worst(self) -> float:
        """The largest relative difference of a row of more than 4096 bytes."""
        differences = [
            abs(predicted - held) / max(predicted, held)
            for _, _, predicted, held in self.rows()
            if max(predicted, held) > 4096
        ]
        return max(differences, default=0.0)

    def __str__(self) -> str:
        lines = []
        if self.sharding.gpus > 1:
            lines.append(f"each of {self.sharding.gpus} ranks, weights view {self.sharding.view}")
        lines.append(
            f"{'phase':10}{'role':14}{'part':11}{'place':8}{'predicted':>14}{'held':>14} bytes"
        )
        for phase, slot, predicted, held in self.rows():
            lines.append(
                f"{phase:10}{slot.role:14}{slot.part:11}{slot.place:8}{predicted:14,}{held:14,}"
            )
        for phase, peak in self.allocated.items():
            lines.append(
                f"{phase:10}peak allocated by CUDA {peak:,}, predicted "
                f"{self.sharding.device(self.plan, phase):,}"
            )
        return "\n".join(lines)


def memory_report(
    config: PPOConfig,
    roles: Roles,
    watch: MemoryWatch,
    *,
    longest_prompt: int | None = None,
    world: World = ALONE,
) -> MemoryReport:
    """Compare what a watch has counted with the plan of the same run.

    Args:
        config: of the run.
        roles: of the run.
        watch: has counted.
        longest_prompt: tokens of the longest prompt of the data.
        world: the ranks of the run, of which each compares what it holds.
    """
    engine = engine_of(roles.generator)
    view = None if engine is None else engine.view
    sharding = Sharding(world.size, "alias" if view is None else view.name, world.replicas)
    if world.size > 1:  # as `DealtGenerator` has it
        config = with_values(config, {"engine.overlap_scoring": "off"})
    device: torch.device = next(roles.actor.module.parameters()).device
    free = _free_bytes(device)
    plan = plan_memory(
        config,
        configs_of(config, roles),
        device=device.type,
        kv_budget=None if free is None else world.size * free,
        longest_prompt=longest_prompt,
    )
    if config.engine.kv_gb:  # on each rank
        plan = plan.limited(world.size * int(config.engine.kv_gb * 1e9))
    return MemoryReport(plan, watch.held, watch.allocated, sharding)


def _free_bytes(device: torch.device) -> int | None:
    """What the engine would take for keys and values of what is free now; on a host no limit."""
    if device.type != "cuda":
        return None
    return cache_budget(device, 0)


def configs_of(config: PPOConfig, roles: Roles) -> ModelConfigs:
    """The configs of live models; a frozen one without bf16 weights is an object that was given."""
    models = role_models(roles)
    actor: Any = roles.actor
    own = models["reference"]
    reference = None if isinstance(own, AdapterReference) else own.module
    critic = models.get("critic")
    whole = critic is not None and hasattr(critic.module, "base_model")
    judge = models.get("reward_model")
    judge = None if judge is None or hasattr(judge, "adapted") else judge.module
    given = {
        name
        for name, module in (("reference", reference), ("reward_model", judge))
        if module is not None and not any(p.dtype == torch.bfloat16 for p in module.parameters())
    }
    return ModelConfigs(
        actor=actor.trunk.model.config if isinstance(actor, AdapterActor) else actor.module.config,
        reference=None if reference is None else reference.config,
        critic=critic.module.config if critic is not None and whole else None,
        reward_model=None if judge is None else judge.config,
        given=frozenset(given),
    )
