"""`rlhf-fast plan`: the memory of a PPO run, before anything is loaded.

Models are read as far as their config.json. Nothing is downloaded, written or put on a device.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rlhf_fast.config import PPOConfig
from rlhf_fast.config_loading import load_config, with_values
from rlhf_fast.distributed.placement import why_not_sliced
from rlhf_fast.distributed.world import require_replicas
from rlhf_fast.engine.memory_activations import DecoderShape
from rlhf_fast.engine.memory_ledger import MemoryPlan
from rlhf_fast.engine.memory_models import ModelConfigs, RolePlan, layout_key, role_plans
from rlhf_fast.engine.memory_plan import plan_memory
from rlhf_fast.engine.memory_sharded import Sharding
from rlhf_fast.engine.path_choice import choose_path
from rlhf_fast.engine.view_choice import cannot_read
from rlhf_fast.errors import ConfigError
from rlhf_fast.models.checks import check_context
from rlhf_fast.models.meta import meta_model, model_config
from rlhf_fast.stages.plan_advice import OBJECTS, Advice, advise
from rlhf_fast.stages.ranks import require_ranks_can
from rlhf_fast.stages.training import compute_type, require_settings

_UNITS = {"MB": 10**6, "GB": 10**9, "TB": 10**12, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


@dataclass(frozen=True)
class PlanResult:
    """What `rlhf-fast plan` found.

    Args:
        config: of the run.
        plan: predicted bytes.
        sharding: how they are spread.
        capacity: bytes of a GPU; None if none was named and there is none here.
        advice: changes that make it fit; None if it fits or no capacity is known.
        notes: what was assumed.
    """

    config: PPOConfig
    plan: MemoryPlan
    sharding: Sharding
    capacity: int | None
    advice: Advice | None
    notes: tuple[str, ...]

    @property
    def fits(self) -> bool | None:
        """Whether it fits as it is; None without a capacity."""
        return None if self.capacity is None else self.sharding.fits(self.plan, self.capacity)


def run_plan(
    path: Path | None,
    overrides: Sequence[str] = (),
    *,
    model: str | None = None,
    gpus: int = 1,
    gpu_memory: str | None = None,
) -> PlanResult:
    """Plan the run of a PPO config.

    Args:
        path: YAML file of the config; None: defaults.
        overrides: each as `key=value`.
        model: directory or config.json of the actor, in place of the config's `actor`.
        gpus: how many; `distributed.replicas` says how many of them hold a model between them.
        gpu_memory: of each, such as `80GB`; None: that of the GPU here, if there is one.

    Raises:
        ConfigError: RF1050 to RF1052, and as `load_config` and `sharding_of`.
        EnvironmentFault, GenerationError: as `sharding_of`.
        ModelError: as `model_config` and `plan_memory`.
    """
    if gpus < 1:
        raise ConfigError(
            "RF1052",
            f"{gpus} GPUs",
            where="--gpus",
            expected="1 or more",
            remedy="name how many GPUs the run would have",
        )
    capacity = _present_memory() if gpu_memory is None else parse_memory(gpu_memory)
    config = _config(path, overrides, model)
    models, notes = model_configs(config)
    sharding = sharding_of(config, models.actor, gpus)

    layouts: dict[str, Mapping[str, RolePlan]] = {}

    def predict(changed: PPOConfig) -> MemoryPlan:
        if gpus > 1:  # where auto is off
            changed = with_values(changed, {"engine.overlap_scoring": "off"})
        key = layout_key(changed)
        if key not in layouts:
            layouts[key] = role_plans(changed, models)
        found = plan_memory(changed, models, roles=layouts[key])
        if changed.engine.kv_gb:  # on each GPU
            return found.limited(gpus * int(changed.engine.kv_gb * 1e9))
        if capacity is None:
            return found
        return found.limited(sharding.kv_budget(found, capacity))

    plan = predict(config)
    advice = None
    if capacity is not None and not sharding.fits(plan, capacity):
        limit = capacity
        advice = advise(config, predict, lambda found: sharding.fits(found, limit), gpus=gpus)
    return PlanResult(config, plan, sharding, capacity, advice, (*notes, *plan.notes))


def sharding_of(config: PPOConfig, actor: Any, gpus: int) -> Sharding:
    """How a run on so many GPUs spreads its models.

    Args:
        config: of the run.
        actor: config of transformers.
        gpus: how many.

    Raises:
        ConfigError: RF1045, a setting that is for one process.
        EnvironmentFault: RF7050, they cannot be so many replicas.
        GenerationError: RF4037, generation cannot read the weights as asked for.
    """
    if gpus == 1:
        return Sharding()
    require_ranks_can(config, gpus)
    replicas, wish = config.distributed.replicas, config.distributed.weights
    require_replicas(gpus, replicas)
    module = meta_model(actor, dtype=compute_type(config.run))
    why_not = why_not_sliced(module, gpus // replicas)
    if choose_path(module, config.engine.path)[0] != "fused":
        why_not = why_not or "only the fused path sums slices"
    if wish == "tp" and replicas < gpus and why_not:
        raise cannot_read(wish, why_not)
    return Sharding.over(gpus, replicas, wish, sliced=why_not is None)


def parse_memory(text: str) -> int:
    """Bytes of `80GB`, `79.6 GiB` and the like.

    Raises:
        ConfigError: RF1050.
    """
    match = re.fullmatch(r"\s*(\d{1,12}(?:\.\d{1,12})?)\s*([MGT]i?B)\s*", text, re.IGNORECASE)
    size = int(float(match[1]) * _UNITS[match[2].upper()]) if match else 0
    if size < 1:
        raise ConfigError(
            "RF1050",
            f"{text!r} is no amount of memory",
            where="--gpu-memory",
            expected="a number above 0 and MB, GB, TB, MiB, GiB or TiB",
            remedy="write it like 80GB",
        )
    return size


def model_configs(config: PPOConfig) -> tuple[ModelConfigs, tuple[str, ...]]:
    """The configs of all models that a run would load, and what had to be assumed.

    Raises:
        ModelError: as `model_config`; too few positions (RF3022).
    """
    actor, notes = model_config(config.actor), []
    DecoderShape.of(actor)
    check_context(
        meta_model(actor, dtype="float32"),
        config.data.max_prompt_length,
        config.sampling.max_new_tokens,
        role="actor",
    )
    judge = model_config(config.reward.model) if config.reward.model else None
    if judge is None and not config.reward.function and not config.lora.reward_adapter:
        judge = actor
        notes.append("no reward is named: a reward.model of the actor's size is assumed")
    if config.run.dtype == "float32":
        notes.append("run.dtype=float32; with bfloat16 frozen models take half and forwards less")
    reference = model_config(config.reference) if config.reference else None
    start = model_config(config.critic) if config.critic else None
    if start is None and config.reward.model:
        start = judge
    models = ModelConfigs(actor=actor, reference=reference, critic=start, reward_model=judge)
    return models, tuple(notes)


def _config(path: Path | None, overrides: Sequence[str], model: str | None) -> PPOConfig:
    named = [o for o in overrides if o.startswith("actor=")]
    if model is not None and named:
        raise ConfigError(
            "RF1051",
            f"two models: --model {model} and {named[-1]}",
            where="command line",
            expected="one of them",
            remedy="leave one out",
        )
    given = [*overrides, *([] if model is None else [f"actor={model}"])]
    config = load_config(PPOConfig, path, given, objects=OBJECTS)
    require_settings(config, "actor")
    return config


def _present_memory() -> int | None:
    if not torch.cuda.is_available():
        return None
    memory: Any = torch.cuda.get_device_properties(0).total_memory
    return int(memory)
