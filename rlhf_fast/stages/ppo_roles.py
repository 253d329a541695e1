"""The four roles of PPO from modules or directories, and the batches of the PPO-ptx term."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from rlhf_fast.config import PPOConfig
from rlhf_fast.data import EpochSampler, pack_sft
from rlhf_fast.data.examples import SFTExample
from rlhf_fast.engine.hybrid import HybridEngine, engine_settings
from rlhf_fast.errors import ConfigError
from rlhf_fast.models.adapter_roles import AdapterGenerator
from rlhf_fast.models.checks import check_context, check_same_tokenizer, check_vocabulary
from rlhf_fast.models.forward import ComputeDtype, enable_gradient_checkpointing
from rlhf_fast.models.loading import (
    adopt_module,
    classifier_over,
    critic_from,
    load_causal_lm,
    load_critic,
    load_sequence_classifier,
    load_tokenizer,
)
from rlhf_fast.models.offload import round_layer_weights
from rlhf_fast.models.reward_function import (
    FunctionReward,
    RewardFunction,
    load_reward_function,
)
from rlhf_fast.models.rewards import ModelReward, SumReward
from rlhf_fast.models.roles import Actor, Critic, Reference, RewardModel, TrunkCritic
from rlhf_fast.optim import GuardedOptimizer
from rlhf_fast.ppo.roles import Roles
from rlhf_fast.protocols import Reward
from rlhf_fast.stages.shared_roles import refuse_modules, share_trunk
from rlhf_fast.stages.training import compute_type
from rlhf_fast.types import PackedSequences


class PretrainingBatches:
    """`PretrainingSource` over SFT examples, resumable through its sampler."""

    def __init__(
        self,
        examples: tuple[SFTExample, ...],
        sampler: EpochSampler,
        token_budget: int,
        device: torch.device,
    ) -> None:
        self.examples = examples
        self.sampler = sampler
        self.token_budget = token_budget
        self.device = device

    def next_batch(self) -> list[tuple[PackedSequences, Tensor]]:
        """One optimizer step's microbatches: (sequences, targets [N])."""
        chosen = [self.examples[i] for i in self.sampler.next_batch()]
        packs = [pack.to(self.device) for pack in pack_sft(chosen, self.token_budget)]
        return [(pack.sequences, pack.targets) for pack in packs]


def build_reward(
    config: PPOConfig,
    tokenizer: Any,
    device: torch.device,
    *,
    model: nn.Module | None = None,
    model_tokenizer: Any = None,
    function: RewardFunction | None = None,
    judge: RewardModel | None = None,
) -> Reward:
    """The reward: a model, a function, or the model plus `function_weight` times the function.

    Modules and functions given here come before what the config names; `judge` is a reward model
    that stands on its device already.
    """
    settings = config.reward
    parts: list[tuple[float, Reward]] = []
    if model is None and settings.model:
        model = load_sequence_classifier(
            settings.model, init_head=False, dtype=compute_type(config.run)
        )
        round_layer_weights(model)  # ours; one that was given is left as it is
        model_tokenizer = load_tokenizer(settings.model)
    if model is not None:
        offload = config.memory.reward_model == "offload"
        judge = RewardModel(model, streamed_to=device) if offload else RewardModel(model.to(device))
    if judge is not None:
        own = tokenizer if model_tokenizer is None else model_tokenizer
        parts.append(
            (1.0, ModelReward(judge, tokenizer, own, token_budget=config.microbatch_tokens))
        )
    if function is None and settings.function:
        function = load_reward_function(settings.function)
    if function is not None:
        weight = settings.function_weight if parts else 1.0
        parts.append(
            (
                weight,
                FunctionReward(
                    function,
                    tokenizer,
                    on_error="abstain" if settings.on_error == "abstain" else "fail",
                ),
            )
        )
    if not parts:
        raise ConfigError(
            "RF1040",
            "PPO has no reward",
            where="reward.model, reward.function",
            remedy="name a reward model or a function, or pass one to PPOTrainer",
        )
    return parts[0][1] if len(parts) == 1 else SumReward(parts)


def build_critic(
    config: PPOConfig, actor: nn.Module, *, critic: nn.Module | None, reward: nn.Module | None
) -> Critic | TrunkCritic | None:
    """The critic: as given, from its directory, a copy of the reward model, or the actor's trunk.

    None if the estimator is critic-free.

    Raises:
        ConfigError: RF1043, one is given beside a head on the actor's trunk.
    """
    if config.algorithm.estimator != "gae":
        return None
    if config.memory.value_head == "actor":
        if critic is not None:
            raise ConfigError(
                "RF1043",
                "a critic was given, and memory.value_head=actor makes one",
                where="critic, memory.value_head",
                remedy="leave out critic, or set memory.value_head=separate",
            )
        return TrunkCritic(actor)
    if critic is None:
        directory = config.critic or config.reward.model
        if config.critic or (directory and reward is None):
            critic = load_critic(directory, dtype=compute_type(config.run))
        else:
            critic = critic_from(actor if reward is None else reward)
    critic.requires_grad_(True)
    return Critic(critic)


