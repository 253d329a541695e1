"""The four roles of PPO from modules or directories, and the batches of the PPO-ptx term."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from rlhf_fast.config import PPOConfig
from rlhf_fast.data import EpochSampler, collate_sft, pack_best_fit
from rlhf_fast.data.examples import SFTExample
from rlhf_fast.data.packing import share_of
from rlhf_fast.distributed.gradients import RankGradients
from rlhf_fast.distributed.world import World
from rlhf_fast.engine.hybrid import HybridEngine
from rlhf_fast.engine.settings import engine_settings
from rlhf_fast.engine.sharded_views import WeightView
from rlhf_fast.engine.stopping import stops_of
from rlhf_fast.errors import ConfigError
from rlhf_fast.models.adapter_roles import AdapterGenerator
from rlhf_fast.models.heads import require_classifier
from rlhf_fast.models.loading import (
    classifier_over,
    critic_from,
    load_causal_lm,
    load_critic,
)
from rlhf_fast.models.offload import round_layer_weights
from rlhf_fast.models.reward_function import RewardFunction
from rlhf_fast.models.roles import Actor, Critic, Reference, TrunkCritic, freeze
from rlhf_fast.ppo.pretraining import PretrainingBatch
from rlhf_fast.ppo.roles import Roles
from rlhf_fast.protocols import Alone, Reward, WorkSplit
from rlhf_fast.stages.placing import place, place_generating
from rlhf_fast.stages.ppo_checks import (
    adopt_modules,
    check_tokenizers,
    role_modules,
    share_nothing,
)
from rlhf_fast.stages.ppo_optimizers import (
    between_updates,
    build_optimizer,
    guarded_optimizer,
)
from rlhf_fast.stages.ppo_reward import build_reward
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
        split: WorkSplit | None = None,
    ) -> None:
        self.examples = examples
        self.sampler = sampler
        self.token_budget = token_budget
        self.device = device
        self.split = Alone() if split is None else split

    def next_batch(self) -> PretrainingBatch:
        """See `PretrainingSource`.

        Raises:
            DataError: RF2060, from `microbatches`: an example is longer than the configured budget.
        """
        chosen = [self.examples[i] for i in self.sampler.next_batch()]
        lengths = [len(example) for example in chosen]
        tokens = sum(int(example.loss_mask[1:].sum()) for example in chosen)

        def microbatches(budget: int) -> list[tuple[PackedSequences, Tensor]]:
            bins = pack_best_fit(lengths, min(self.token_budget, max(budget, *lengths)))
            batch = []
            for share in share_of(bins, lengths, self.split.rank, self.split.ranks):
                pack = collate_sft([chosen[i] for i in share.rows]).to(self.device)
                batch.append((pack.sequences, (pack.idle() if share.idle else pack).targets))
            return batch

        return PretrainingBatch(tokens, microbatches)


def build_critic(
    config: PPOConfig, actor: nn.Module, *, critic: nn.Module | None, reward: nn.Module | None
) -> Critic | TrunkCritic | None:
    """The critic: as given, from its directory, a copy of the reward model, or the actor's trunk.

    None if the estimator is critic-free.

    Raises:
        ConfigError: RF1043, one is given beside a head on the actor's trunk.
        ModelError: RF3028, transformers has no classifier of the actor's architecture; as
            `load_critic`.
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
        policy: Any = actor
        require_classifier(type(policy.config), "memory.value_head=actor")  # its export is one
        return TrunkCritic(actor)
    if critic is None:
        directory = config.critic or config.reward.model
        if config.critic or (directory and reward is None):
            critic = load_critic(directory, dtype=compute_type(config.run))
        else:
            critic = critic_from(actor if reward is None else reward)
    critic.requires_grad_(True)
    return Critic(critic)


