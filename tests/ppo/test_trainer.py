"""The PPO step: what each setting does, and what must hold in every step."""

import dataclasses

import pytest
import torch

from rlhf_fast.config import KLConfig, PtxConfig
from rlhf_fast.ppo.pretraining import PretrainingBatch
from rlhf_fast.ppo.statistics import rollout_metrics
from rlhf_fast.protocols import RewardOutput
from rlhf_fast.types import IGNORE_INDEX, PackedSequences
from tests.ppo.synthetic import learner, random_rollout, small_config, with_rollout_logprobs


class GivenRollout:
    """Hands out a rollout whose generator log-probs are what the trainer will find, plus `gap`."""

    def __init__(self, ppo, rollout, gap=0.0):
        scored = ppo.score(rollout)
        logprobs = torch.where(rollout.response_mask, scored.old_logprobs - gap, 0.0)
        self.rollout = with_rollout_logprobs(scored, logprobs).rollout

    def generate(self, *args, **kwargs):
        return self.rollout


def stepped(config, *, gap=0.0, rollout=None, reward=None, pretraining=None):
    """(learner, StepOutput) after one whole step."""
    ppo = learner(config)
    ppo.roles.generator = GivenRollout(ppo, rollout or random_rollout(), gap)
    if reward is not None:
        ppo.roles.reward = reward
    ppo.roles.pretraining = pretraining
    return ppo, ppo.step(ppo.roles.generator.rollout.prompts)


def weights(ppo):
    return torch.cat([p.detach().flatten() for p in ppo.roles.actor.module.parameters()])


@pytest.mark.parametrize(("epochs", "minibatches"), [(1, 1), (3, 1), (2, 4)])
def test_optimizer_steps_are_epochs_times_minibatches(epochs, minibatches):
    ppo, output = stepped(small_config(ppo_epochs=epochs, minibatches=minibatches))
    assert output.metrics["policy/optimizer_steps"] == epochs * minibatches
    assert ppo.roles.actor.weight_version == epochs * minibatches
    assert ppo.episodes == 8


@pytest.mark.parametrize("estimator", ["rloo", "grpo"])
def test_critic_free_estimators_train_without_a_critic(estimator):
    before = weights(learner(small_config(estimator=estimator)))
    ppo, output = stepped(small_config(estimator=estimator))
    assert ppo.roles.critic is None
    assert "loss/value_avg" not in output.metrics
    assert not torch.equal(weights(ppo), before)
    assert torch.all(output.experience.scored.values == 0)
    advantages = output.experience.advantages
    mask = output.experience.scored.loss_mask
    for row, inside in zip(advantages, mask, strict=True):
        assert row[inside].unique().numel() <= 1  # one advantage for the whole response


def test_kl_is_in_the_reward_or_in_the_loss_never_both():
    rollout = random_rollout()
    in_reward, reward_output = stepped(small_config(), rollout=rollout)
    config = dataclasses.replace(small_config(), kl=KLConfig(coef=0.1, placement="loss"))
    in_loss, loss_output = stepped(config, rollout=rollout)
    rewards = loss_output.experience.rewards
    last = rollout.response_mask & (rollout.response_mask.flip(1).cumsum(1).flip(1) == 1)
    assert torch.all(rewards[~last] == 0)
    assert torch.any(reward_output.experience.rewards[rollout.response_mask & ~last] != 0)
    assert loss_output.metrics["objective/kl"] == pytest.approx(
        reward_output.metrics["objective/kl"]
    )
    assert not torch.equal(weights(in_reward), weights(in_loss))


def test_adaptive_coefficient_moves_after_the_step_and_is_in_the_state():
    config = dataclasses.replace(
        small_config(), kl=KLConfig(coef=0.1, adaptive=True, target=1e-3, horizon=100)
    )
    ppo, output = stepped(config)
    assert ppo.kl_controller.coef == pytest.approx(0.1 * (1 + 0.2 * 8 / 100))
    assert output.metrics["kl_coef"] == ppo.kl_controller.coef
    other = learner(config)
    other.load_state_dict(ppo.state_dict())
    assert other.state_dict() == ppo.state_dict()
    assert other.score_moments.mean == ppo.score_moments.mean


def test_non_score_reward_and_rlhf_reward_add_up():
    _, output = stepped(small_config())
    m = output.metrics
    assert m["objective/non_score_reward"] == pytest.approx(-0.1 * m["objective/kl"])
    assert m["objective/rlhf_reward"] == pytest.approx(
        m["objective/shaped_scores"] + m["objective/non_score_reward"]
    )
    # What GAE saw sums to the same.
    rewards = output.experience.rewards.sum(1).mean()
    assert float(rewards) == pytest.approx(m["objective/rlhf_reward"], abs=1e-5)


class Abstains:
    def __init__(self, rows):
        self.rows = rows

    def score(self, rollout):
        scored = torch.ones(len(rollout), dtype=torch.bool)
        scored[self.rows] = False
        return RewardOutput(torch.where(scored, 1.0, 0.0) * torch.arange(len(rollout)), scored)


