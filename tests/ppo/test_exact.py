"""The microscope: PPO must find the closed-form optimum of the KL-regularised objective.

A sign or off-by-one error anywhere in GAE, KL, masks or log-probs fails it.
"""

import pytest
import torch
from transformers import LlamaForSequenceClassification

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
from rlhf_fast.engine.generator import HFGenerator
from rlhf_fast.models.roles import Actor, Critic, Reference
from rlhf_fast.optim import GuardedOptimizer
from rlhf_fast.ppo.trainer import PPOLearner, Roles
from rlhf_fast.protocols import RewardOutput
from rlhf_fast.tasks.exact import BOS, LENGTH, ExactTask, build_policy, policy_logprobs
from rlhf_fast.types import PackedSequences, PromptBatch, Rollout

PROMPTS = 512
STEPS = 120


class TaskReward:
    """The task's reward table as `protocols.Reward`."""

    def __init__(self, task: ExactTask) -> None:
        self.task = task

    def score(self, rollout: Rollout) -> RewardOutput:
        return RewardOutput(
            self.task.score(rollout.responses), torch.ones(len(rollout), dtype=torch.bool)
        )


def config_for(beta: float, seed: int) -> PPOConfig:
    return PPOConfig(
        run=RunConfig(seed=seed),
        rollout=RolloutConfig(prompts=PROMPTS, max_batch=PROMPTS),
        sampling=SamplingConfig(max_new_tokens=LENGTH),
        # The reward enters as it is: any shaping would move the optimum.
        reward=RewardConfig(normalize=False, clip=0.0, missing_eos="none", function="-"),
        kl=KLConfig(coef=beta),
        algorithm=AlgorithmConfig(ppo_epochs=4, minibatches=4),
        actor_optim=OptimConfig(lr=1e-2, schedule="linear"),
        critic_optim=OptimConfig(lr=1e-2, schedule="linear"),
        microbatch_tokens=1 << 20,
        total_steps=STEPS,
    )


def build_critic(seed: int) -> Critic:
    policy = build_policy(seed)
    config = type(policy.config)(**{**policy.config.to_dict(), "num_labels": 1, "pad_token_id": 0})
    module = LlamaForSequenceClassification(config)
    module.model.load_state_dict(policy.model.state_dict())
    torch.nn.init.zeros_(module.score.weight)
    return Critic(module)


def train(beta: float, seed: int) -> tuple[ExactTask, torch.Tensor, torch.Tensor]:
    config, task = config_for(beta, seed), ExactTask.from_seed(seed)
    actor, critic = Actor(build_policy(seed)), build_critic(seed + 1)
    steps = STEPS * config.algorithm.ppo_epochs * config.algorithm.minibatches
    learner = PPOLearner(
        config,
        Roles(
            actor=actor,
            reference=Reference(build_policy(seed)),
            critic=critic,
            reward=TaskReward(task),
            generator=HFGenerator(
                actor.module,
                eos_ids=(),
                weight_version=lambda: actor.weight_version,
                max_batch=PROMPTS,
            ),
            actor_optimizer=GuardedOptimizer(actor.module, config.actor_optim, steps),
            critic_optimizer=GuardedOptimizer(critic.module, config.critic_optim, steps),
            on_update=lambda: actor.bump_version(),
        ),
    )
    prompts = PromptBatch(
        PackedSequences.from_lists([[BOS]] * PROMPTS),
        tuple(range(PROMPTS)),
        tuple({} for _ in range(PROMPTS)),
        ("",) * PROMPTS,
    )
    for _ in range(STEPS):
        learner.step(prompts)
    return task, policy_logprobs(actor.module), policy_logprobs(build_policy(seed))


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("beta", [1.0, 0.5, 0.25])
def test_ppo_reaches_the_closed_form_optimum(beta: float, seed: int):
    summary = task_summary(beta, seed)
    assert summary.gain >= 0.98, summary


def task_summary(beta: float, seed: int):
    task, trained, reference = train(beta, seed)
    return task.summary(trained, reference, beta)