def critic_to_export(roles: Roles) -> nn.Module | None:
    """The critic as a classifier: with the actor's trunk if it has none of its own."""
    critic = roles.critic
    if isinstance(critic, TrunkCritic):
        return cast(nn.Module, classifier_over(critic.trunk, critic.head.score))
    return None if critic is None else critic.module


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
    end_ids: Sequence[int] | None = None,
    world: World | None = None,
) -> Roles:
    """All roles and optimizers, on `device`; modules given come before the config's directories.

    A response ends with one of `end_ids`; None: what the tokenizer and the actor's generation
    config name.

    On the ranks of `world` every model is whole or cut, as `place` says; None: this process alone.

    Raises:
        ModelError: as the loaders, and RF3023 if the tokenizers of the directories differ.
    """
    world = World(device) if world is None else world
    ranks = RankGradients.of(world)
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
        *(config, tokenizer, world),
        model=reward_model,
        model_tokenizer=reward_tokenizer,
        function=reward_function,
    )
    if config.lora.rank > 0:
        judge = reward_model if config.lora.reward_adapter else None
        refuse_modules(config, critic=critic, reward_model=judge)
        return _shared_roles(
            config, tokenizer, world, actor, reference, reward, pretraining, end_ids
        )
    if reference is None:
        reference = copy.deepcopy(actor)
        round_layer_weights(reference)
    # A critic may be a copy of the actor, which has to be whole for that.
    value_model = build_critic(config, actor, critic=critic, reward=reward_model)
    value_head = value_model.head if isinstance(value_model, TrunkCritic) else None
    view = place_generating(actor, world, config.distributed.weights, path=config.engine.path)
    if value_head is not None:
        value_head.to(device)
    policy = Actor(actor)
    engine = build_engine(config, actor, tokenizer, lambda: policy.weight_version, view, end_ids)
    actor_optimizer = build_optimizer(config, actor, "actor", value_head, ranks=ranks)
    engine.guard(actor_optimizer.optimizer)
    critic_optimizer = None
    if value_model is not None and value_head is None:
        place(value_model.module, world)
        critic_optimizer = build_optimizer(config, value_model.module, "critic", ranks=ranks)
        engine.guard(critic_optimizer.optimizer)
    optimizers = [o for o in (actor_optimizer, critic_optimizer) if o is not None]
    roles = Roles(
        actor=policy,
        reference=frozen_reference(config, reference, world),
        critic=value_model,
        reward=reward(),
        generator=engine,
        actor_optimizer=actor_optimizer,
        critic_optimizer=critic_optimizer,
        pretraining=pretraining,
        on_update=lambda: policy.bump_version(),
        scoring=engine.scoring,
        halve_rollout=engine.halve_batch,
        checkpointed={"expected_lengths": engine.expected},
        between_updates=between_updates(config, optimizers),
    )
    roles.independent = world.size == 1 and share_nothing(m for _, m in role_modules(roles))
    return roles


def _shared_roles(
    config: PPOConfig,
    tokenizer: Any,
    world: World,
    trunk: nn.Module,
    reference: nn.Module | None,
    reward: Callable[..., Reward],
    pretraining: PretrainingBatches | None,
    end_ids: Sequence[int] | None,
) -> Roles:
    """The roles of LoRA mode: `trunk` carries them all, but a reference or reward of its own."""
    ranks = RankGradients.of(world)
    shared = share_trunk(config, trunk, world, own_reference=reference is not None)
    policy, value_model = shared.actor, shared.critic
    model, version = policy.trunk.model, lambda: policy.weight_version
    engine = build_engine(config, model, tokenizer, version, shared.view, end_ids)
    actor_optimizer = guarded_optimizer(config, policy.module, "actor", ranks=ranks)
    engine.guard(actor_optimizer.optimizer)
    critic_optimizer = None
    if value_model is not None:
        critic_optimizer = guarded_optimizer(config, value_model.module, "critic", ranks=ranks)
        engine.guard(critic_optimizer.optimizer)
    optimizers = [o for o in (actor_optimizer, critic_optimizer) if o is not None]
    return Roles(
        actor=policy,
        reference=shared.reference
        if reference is None
        else frozen_reference(config, reference, world),
        critic=value_model,
        reward=reward(judge=shared.reward_model),
        generator=AdapterGenerator(engine, policy.trunk, "actor"),
        actor_optimizer=actor_optimizer,
        critic_optimizer=critic_optimizer,
        pretraining=pretraining,
        on_update=lambda: policy.bump_version(),
        scoring=engine.scoring,
        halve_rollout=engine.halve_batch,
        checkpointed={"expected_lengths": engine.expected},
        between_updates=between_updates(config, optimizers),
    )


def build_engine(
    config: PPOConfig,
    module: nn.Module,
    tokenizer: Any,
    weight_version: Callable[[], int],
    view: WeightView | None = None,
    end_ids: Sequence[int] | None = None,
) -> HybridEngine:
    """The engine that generates from the trained weights, or from a view of their shards."""
    generating = module if view is None else view.module
    named, decode = stops_of(generating, tokenizer)
    return HybridEngine(
        generating,
        eos_ids=named if end_ids is None else end_ids,
        decode=decode,
        weight_version=weight_version,
        settings=engine_settings(config.engine, config.rollout.max_batch),
        view=view,
    )


def frozen_reference(config: PPOConfig, module: nn.Module, world: World) -> Reference:
    """The reference on its ranks, or in host memory and read a layer at a time."""
    offload = config.memory.reference == "offload"
    if offload and world.shards == 1:
        return Reference(module, streamed_to=world.device)
    freeze(module)
    place(module, world, offload=offload)
    return Reference(module)
