"""The critic as a head on the actor's trunk: one forward, the gradients of two, and it trains."""

import dataclasses

import pytest
import torch
from torch import nn

from rlhf_fast.config import KLConfig, MemoryConfig
from rlhf_fast.errors import ModelError
from rlhf_fast.models.roles import Actor, Reference, TrunkCritic
from rlhf_fast.optim import GuardedOptimizer
from rlhf_fast.ppo.layout import build_microbatch
from rlhf_fast.ppo.losses import linear_policy_loss, value_loss
from rlhf_fast.ppo.roles import Roles
from rlhf_fast.ppo.statistics import UpdateStatistics
from rlhf_fast.ppo.trainer import PPOLearner
from tests.ppo.synthetic import FixedReward, NoGenerator, random_rollout, small_config, tiny_actor

COEF = 0.5


def on_trunk(config=None, *, head_seed=None):
    config = dataclasses.replace(
        config or small_config(), memory=MemoryConfig(value_head="actor", value_coef=COEF)
    )
    actor = Actor(tiny_actor(0))
    critic = TrunkCritic(actor.module)
    if head_seed is not None:
        torch.manual_seed(head_seed)
        nn.init.normal_(critic.head.score.weight)
    optimizer = GuardedOptimizer(
        actor.module,
        config.actor_optim,
        100,
        heads={"value_head": (critic.module, config.critic_optim)},
    )
    roles = Roles(
        actor, Reference(tiny_actor(5)), critic, FixedReward(), NoGenerator(), optimizer, None
    )
    return PPOLearner(config, roles)


def forwards(ppo):
    """Counts the trunk's forwards from now on."""
    count = []
    ppo.roles.actor.module.base_model.register_forward_hook(lambda *_: count.append(1))
    return count


def experienced(ppo):
    experience, _ = ppo.prepare(ppo.score(random_rollout()))
    return experience


def whole_batch(experience):
    rollout = experience.scored.rollout
    return build_microbatch(
        experience,
        list(range(len(rollout))),
        advantages=experience.advantages,
        weights=torch.ones_like(experience.advantages),
        num_loss_tokens=int(experience.scored.loss_mask.sum()),
    )


def gradients(ppo):
    return {n: p.grad.clone() for n, p in ppo.roles.actor_optimizer.named_parameters}


@pytest.mark.parametrize("kl", [KLConfig(coef=0.1), KLConfig(coef=0.1, estimator="exact")])
def test_scoring_reads_both_from_one_forward(kl):
    ppo = on_trunk(dataclasses.replace(small_config(), kl=kl), head_seed=3)
    rollout, count = random_rollout(), forwards(ppo)
    scored = ppo.score(rollout)
    assert len(count) == 1
    separate = PPOLearner(small_config(), dataclasses.replace(ppo.roles, critic=None))
    assert torch.equal(scored.old_logprobs, separate.score(rollout).old_logprobs)
    values = ppo.roles.critic.values(rollout.sequences())
    assert float(scored.values.abs().max()) > 0
    lengths = rollout.prompt_lengths + rollout.lengths
    last = lengths.cumsum(0) - 1 - rollout.lengths  # the position before the first response token
    first = rollout.response_mask[:, 0]
    torch.testing.assert_close(scored.values[first, 0], values[last][first])


def test_one_backward_gives_the_gradients_of_two():
    ppo = on_trunk(head_seed=3)
    experience = experienced(ppo)
    microbatch, count = whole_batch(experience), forwards(ppo)
    ppo._backward([microbatch], UpdateStatistics())
    assert len(count) == 1
    joint = gradients(ppo)
    ppo.roles.actor_optimizer.zero_grad()

    actor, critic, config = ppo.roles.actor, ppo.roles.critic, ppo.config
    actor.module.double()
    critic.module.double()
    policy = linear_policy_loss(
        *(microbatch, actor.head_rows(microbatch.sequences), None),
        temperature=1.0,
        algorithm=config.algorithm,
        kl=config.kl,
        kl_coef=config.kl.coef,
    )
    policy.loss.backward()
    values = critic.values(microbatch.sequences)
    (COEF * value_loss(microbatch, values, algorithm=config.algorithm).loss).backward()
    for name, expected in gradients(ppo).items():
        scale = float(expected.abs().max())
        torch.testing.assert_close(joint[name].double(), expected, rtol=1e-4, atol=2e-5 * scale)
    assert float(joint["value_head.score.weight"].abs().max()) > 0


def test_the_value_loss_falls_and_moves_the_trunk_at_its_own_rate():
    config = small_config(ppo_epochs=12, value_clip_eps=0.0)
    rate = dataclasses.replace(config.critic_optim, lr=3e-2)
    ppo = on_trunk(dataclasses.replace(config, critic_optim=rate))
    experience = experienced(ppo)
    assert not experience.scored.values.any()  # an untrained head is the baseline 0
    losses = []
    for _ in range(3):
        metrics = ppo.update(experience)
        losses.append(metrics["loss/value_avg"])
    assert losses[2] < 0.7 * losses[0]
    assert (metrics["lr"], metrics["lr_value"]) == (1e-3, 3e-2)
    assert metrics["value/grad_norm"] == metrics["policy/grad_norm"] > 0


def test_the_bootstrap_is_the_heads_value_of_the_last_state():
    ppo = on_trunk(small_config(bootstrap_truncated=True), head_seed=3)
    rollout = random_rollout()
    found = ppo._bootstrap(rollout)
    ends = (rollout.prompt_lengths + rollout.lengths).cumsum(0) - 1
    with torch.no_grad():
        expected = ppo.roles.critic.values(rollout.sequences())[ends]
    torch.testing.assert_close(found, torch.where(rollout.ended, 0.0, expected))


def test_an_actor_without_a_linear_head_is_refused():
    ppo = on_trunk()
    ppo.roles.actor.module.lm_head.register_forward_hook(lambda *_: None)
    with pytest.raises(ModelError, match="RF3071"):
        PPOLearner(ppo.config, ppo.roles)
