"""A rollout of random tokens over a tiny model, for tests of layout and invariance."""

from __future__ import annotations

import dataclasses

import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from rlhf_fast.config import (
    AlgorithmConfig,
    KLConfig,
    OptimConfig,
    PPOConfig,
    RewardConfig,
    RolloutConfig,
    RunConfig,
    SamplingConfig,
)
from rlhf_fast.models.roles import Actor, Critic, Reference
from rlhf_fast.optim import GuardedOptimizer
from rlhf_fast.ppo.roles import Roles
from rlhf_fast.ppo.trainer import PPOLearner
from rlhf_fast.protocols import RewardOutput
from rlhf_fast.types import PackedSequences, PromptBatch, Rollout, SamplingParams, ScoredRollout

VOCAB = 23


def tiny_config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        initializer_range=0.3,
        num_labels=1,
        pad_token_id=0,
    )


def tiny_actor(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(tiny_config())


def tiny_critic(seed: int = 1) -> LlamaForSequenceClassification:
    torch.manual_seed(seed)
    return LlamaForSequenceClassification(tiny_config())


def random_rollout(
    prompts: int = 4,
    group: int = 2,
    columns: int = 7,
    *,
    seed: int = 0,
    holes: bool = True,
    extra_columns: int = 0,
) -> Rollout:
    """Ragged prompts of 1 to 5 tokens and responses of 1 to `columns` tokens."""
    generator = torch.Generator().manual_seed(seed)
    samples = prompts * group

    def ints(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=generator)

    lists = [ints(1, VOCAB, int(ints(1, 6, 1))).tolist() for _ in range(prompts)]
    lengths = ints(1, columns + 1, samples)
    inside = torch.arange(columns) < lengths[:, None]
    responses = torch.where(inside, ints(1, VOCAB, samples, columns), 0)
    mask = inside.clone()
    if holes:
        keep = torch.rand(samples, columns, generator=generator) > 0.3
        keep[torch.arange(samples), lengths - 1] = True
        mask &= keep
    pad = (0, extra_columns)
    return Rollout(
        prompts=PromptBatch(
            PackedSequences.from_lists(lists),
            tuple(range(prompts)),
            tuple({} for _ in range(prompts)),
            ("",) * prompts,
        ),
        samples_per_prompt=group,
        responses=torch.nn.functional.pad(responses, pad),
        response_mask=torch.nn.functional.pad(mask, pad),
        lengths=lengths,
        ended=torch.rand(samples, generator=generator) > 0.3,
        rollout_logprobs=torch.zeros(samples, columns + extra_columns),
        sampling=SamplingParams(max_new_tokens=columns),
        weight_version=0,
    )


class FixedReward:
    """Scores that depend on the tokens of a response alone."""

    def score(self, rollout: Rollout) -> RewardOutput:
        scores = [float(sum(ids) % 7) - 3.0 for ids in rollout.response_ids()]
        return RewardOutput(torch.tensor(scores), torch.ones(len(scores), dtype=torch.bool))


class NoGenerator:
    """The tests below start from a given rollout."""

    def generate(self, *args: object, **kwargs: object) -> Rollout:
        raise AssertionError("this test does not generate")


def small_config(**algorithm: object) -> PPOConfig:
    return PPOConfig(
        run=RunConfig(seed=3),
        rollout=RolloutConfig(prompts=4, samples_per_prompt=2),
        sampling=SamplingConfig(max_new_tokens=7),
        reward=RewardConfig(function="-", missing_eos="none"),
        kl=KLConfig(coef=0.1),
        algorithm=AlgorithmConfig(**{"ppo_epochs": 1, **algorithm}),
        actor_optim=OptimConfig(lr=1e-3, max_grad_norm=0.0, schedule="constant"),
        critic_optim=OptimConfig(lr=1e-3, max_grad_norm=0.0, schedule="constant"),
        microbatch_tokens=4096,
    )


def learner(config: PPOConfig, *, reference_seed: int = 5) -> PPOLearner:
    """A learner of fixed weights; equal arguments give equal weights."""
    actor = Actor(tiny_actor(0))
    critic = Critic(tiny_critic(1)) if config.algorithm.estimator == "gae" else None
    return PPOLearner(
        config,
        Roles(
            actor=actor,
            reference=Reference(tiny_actor(reference_seed)),
            critic=critic,
            reward=FixedReward(),
            generator=NoGenerator(),
            actor_optimizer=GuardedOptimizer(actor.module, config.actor_optim, 100),
            critic_optimizer=GuardedOptimizer(critic.module, config.critic_optim, 100)
            if critic
            else None,
            on_update=lambda: actor.bump_version(),
        ),
    )


def with_rollout_logprobs(scored: ScoredRollout, values: torch.Tensor) -> ScoredRollout:
    return dataclasses.replace(
        scored, rollout=dataclasses.replace(scored.rollout, rollout_logprobs=values)
    )