def check_tokenizers(tokenizer: Any, **directories: str) -> None:
    """Refuse roles with another tokenizer than the actor's: ids are handed over as they are.

    Args:
        tokenizer: the actor's.
        directories: role -> its directory, empty if it comes from elsewhere.

    Raises:
        ModelError: RF3023.
    """
    for role, directory in directories.items():
        if directory:
            check_same_tokenizer(tokenizer, load_tokenizer(directory), names=f"actor, {role}")


def check_roles(roles: Roles, tokenizer: Any, prompt: int, response: int) -> None:
    """Refuse a role that cannot read the longest sequence, before anything is generated.

    Args:
        roles: the roles as built.
        tokenizer: the actor's.
        prompt: tokens of the longest prompt.
        response: tokens of the longest response.

    Raises:
        ModelError: ids without an embedding (RF3021), or too few positions (RF3022).
    """
    modules = {"actor": roles.actor.module, "reference": roles.reference.module}
    if roles.critic is not None and not isinstance(roles.critic, TrunkCritic):
        modules["critic"] = roles.critic.module
    parts = [part for _, part in roles.reward.parts] if isinstance(roles.reward, SumReward) else []
    for part in parts or [roles.reward]:
        if isinstance(part, ModelReward):
            modules["reward model"] = part.reward_model.module
    for role, module in modules.items():
        check_vocabulary(tokenizer, module, role=role)
        check_context(module, prompt, response, role=role)


def adopt_modules(dtype: ComputeDtype, modules: Mapping[str, nn.Module | None]) -> None:
    """Bring modules made elsewhere, by role, to what the loaders return: fp32 masters and so on.

    Raises:
        ConfigError: RF1041, a trained role shares weights with another.
        ModelError: a weight is NaN or Inf (RF3020).
    """
    owners: dict[nn.Parameter, str] = {}
    for role, module in modules.items():
        if module is None:
            continue
        for parameter in module.parameters():
            owner = owners.setdefault(parameter, role)
            if owner != role and {owner, role} & {"model", "critic"}:
                raise ConfigError(
                    "RF1041",
                    f"{owner} and {role} are the same weights",
                    where=f"{owner}, {role}",
                    expected="models of their own: one of the two is trained",
                    remedy=f"leave out {role}, which makes a copy, or pass copy.deepcopy of it"
                    if role in ("reference", "critic")
                    else f"pass copy.deepcopy of {role}",
                )
        adopt_module(module, dtype=dtype, role=role)


def critic_to_export(roles: Roles) -> nn.Module | None:
    """The critic as a classifier: with the actor's trunk if it has none of its own."""
    critic = roles.critic
    if isinstance(critic, TrunkCritic):
        return cast(nn.Module, classifier_over(critic.trunk, critic.head.score))
    return None if critic is None else critic.module


def build_optimizer(
    config: PPOConfig,
    module: nn.Module,
    name: Literal["actor", "critic"],
    value_head: nn.Module | None = None,
) -> GuardedOptimizer:
    """Put a module, already on its device, in train mode, and make its optimizer.

    A `value_head` joins it with the learning rate and weight decay of `critic_optim`.
    """
    module.train()  # dropout is off in either mode; activations are recomputed in this one only
    if config.gradient_checkpointing:
        enable_gradient_checkpointing(module)
    return guarded_optimizer(config, module, name, value_head)


def guarded_optimizer(
    config: PPOConfig,
    module: nn.Module,
    name: Literal["actor", "critic"],
    value_head: nn.Module | None = None,
) -> GuardedOptimizer:
    """The optimizer of a module's trainable parameters, and of a value head if there is one."""
    algorithm = config.algorithm
    return GuardedOptimizer(
        module,
        config.actor_optim if name == "actor" else config.critic_optim,
        config.total_steps * algorithm.ppo_epochs * algorithm.minibatches,
        max_bad_steps=config.run.max_bad_steps,
        name=name,
        bits=8 if config.memory.optimizer == "adamw8bit" else 32,
        in_backward=config.memory.step_in_backward,
        heads={} if value_head is None else {"value_head": (value_head, config.critic_optim)},
    )


