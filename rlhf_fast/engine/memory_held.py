"""Bytes that the live objects of a PPO run hold, counted from their tensors in each phase.

Storages are counted once, whatever views them: tied weights, parameters in one flat buffer, a trunk
that roles share. Counting reads sizes alone and never waits for a device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_fast.distributed.flat_shards import local_part
from rlhf_fast.distributed.sharding import shards_on_host
from rlhf_fast.engine.dealt_generator import DealtGenerator
from rlhf_fast.engine.hybrid import HybridEngine
from rlhf_fast.engine.memory_ledger import COPIES, PAGES, PHASES, Ledger, add, host_block
from rlhf_fast.engine.progress import Progress
from rlhf_fast.models.adapter_roles import AdapterActor, AdapterGenerator
from rlhf_fast.models.adapters import AdapterModule
from rlhf_fast.models.offload import StreamedModule
from rlhf_fast.models.rewards import judges_of
from rlhf_fast.ppo.roles import Roles

Phase = Callable[[str], AbstractContextManager[Any]]


def role_models(roles: Roles) -> dict[str, Any]:
    """What stands for each role that is a model, by name."""
    found: dict[str, Any] = {"actor": roles.actor, "critic": roles.critic}
    found["reference"] = roles.reference
    for judge in judges_of(roles.reward):
        found["reward_model"] = judge
    return {name: role for name, role in found.items() if role is not None}


def held_bytes(roles: Roles) -> Ledger:
    """Bytes held now by role, part and place; of sharded models what this rank holds."""
    ledger: Ledger = {}
    seen = _Seen()
    owners: dict[tuple[int, int], str] = {}
    for name, role in role_models(roles).items():
        module: nn.Module = role.module
        place = "host" if _streamed(role) is not None else "device"
        # Adapters lie in one flat buffer with their trunk, where they are generated from.
        count = seen.views if isinstance(module, AdapterModule) else seen.storages
        away = list(shards_on_host(module))
        known = set(map(id, away))
        here = (p for p in module.parameters() if id(p) not in known)
        add(ledger, name, "weights", count(away), "host")
        add(ledger, name, "weights", count(here), place)
        add(ledger, name, "weights", seen.storages(module.buffers()))
        gradients = [p.grad for p in module.parameters() if p.grad is not None]
        add(ledger, name, "gradients", seen.storages(gradients))
        owners |= dict.fromkeys(map(_place, module.parameters()), name)
    if isinstance(roles.actor, AdapterActor):
        # What the adapters have not claimed.
        model: nn.Module = roles.actor.trunk.model
        shared = [*model.parameters(), *model.buffers()]
        add(ledger, "trunk", "weights", seen.storages(shared))
    for optimizer in (roles.actor_optimizer, roles.critic_optimizer):
        for parameter, tensor, on_host in [] if optimizer is None else optimizer.state_tensors():
            place = "host" if on_host else "device"
            add(ledger, owners[_place(parameter)], "moments", seen.storages([tensor]), place)
    engine = _engine(roles)
    if engine is not None:
        add(ledger, *PAGES[:2], engine.kv_bytes)
        add(ledger, *COPIES[:2], engine.copied_bytes)
    return ledger


def _place(tensor: Tensor) -> tuple[int, int]:
    """Where a tensor begins: the same for a parameter and for the shard of it that is stepped."""
    held = local_part(tensor)
    return held.untyped_storage()._cdata, int(held.storage_offset())


class _Seen:
    """What has been counted: storages with the bytes of them that were."""

    def __init__(self) -> None:
        self._counted: dict[int, int] = {}
        self._views: set[tuple[int, int]] = set()

    def views(self, tensors: Iterable[Tensor]) -> int:
        """Bytes of the tensors alone, each place once; `storages` will count what is left."""
        total = 0
        for tensor in map(local_part, tensors):
            place = _place(tensor)
            if place not in self._views:
                self._views.add(place)
                self._counted[place[0]] = self._counted.get(place[0], 0) + tensor.nbytes
                total += tensor.nbytes
        return total

    def storages(self, tensors: Iterable[Tensor]) -> int:
        """Bytes of the storages behind the tensors that were not counted before."""
        total = 0
        for tensor in map(local_part, tensors):
            storage = tensor.untyped_storage()
            pinned = torch.cuda.is_initialized() and tensor.is_pinned()
            size = host_block(storage.nbytes(), pinned)
            total += size - self._counted.get(storage._cdata, 0)
            self._counted[storage._cdata] = size
        return total


def _streamed(role: Any) -> StreamedModule | None:
    return getattr(role, "streamed", None)


def _engine(roles: Roles) -> HybridEngine | None:
    generator = roles.generator
    inner = generator.generator if isinstance(generator, DealtGenerator) else generator
    inner = inner.generator if isinstance(inner, AdapterGenerator) else inner
    return inner if isinstance(inner, HybridEngine) else None


class MemoryWatch:
    """Counts what is held at the fullest moment of each phase of the steps that it sees.

    Args:
        roles: of the run, as built; counted at once as phase `load`.

    Attributes:
        held: phase -> the most that each slot held.
        allocated: phase -> peak of `torch.cuda.memory_allocated` of the actor's GPU; empty where
            it is on none.
    """

    def __init__(self, roles: Roles) -> None:
        self._roles = roles
        device: torch.device = next(roles.actor.module.parameters()).device
        self._gpu = device if device.type == "cuda" else None
        self._phase = ""
        self._generating = False
        self.held: dict[str, Ledger] = {}
        self.allocated: dict[str, int] = {}
        weights = {slot: n for slot, n in held_bytes(roles).items() if slot.part == "weights"}
        self.held["load"] = weights

    def attach(self) -> None:
        """Count in the phases that `around` wraps, from now on."""
        roles = self._roles
        for optimizer in (roles.actor_optimizer, roles.critic_optimizer):
            if optimizer is not None:
                # All gradients that will be exist right before a step.
                optimizer.optimizer.register_step_pre_hook(lambda *_: self._sample("update"))
        engine = _engine(roles)
        if engine is not None:
            self._follow(engine)

    def around(self, phase: Phase) -> Phase:
        """`phase` of the learner, with counting."""

        @contextmanager
        def watched(name: str) -> Iterator[None]:
            self._begin(name)
            with phase(name):
                try:
                    yield
                    self._sample(name)
                finally:
                    self._end(name)

        return watched

    def _follow(self, engine: HybridEngine) -> None:
        """Count once while pages exist: a GPU's are given back when the rollout ends."""
        show = engine.on_progress

        def progress(now: Progress) -> None:
            if self._generating:
                self._generating = False
                self._sample("generate")
            if show is not None:
                show(now)

        engine.on_progress = progress

    def _begin(self, name: str) -> None:
        self._phase = name
        self._generating = name == "generate"
        for streamed in self._all_streamed():
            streamed.most_device_bytes = 0
        if self._gpu is not None:
            torch.cuda.reset_peak_memory_stats(self._gpu)

    def _end(self, name: str) -> None:
        self._phase = ""
        if self._gpu is not None and name in PHASES:
            peak = torch.cuda.max_memory_allocated(self._gpu)
            self.allocated[name] = max(peak, self.allocated.get(name, 0))

    def _sample(self, name: str) -> None:
        if name not in PHASES or name != self._phase:
            return
        now = held_bytes(self._roles)
        for role, model in role_models(self._roles).items():
            streamed = _streamed(model)
            add(now, role, "streamed", 0 if streamed is None else streamed.most_device_bytes)
        most = self.held.setdefault(name, {})
        for slot, size in now.items():
            most[slot] = max(size, most.get(slot, 0))

    def _all_streamed(self) -> Iterator[StreamedModule]:
        for model in role_models(self._roles).values():
            streamed = _streamed(model)
            if streamed is not None:
                yield streamed
