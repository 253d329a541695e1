"""LoRA mode of PPO: the roles on one trunk, what their checkpoints hold, what is exported."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from rlhf_fast.config import PPOConfig
from rlhf_fast.distributed.world import World
from rlhf_fast.engine.sharded_views import WeightView
from rlhf_fast.errors import ConfigError, ModelError
from rlhf_fast.models.adapter_files import AdapterFile, load_adapter
from rlhf_fast.models.adapter_roles import (
    AdapterActor,
    AdapterCritic,
    AdapterReference,
    AdapterRewardModel,
)
from rlhf_fast.models.adapters import SharedTrunk
from rlhf_fast.ppo.roles import Roles
from rlhf_fast.seeds import derive_seed
from rlhf_fast.stages.adapted import open_trunk, place_trunk
from rlhf_fast.stages.placing import place_generating


@dataclass(frozen=True)
class SharedModels:
    """The models on one trunk; `critic` is None without one, `reward_model` if it is elsewhere.

    `view`: how generation sees a trunk that is cut over ranks.
    """

    actor: AdapterActor
    reference: AdapterReference
    critic: AdapterCritic | None
    reward_model: AdapterRewardModel | None
    view: WeightView | None = None


def refuse_modules(config: PPOConfig, **modules: nn.Module | None) -> None:
    """Refuse modules, by role, in the place of what is an adapter in LoRA mode.

    Raises:
        ConfigError: RF1042.
    """
    given = [role for role, module in modules.items() if module is not None]
    if given:
        raise ConfigError(
            "RF1042",
            f"{', '.join(given)} passed as a model, with lora.rank={config.lora.rank}",
            where=", ".join(given),
            expected="none: it is an adapter on the actor's trunk",
            remedy="leave it out, or set lora.rank=0",
        )


def share_trunk(
    config: PPOConfig, trunk: nn.Module, world: World, *, own_reference: bool = False
) -> SharedModels:
    """Put all adapters on a trunk, and the trunk on the ranks of `world`.

    The actor starts from `lora.actor_adapter`, of which the reference is a frozen copy then, or as
    the trunk itself. The critic starts from the reward adapter and its head where there is one,
    else as the trunk under a head of zeros. With `run.dtype=bfloat16` the trunk is held in bf16: it
    is frozen, so it needs no masters.

    Args:
        config: with `lora.rank` above 0.
        trunk: causal LM as the loaders return it; it becomes the trunk.
        world: where to.
        own_reference: the reference is another model, and needs no adapter here.

    Raises:
        ModelError: an adapter or a target that does not fit (RF3060 to RF3067).
    """
    shared = open_trunk(trunk, config.actor)
    seed, with_critic = config.run.seed, config.algorithm.estimator == "gae"
    lora = config.lora
    new = shared.shape(lora.rank, lora.alpha, lora.targets)
    start = load_adapter(lora.actor_adapter, shared) if lora.actor_adapter else None
    judge = load_judge(lora.reward_adapter, shared) if lora.reward_adapter else None

    def add(name: str, file: AdapterFile | None, role: int, *, trainable: bool) -> None:
        shape, tensors = (new, None) if file is None else (file.shape, file.tensors)
        drawn = derive_seed(seed, 0, 0, role)
        shared.add(name, shape, seed=drawn, trainable=trainable, tensors=tensors)

    add("actor", start, 0, trainable=True)
    copied = start if not own_reference else None
    if copied is not None:
        add("reference", copied, 1, trainable=False)
    if with_critic:
        add("critic", judge, 2, trainable=True)
    if judge is not None:
        add("reward", judge, 3, trainable=False)
    with shared.adapter("actor"):
        view = place_generating(
            shared.model,
            world,
            config.distributed.weights,
            path=config.engine.path,
            put=lambda: place_trunk(
                shared,
                world.device,
                gradient_checkpointing=config.gradient_checkpointing,
                world=world,
            ),
        )
    return SharedModels(
        AdapterActor(shared, "actor"),
        AdapterReference(shared, None if copied is None else "reference"),
        AdapterCritic(shared, judge) if with_critic else None,
        None if judge is None else AdapterRewardModel(shared, judge),
        view,
    )


def load_judge(path: str, trunk: SharedTrunk) -> AdapterFile:
    """The reward adapter, which must have a scalar head.

    Raises:
        ModelError: RF3067, and as `load_adapter`.
    """
    file = load_adapter(path, trunk)
    if file.head is None:
        raise ModelError(
            "RF3067",
            "the reward adapter has no score head",
            where=str(file.directory),
            expected="an adapter of a sequence classifier, whose `score` layer is saved with it",
            remedy="train it with peft as SEQ_CLS, or name the adapter of a reward model",
        )
    return file


def check_adapters(config: PPOConfig, trunk: nn.Module) -> list[str]:
    """What `share_trunk` would find, in plain lines; errors as there."""
    shared, lora = open_trunk(trunk, config.actor), config.lora
    new = shared.shape(lora.rank, lora.alpha, lora.targets)
    lines = [f"trunk: {config.actor}, adapters on {len(new.layers)} layers, rank {lora.rank}"]
    if lora.actor_adapter:
        file = load_adapter(lora.actor_adapter, shared)
        lines.append(f"actor: adapter {lora.actor_adapter}, rank {file.shape.rank}")
    if lora.reward_adapter:
        file = load_judge(lora.reward_adapter, shared)
        lines.append(f"reward model: adapter {lora.reward_adapter}, rank {file.shape.rank}")
    return lines


def shared_trunk(roles: Roles) -> SharedTrunk | None:
    """The trunk that the roles share; None in full fine-tuning."""
    return roles.actor.trunk if isinstance(roles.actor, AdapterActor) else None


def shared_bytes(roles: Roles, trunk: SharedTrunk, *, keep_last: int, merge: bool) -> int:
    """Disk space a run in LoRA mode needs: adapters with two Adam moments each, and exports."""
    modules = [roles.actor.module] + ([] if roles.critic is None else [roles.critic.module])
    adapters = sum(4 * p.numel() for module in modules for p in module.parameters())
    model = sum(4 * p.numel() for p in trunk.model.parameters()) if merge else 0
    return adapters * (3 * (keep_last + 1) + 1) + model