def build_roles(
    config: PPOConfig,
    tokenizer: Any,
    device: torch.device,
    *,
    actor: nn.Module | None = None,
    reference: nn.Module | None = None,
    critic: nn.Module | None = None,
    reward_model: nn.Module | None = None,
    reward_tokenizer: Any = None,
    reward_function: RewardFunction | None = None,
    pretraining: PretrainingBatches | None = None,
) -> Roles:
    """All roles and optimizers, on `device`; modules given come before the config's directories.

    Raises:
        ModelError: as the loaders, and RF3023 if the tokenizers of the directories differ.
    """
    check_tokenizers(
        tokenizer,
        reference="" if reference is not None else config.reference,
        critic="" if critic is not None or config.algorithm.estimator != "gae" else config.critic,
    )
    adopt_modules(
        compute_type(config.run),
        {"model": actor, "reward_model": reward_model, "reference": reference, "critic": critic},
    )
    if actor is None:
        actor = load_causal_lm(config.actor, dtype=compute_type(config.run))
    if reference is None and config.reference:
        reference = load_causal_lm(config.reference, dtype=compute_type(config.run))
        round_layer_weights(reference)
    reward = partial(
        build_reward,
        *(config, tokenizer, device),
        model=reward_model,
        model_tokenizer=reward_tokenizer,
        function=reward_function,
    )
    if config.lora.rank > 0:
        judge = reward_model if config.lora.reward_adapter else None
        refuse_modules(config, critic=critic, reward_model=judge)
        return _shared_roles(config, tokenizer, device, actor, reference, reward, pretraining)
    if reference is None:
        reference = copy.deepcopy(actor)
        round_layer_weights(reference)
    policy = Actor(actor.to(device))
    value_model = build_critic(config, actor, critic=critic, reward=reward_model)
    value_head = value_model.head if isinstance(value_model, TrunkCritic) else None
    engine = build_engine(config, actor, tokenizer, lambda: policy.weight_version)
    actor_optimizer = build_optimizer(config, actor, "actor", value_head)
    engine.guard(actor_optimizer.optimizer)
    critic_optimizer = None
    if value_model is not None and value_head is None:
        critic_optimizer = build_optimizer(config, value_model.module.to(device), "critic")
        engine.guard(critic_optimizer.optimizer)
    optimizers = [o for o in (actor_optimizer, critic_optimizer) if o is not None]
    return Roles(
        actor=policy,
        reference=frozen_reference(config, reference, device),
        critic=value_model,
        reward=reward(),
        generator=engine,
        actor_optimizer=actor_optimizer,
        critic_optimizer=critic_optimizer,
        pretraining=pretraining,
        on_update=lambda: policy.bump_version(),
        scoring=engine.scoring,
        checkpointed={"expected_lengths": engine.expected},
        between_updates=between_updates(config, optimizers),
    )


def _shared_roles(
    config: PPOConfig,
    tokenizer: Any,
    device: torch.device,
    trunk: nn.Module,
    reference: nn.Module | None,
    reward: Callable[..., Reward],
    pretraining: PretrainingBatches | None,
) -> Roles:
    """The roles of LoRA mode: `trunk` carries them all, but a reference or reward of its own."""
    shared = share_trunk(config, trunk, device, own_reference=reference is not None)
    policy, value_model = shared.actor, shared.critic
    engine = build_engine(config, policy.trunk.model, tokenizer, lambda: policy.weight_version)
    actor_optimizer = guarded_optimizer(config, policy.module, "actor")
    engine.guard(actor_optimizer.optimizer)
    critic_optimizer = None
    if value_model is not None:
        critic_optimizer = guarded_optimizer(config, value_model.module, "critic")
        engine.guard(critic_optimizer.optimizer)
    optimizers = [o for o in (actor_optimizer, critic_optimizer) if o is not None]
    return Roles(
        actor=policy,
        reference=shared.reference
        if reference is None
        else frozen_reference(config, reference, device),
        critic=value_model,
        reward=reward(judge=shared.reward_model),
        generator=AdapterGenerator(engine, policy.trunk, "actor"),
        actor_optimizer=actor_optimizer,
        critic_optimizer=critic_optimizer,
        pretraining=pretraining,
        on_update=lambda: policy.bump_version(),
        scoring=engine.scoring,
        checkpointed={"expected_lengths": engine.expected},
        between_updates=between_updates(config, optimizers),
    )


def build_engine(
    config: PPOConfig, module: nn.Module, tokenizer: Any, weight_version: Callable[[], int]
) -> HybridEngine:
    """The engine that generates from the weights that are trained."""
    return HybridEngine.from_tokenizer(
        module,
        tokenizer,
        weight_version=weight_version,
        settings=engine_settings(config.engine, config.rollout.max_batch),
    )


def frozen_reference(config: PPOConfig, module: nn.Module, device: torch.device) -> Reference:
    """The reference on the device, or in host memory and read a layer at a time."""
    if config.memory.reference == "offload":
        return Reference(module, streamed_to=device)
    return Reference(module.to(device))


def between_updates(
    config: PPOConfig, optimizers: Sequence[GuardedOptimizer]
) -> Callable[[], AbstractContextManager[None]]:
    """What surrounds generation and scoring, when no optimizer steps."""
    if config.memory.optimizer_state == "resident":
        return nullcontext
    return lambda: states_on_host(optimizers)


@contextmanager
def states_on_host(optimizers: Sequence[GuardedOptimizer]) -> Iterator[None]:
    """Keep the optimizers' states off the device inside."""
    try:
        for optimizer in optimizers:
            optimizer.offload_state()
        yield
    finally:
        for optimizer in optimizers:
            optimizer.restore_state()
