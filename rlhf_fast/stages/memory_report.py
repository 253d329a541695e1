"""Predicted against held memory of a PPO run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from rlhf_fast.config import PPOConfig
from rlhf_fast.engine.memory_held import MemoryWatch, role_models
from rlhf_fast.engine.memory_ledger import PHASES, Ledger, MemoryPlan, Slot
from rlhf_fast.engine.memory_models import ModelConfigs
from rlhf_fast.engine.memory_plan import plan_memory
from rlhf_fast.engine.settings import cache_budget
from rlhf_fast.models.adapter_roles import AdapterActor, AdapterReference
from rlhf_fast.ppo.roles import Roles


@dataclass(frozen=True)
class MemoryReport:
    """What was predicted and what was held.

    Args:
        plan: from the config and the models' configs alone.
        held: phase -> bytes counted from tensors, of the phases that were watched.
        allocated: phase -> peak of `torch.cuda.memory_allocated`; empty without CUDA.
    """

    plan: MemoryPlan
    held: Mapping[str, Ledger]
    allocated: Mapping[str, int]

    def rows(self) -> Iterator[tuple[str, Slot, int, int]]:
        """(phase, slot, predicted bytes, held bytes) of all that is held, not of activations."""
        for phase in (p for p in PHASES if p in self.held):
            predicted, held = dict(self.plan.held[phase]), self.held[phase]
            for role, parts in self.plan.passes[phase].items():
                slot = Slot(role, "streamed")
                # Whether samples are scored in a rollout depends on how long they are.
                if "streamed" in parts and (phase != "generate" or slot in held):
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
        lines = [
            f"{'phase':10}{'role':14}{'part':11}{'place':8}{'predicted':>14}{'held':>14} bytes"
        ]
        for phase, slot, predicted, held in self.rows():
            lines.append(
                f"{phase:10}{slot.role:14}{slot.part:11}{slot.place:8}{predicted:14,}{held:14,}"
            )
        for phase, peak in self.allocated.items():
            lines.append(
                f"{phase:10}peak allocated by CUDA {peak:,}, predicted {self.plan.device(phase):,}"
            )
        return "\n".join(lines)


def memory_report(
    config: PPOConfig, roles: Roles, watch: MemoryWatch, *, longest_prompt: int | None = None
) -> MemoryReport:
    """Compare what a watch has counted with the plan of the same run.

    Args:
        config: of the run.
        roles: of the run.
        watch: has counted.
        longest_prompt: tokens of the longest prompt of the data.
    """
    device: torch.device = next(roles.actor.module.parameters()).device
    plan = plan_memory(
        config,
        configs_of(config, roles),
        device=device.type,
        kv_budget=_free_bytes(device),
        longest_prompt=longest_prompt,
    )
    return MemoryReport(plan, watch.held, watch.allocated)


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
