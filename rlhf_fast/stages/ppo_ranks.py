"""PPO's roles on several ranks: the work dealt, the results told to all."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

from rlhf_fast.config import PPOConfig
from rlhf_fast.distributed.sharding import forget_forwards, start_anew
from rlhf_fast.distributed.work import WorldSplit
from rlhf_fast.distributed.world import World
from rlhf_fast.engine.dealt_generator import DealtGenerator
from rlhf_fast.models.rewards import SumReward
from rlhf_fast.ppo.roles import Roles
from rlhf_fast.ppo.split_rewards import DealtReward, OneRankReward
from rlhf_fast.protocols import Reward, SampleReward
from rlhf_fast.stages.generation import engine_of
from rlhf_fast.stages.ppo_checks import role_modules
from rlhf_fast.stages.shared_roles import shared_trunk


def roles_on_ranks(roles: Roles, config: PPOConfig, world: World) -> Roles:
    """The roles of this rank, as those of all ranks together; one rank keeps its own."""
    if world.size == 1:
        return roles
    split = WorldSplit(world)
    trunk = shared_trunk(roles)
    read = [module for _, module in role_modules(roles)] + ([] if trunk is None else [trunk.model])

    @contextmanager
    def scoring() -> Iterator[None]:
        with roles.scoring():
            yield
        for module in read:
            forget_forwards(module)

    def anew() -> None:
        for module in read:
            start_anew(module)

    return replace(
        roles,
        start_anew=anew,
        split=split,
        scoring=scoring,
        reward=shared_reward(roles.reward, world, config.microbatch_tokens, anew),
        generator=DealtGenerator(roles.generator, world, engine_of(roles.generator)),
    )


def shared_reward(
    reward: Reward, world: World, token_budget: int, start_anew: Callable[[], object]
) -> Reward:
    """A reward that all ranks ask together: models read their share, functions run on rank 0."""
    split = WorldSplit(world)
    if isinstance(reward, SumReward):
        parts = [
            (weight, shared_reward(part, world, token_budget, start_anew))
            for weight, part in reward.parts
        ]
        return SumReward(parts)
    if isinstance(reward, SampleReward) and reward.splits:
        return DealtReward(reward, split, token_budget=token_budget, start_anew=start_anew)
    return OneRankReward(reward, split, world.board.note)
