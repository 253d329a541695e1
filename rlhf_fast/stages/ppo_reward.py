"""The reward of PPO: a model, a function, or both."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

from rlhf_fast.config import PPOConfig
from rlhf_fast.distributed.world import World
from rlhf_fast.errors import ConfigError
from rlhf_fast.models.loading import (
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
from rlhf_fast.models.roles import RewardModel, freeze
from rlhf_fast.protocols import Reward
from rlhf_fast.stages.placing import place
from rlhf_fast.stages.training import compute_type


def build_reward(
    config: PPOConfig,
    tokenizer: Any,
    world: World,
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
        if offload and world.shards == 1:
            judge = RewardModel(model, streamed_to=world.device)
        else:
            freeze(model)
            place(model, world, offload=offload)
            judge = RewardModel(model)
    if judge is not None:
        own = tokenizer if model_tokenizer is None else model_tokenizer
        # Ranks are dealt packs, each one forward, however long they are in the judge's tokens.
        budget = config.microbatch_tokens if world.size == 1 else sys.maxsize
        parts.append((1.0, ModelReward(judge, tokenizer, own, token_budget=budget)))
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
