"""`kl.estimator=exact`: the gradient it trains by, against enumeration, and what it refuses."""

import dataclasses
from typing import Any

import pytest
import torch

from rlhf_fast.config import AlgorithmConfig, KLConfig, PPOConfig, RewardConfig
from rlhf_fast.config_rules import violations
from rlhf_fast.errors import ModelError
from rlhf_fast.models.roles import Actor, Reference
from rlhf_fast.ppo.advantages import estimate
from rlhf_fast.ppo.exact_kl import require_exact_kl
from rlhf_fast.ppo.trainer import PPOLearner
from rlhf_fast.tasks.exact import BOS, COUNT, LENGTH, ExactTask, build_policy, sequences
from rlhf_fast.types import (
    PackedSequences,
    PromptBatch,
    Rollout,
    SamplingParams,
    ScoredRollout,
    VocabularyHead,
)
from tests.models.test_vocabulary import LowRank
from tests.models.tiny import build
from tests.ppo import test_exact
from tests.ppo.synthetic import learner, random_rollout, small_config
from tests.ppo.test_trainer import stepped

BETA = 0.7
EXACT = KLConfig(coef=BETA, estimator="exact")


# ---- the gradient, by enumeration of all 216 responses ------------------------------------------


def everything() -> tuple[Any, Any, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(actor, reference, log-probs [216, 3, 6] with graph, the reference's, rewards [216])."""
    actor, reference = build_policy(1).double(), build_policy(2).double()
    with torch.no_grad():
        for parameter in actor.parameters():
            parameter.mul_(2.0)  # far from the reference: the KL has something to say
    responses = sequences()
    ids = torch.cat([torch.full((COUNT, 1), BOS), responses[:, :-1]], 1)
    ours = actor(input_ids=ids).logits.log_softmax(-1)
    theirs = reference(input_ids=ids).logits.log_softmax(-1).detach()
    return actor, reference, ours, theirs, ExactTask.from_seed(1).rewards


def true_gradient() -> torch.Tensor:
    """Of E[reward] - BETA KL(actor || reference), both exact sums over responses."""
    actor, _, ours, theirs, rewards = everything()
    index = sequences()[..., None]
    chosen, ref = (x.gather(-1, index).squeeze(-1).sum(1) for x in (ours, theirs))
    objective = (chosen.exp() * (rewards - BETA * (chosen - ref))).sum()
    return _flat(torch.autograd.grad(objective, actor.parameters()))


def estimated_gradient(kl: KLConfig) -> torch.Tensor:
    """Of the policy gradient with the trainer's advantages, its expectation taken exactly."""
    actor, _, ours, theirs, rewards = everything()
    responses = sequences()
    chosen, ref = (x.gather(-1, responses[..., None]).squeeze(-1) for x in (ours, theirs))
    exact = (ours.exp() * (ours - theirs)).sum(-1).detach()
    mask = torch.ones(COUNT, LENGTH, dtype=torch.bool)
    zeros = torch.zeros(COUNT, LENGTH)
    prompts = PromptBatch(
        PackedSequences.from_lists([[BOS]] * COUNT),
        tuple(range(COUNT)),
        ({},) * COUNT,
        ("",) * COUNT,
    )
    rollout = Rollout(
        *(prompts, 1, responses, mask, torch.full((COUNT,), LENGTH), mask[:, 0], zeros),
        *(SamplingParams(LENGTH), 0),
    )
    scored = ScoredRollout(
        *(rollout, rewards.float(), mask[:, 0], chosen.detach().float(), ref.float(), zeros),
        exact_kl=exact.float() if kl.estimator == "exact" else None,
    )
    experience = estimate(
        scored,
        rewards.float(),
        kl_coef=BETA,
        bootstrap=None,
        algorithm=AlgorithmConfig(gae_lambda=1.0),
        kl=kl,
        reward=RewardConfig(),
    )
    weights = chosen.sum(1).exp().detach()
    surrogate = (weights[:, None] * experience.advantages.double() * chosen).sum()
    return _flat(torch.autograd.grad(surrogate, actor.parameters()))


def _flat(gradients: tuple[torch.Tensor, ...]) -> torch.Tensor:
    return torch.cat([g.flatten() for g in gradients])


@pytest.mark.parametrize("kl", [KLConfig(coef=BETA), EXACT])
def test_the_expected_gradient_is_that_of_the_objective(kl):
    expected = true_gradient()
    found = estimated_gradient(kl)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6 * float(expected.norm()))


def test_without_a_tokens_own_share_the_gradient_is_another(monkeypatch):
    monkeypatch.setattr(
        "rlhf_fast.ppo.advantages.own_share", lambda scored, kl: torch.zeros_like(kl)
    )
    expected, found = true_gradient(), estimated_gradient(EXACT)
    assert float((found - expected).norm() / expected.norm()) > 0.1


@pytest.mark.slow
def test_ppo_with_the_exact_kl_reaches_the_closed_form_optimum(monkeypatch):
    plain = test_exact.config_for

    def with_exact_kl(beta: float, seed: int) -> PPOConfig:
        config = plain(beta, seed)
        return dataclasses.replace(config, kl=KLConfig(coef=beta, estimator="exact"))

    monkeypatch.setattr(test_exact, "config_for", with_exact_kl)
    assert test_exact.train(0.5, 1, test_exact.STEPS * 5 // 4).gain >= 0.98


# ---- in the step --------------------------------------------------------------------------------


def test_the_step_reports_steers_by_and_rewards_with_the_exact_kl():
    kl = KLConfig(coef=0.1, estimator="exact", adaptive=True, target=1e-3, horizon=100)
    ppo, output = stepped(dataclasses.replace(small_config(), kl=kl))
    experience, metrics = output.experience, output.metrics
    exact = experience.scored.exact_kl
    assert exact is not None
    assert torch.equal(experience.kl, exact)
    assert metrics["objective/kl_exact"] == pytest.approx(float(exact.sum(1).mean()), rel=1e-5)
    assert metrics["objective/kl_exact"] != metrics["objective/kl"]
    assert metrics["objective/non_score_reward"] == pytest.approx(
        -0.1 * metrics["objective/kl_exact"]
    )
    assert float(experience.rewards.sum(1).mean()) == pytest.approx(
        metrics["objective/rlhf_reward"], abs=1e-4
    )
    assert ppo.kl_controller.coef == pytest.approx(0.1 * (1 + 0.2 * 8 / 100))


def test_the_controller_is_steered_by_the_exact_kl(monkeypatch):
    seen = []
    ppo = learner(dataclasses.replace(small_config(), kl=EXACT))
    monkeypatch.setattr(ppo.kl_controller, "update", lambda kl, n: seen.append(kl))
    rollout = random_rollout()
    monkeypatch.setattr(ppo, "generate", lambda prompts: rollout)
    monkeypatch.setattr(ppo, "_check_logprob_gap", lambda metrics: [])
    metrics = ppo.step(rollout.prompts).metrics
    assert seen == [metrics["objective/kl_exact"]]


def test_in_the_loss_it_is_no_part_of_the_scores():
    config = dataclasses.replace(small_config(), kl=dataclasses.replace(EXACT, placement="loss"))
    _, output = stepped(config)
    assert output.experience.scored.exact_kl is None
    assert "objective/kl_exact" not in output.metrics
    assert output.metrics["loss/kl_avg"] > 0


@pytest.mark.parametrize("placement", ["reward", "loss"])
def test_the_update_does_not_depend_on_the_token_budget(placement):
    rollout, results = random_rollout(), []
    for budget in (16, 4096):
        config = small_config(ppo_epochs=2, minibatches=2)
        kl = dataclasses.replace(EXACT, placement=placement)
        ppo = learner(dataclasses.replace(config, kl=kl, microbatch_tokens=budget))
        experience, _ = ppo.prepare(ppo.score(rollout))
        ppo.update(experience)
        results.append([p.detach().clone() for p in ppo.roles.actor.module.parameters()])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


# ---- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize("role", ["actor", "reference"])
@pytest.mark.parametrize("placement", ["reward", "loss"])
def test_a_head_that_is_more_than_one_map_is_refused_before_anything_is_generated(role, placement):
    ppo = learner(small_config())
    module = getattr(ppo.roles, role).module
    module.set_output_embeddings(LowRank(module.lm_head))
    config = dataclasses.replace(ppo.config, kl=dataclasses.replace(EXACT, placement=placement))
    with pytest.raises(ModelError, match="RF3026") as caught:
        PPOLearner(config, ppo.roles)
    assert role in str(caught.value)


@pytest.mark.parametrize("placement", ["reward", "loss"])
def test_an_adapter_put_on_later_is_refused_too(placement):
    config = dataclasses.replace(small_config(), kl=dataclasses.replace(EXACT, placement=placement))
    ppo = learner(config)
    rollout = random_rollout()
    experience, _ = ppo.prepare(ppo.score(rollout))
    module = ppo.roles.actor.module
    module.set_output_embeddings(LowRank(module.lm_head))
    step = {"reward": lambda: ppo.score(rollout), "loss": lambda: ppo.update(experience)}
    with pytest.raises(ModelError, match="RF3026"):
        step[placement]()


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"weight": torch.zeros(9, 4)}, "rows"),
        ({"vocab_size": 6}, "tokens"),
        ({"softcap": 30.0}, "softcap"),
        ({"scale": 2.0}, "scale"),
    ],
)
def test_heads_that_differ_are_refused(change, word):
    head = VocabularyHead(torch.zeros(8, 4))
    require_exact_kl(head, VocabularyHead(torch.zeros(8, 16), torch.zeros(8)))
    with pytest.raises(ModelError, match="RF3027") as caught:
        require_exact_kl(head, dataclasses.replace(head, **change))
    assert word in str(caught.value)


def test_models_of_two_vocabularies_are_refused():
    actor, reference = Actor(build("llama")), Reference(build("llama", vocab_size=40))
    with pytest.raises(ModelError, match="RF3027"):
        require_exact_kl(actor.vocabulary_head(), reference.vocabulary_head())


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"algorithm": AlgorithmConfig(estimator="grpo")}, "algorithm.estimator=grpo"),
        ({"algorithm": AlgorithmConfig(estimator="rloo")}, "algorithm.estimator=rloo"),
        ({"reward": RewardConfig(function="-", whiten=True)}, "reward.whiten"),
    ],
)
def test_in_the_reward_it_needs_gae_and_rewards_as_they_are(changes, word):
    config = dataclasses.replace(small_config(), kl=EXACT)
    assert violations(config) == []
    config = dataclasses.replace(config, **changes)
    assert [word in fault for fault in violations(config)] == [True]
    in_loss = dataclasses.replace(config, kl=dataclasses.replace(EXACT, placement="loss"))
    assert violations(in_loss) == []