def test_abstained_rows_change_nothing_but_the_token_count():
    rollout = random_rollout()
    _, output = stepped(small_config(), rollout=rollout, reward=Abstains([1, 5]))
    experience = output.experience
    for name in ("rewards", "kl", "advantages", "returns"):
        assert torch.all(getattr(experience, name)[[1, 5]] == 0)
    assert output.metrics["rollout/scored_fraction"] == 6 / 8


def test_a_batch_in_which_every_row_abstains_leaves_the_weights_alone():
    before = weights(learner(small_config()))
    ppo, output = stepped(small_config(), reward=Abstains(list(range(8))))
    assert torch.equal(weights(ppo), before)
    assert output.metrics["loss/policy_avg"] == 0
    assert output.metrics["objective/kl"] == 0


@pytest.mark.parametrize("minibatches", [1, 4])
def test_moments_of_earlier_steps_move_nothing_when_every_row_abstains(minibatches):
    ppo, _ = stepped(small_config(ppo_epochs=2, minibatches=minibatches))
    critic = ppo.roles.critic.module

    def everything():
        return torch.cat([weights(ppo), *(p.detach().flatten() for p in critic.parameters())])

    before, scheduled = everything(), ppo.roles.actor_optimizer.scheduler.last_epoch
    ppo.roles.generator = GivenRollout(ppo, random_rollout())
    ppo.roles.reward = Abstains(list(range(8)))
    output = ppo.step(ppo.roles.generator.rollout.prompts)
    assert torch.equal(everything(), before)
    assert ppo.roles.actor_optimizer.scheduler.last_epoch == scheduled + 2 * minibatches
    assert output.metrics["policy/grad_norm"] == 0


def test_pretraining_texts_train_the_actor_alone_when_every_row_abstains():
    ppo, _ = stepped(small_config())
    critic = [p.detach().clone() for p in ppo.roles.critic.module.parameters()]
    before = weights(ppo)
    ppo.roles.generator = GivenRollout(ppo, random_rollout())
    ppo.roles.reward, ppo.roles.pretraining = Abstains(list(range(8))), OnePretrainingBatch()
    ppo.config = dataclasses.replace(ppo.config, ptx=PtxConfig(coef=1.0, data="-"))
    ppo.step(ppo.roles.generator.rollout.prompts)
    assert not torch.equal(weights(ppo), before)
    pairs = zip(ppo.roles.critic.module.parameters(), critic, strict=True)
    assert all(torch.equal(now, then) for now, then in pairs)


class OnePretrainingBatch:
    def next_batch(self):
        sequences = PackedSequences.from_lists([[1, 2, 3, 4], [5, 6]])
        targets = torch.tensor([2, 3, 4, IGNORE_INDEX, 6, IGNORE_INDEX])
        return PretrainingBatch(4, lambda tokens: [(sequences, targets)])


def test_ptx_adds_coef_times_the_gradient_of_the_mean_cross_entropy():
    config = small_config()
    config = dataclasses.replace(config, ptx=dataclasses.replace(config.ptx, coef=2.0, data="-"))
    ppo = learner(config)
    batch = OnePretrainingBatch().next_batch()
    loss = batch.backward(ppo.roles.actor, budget=64, coef=ppo.config.ptx.coef)
    module = ppo.roles.actor.module
    found = [p.grad.clone() for p in module.parameters()]
    module.zero_grad()
    logits = module(input_ids=torch.tensor([[1, 2, 3, 4]])).logits[0, :3]
    other = module(input_ids=torch.tensor([[5, 6]])).logits[0, :1]
    expected = torch.nn.functional.cross_entropy(
        torch.cat([logits, other]), torch.tensor([2, 3, 4, 6])
    )
    (2.0 * expected).backward()
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    for ours, theirs in zip(found, module.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs.grad, rtol=1e-4, atol=1e-6)
    _, output = stepped(config, pretraining=OnePretrainingBatch())
    assert output.metrics["loss/ptx_avg"] == pytest.approx(loss, rel=1e-4)


def test_metrics_ignore_what_is_masked():
    ppo = learner(small_config())
    experience, shaped = ppo.prepare(ppo.score(random_rollout()))
    clean = rollout_metrics(experience, shaped, kl_coef=0.1)
    scored = experience.scored
    outside = ~scored.rollout.response_mask
    dirty = dataclasses.replace(
        experience,
        scored=dataclasses.replace(
            scored,
            old_logprobs=scored.old_logprobs.masked_fill(outside, float("nan")),
            ref_logprobs=scored.ref_logprobs.masked_fill(outside, float("inf")),
        ),
    )
    assert rollout_metrics(dirty, shaped, kl_coef=0.1) == clean


def test_minibatch_whitening_differs_from_batch_whitening():
    results = []
    for scope in ("batch", "minibatch"):
        ppo, _ = stepped(small_config(minibatches=2, whiten_scope=scope))
        results.append(weights(ppo))
    assert not torch.allclose(results[0], results[1], atol=1e-7)
