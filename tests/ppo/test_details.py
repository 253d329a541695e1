"""Details of the PPO step that only show in the step itself; docs/ppo_details.md names them."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import nn

from rlhf_fast.config import OptimConfig
from rlhf_fast.errors import NumericalError
from rlhf_fast.optim import GuardedOptimizer
from rlhf_fast.ppo.advantages import estimate, importance_weights, whitened
from rlhf_fast.ppo.statistics import UpdateStatistics, rollout_metrics
from rlhf_fast.types import Experience, LossOutput
from rlhf_fast_kernels import gae
from tests.ppo.synthetic import learner, random_rollout, small_config, with_rollout_logprobs


def prepared(config=None):
    trainer = learner(config or small_config())
    experience, shaped = trainer.prepare(trainer.score(random_rollout()))
    return trainer, experience, shaped


def estimated(scored, config):
    return estimate(
        scored,
        scored.scores,
        kl_coef=config.kl.coef,
        bootstrap=None,
        algorithm=config.algorithm,
        kl=config.kl,
        reward=config.reward,
    )


def test_reward_whitening_keeps_the_mean_and_comes_before_gae():
    config = small_config()
    config = dataclasses.replace(config, reward=dataclasses.replace(config.reward, whiten=True))
    _, experience, _ = prepared()
    scored, mask = experience.scored, experience.scored.loss_mask
    plain = estimated(scored, small_config()).rewards
    found = estimated(scored, config)
    inside = plain[mask].double()
    expected = (inside - inside.mean()) / (inside.var(unbiased=False) + 1e-8).sqrt()
    torch.testing.assert_close(
        found.rewards[mask].double(), expected + inside.mean(), rtol=1e-5, atol=1e-5
    )
    advantages, _ = gae(found.rewards, scored.values, mask, gamma=1.0, gae_lambda=0.95)
    torch.testing.assert_close(found.advantages, advantages)


def test_returns_are_values_plus_advantages_before_whitening():
    _, experience, _ = prepared()
    mask, values = experience.scored.loss_mask, experience.scored.values
    torch.testing.assert_close(
        experience.returns[mask], (values + experience.advantages)[mask], rtol=1e-6, atol=1e-6
    )
    white = whitened(experience.advantages, mask, unbiased=False)
    assert abs(float(white[mask].mean())) < 1e-5
    assert abs(float(white[mask].std(unbiased=False)) - 1) < 1e-4


def test_a_step_with_a_gradient_that_is_not_finite_changes_nothing_and_is_counted():
    module = nn.Linear(3, 2)
    optimizer = GuardedOptimizer(module, OptimConfig(lr=0.1), 10, max_bad_steps=2)
    before = [p.detach().clone() for p in module.parameters()]
    module(torch.ones(1, 3)).sum().mul(math.nan).backward()
    assert not optimizer.step().applied
    assert all(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))
    module(torch.ones(1, 3)).sum().backward()
    assert optimizer.step().applied
    assert optimizer.bad_steps == 0
    for attempt in range(2):
        module(torch.ones(1, 3)).sum().mul(math.inf).backward()
        if attempt == 0:
            optimizer.step()
    with pytest.raises(NumericalError, match="RF6001"):
        optimizer.step()


def test_gradient_is_clipped_on_the_norm_over_all_parameters():
    module = nn.Linear(4, 4)
    optimizer = GuardedOptimizer(module, OptimConfig(lr=1.0, max_grad_norm=0.5), 10)
    seen = []

    def note(*_):
        seen.append(math.sqrt(sum(float(p.grad.square().sum()) for p in module.parameters())))

    optimizer.optimizer.register_step_pre_hook(note)
    (module(torch.ones(1, 4)).sum() * 100).backward()
    norm = math.sqrt(sum(float(p.grad.square().sum()) for p in module.parameters()))
    assert optimizer.step().grad_norm == pytest.approx(norm, rel=1e-5)
    assert seen == [pytest.approx(0.5, rel=1e-3)]


def test_rollout_metrics_follow_their_definitions():
    config = small_config()
    _, experience, shaped = prepared(config)
    scored, mask = experience.scored, experience.scored.loss_mask
    found = rollout_metrics(experience, shaped, kl_coef=0.1)
    ratio = (scored.old_logprobs - scored.ref_logprobs).double()
    kl = torch.where(mask, ratio, 0).sum(1)
    assert found["objective/kl"] == pytest.approx(float(kl.mean()), rel=1e-5)
    k3 = torch.where(mask, (-ratio).exp() - 1 + ratio, 0).sum(1).mean()
    assert found["objective/kl_k3"] == pytest.approx(float(k3), rel=1e-4)
    assert found["objective/non_score_reward"] == pytest.approx(-0.1 * float(kl.mean()), rel=1e-5)
    assert found["objective/rlhf_reward"] == pytest.approx(
        float(shaped.mean()) - 0.1 * float(kl.mean()), rel=1e-5
    )
    assert found["objective/scores"] == pytest.approx(float(scored.scores.mean()))
    lengths = scored.rollout.lengths.double()
    expected = torch.corrcoef(torch.stack([scored.scores.double(), lengths]))[0, 1]
    assert found["rollout/score_length_correlation"] == pytest.approx(float(expected), rel=1e-5)


def test_explained_variance_is_one_minus_the_variance_left():
    returns, values = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([1.5, 2.0, 3.0])
    residual = returns - values
    statistics = UpdateStatistics()
    statistics.begin_minibatch()
    names = ("value_tokens", "value_loss", "value_clip")
    sums = {name: torch.zeros(()) for name in names} | {"value_tokens": torch.tensor(3.0)}
    for name, x in (("returns", returns), ("residual", residual)):
        sums[name], sums[f"{name}_squared"] = x.sum(), x.square().sum()
    statistics.add(LossOutput(torch.zeros(()), sums))
    expected = 1 - residual.var(unbiased=False) / returns.var(unbiased=False)
    found = statistics.finalize(early_stop=False)["val/explained_variance"]
    assert found == pytest.approx(float(expected), rel=1e-5)


def test_every_epoch_has_its_own_permutation_and_each_minibatch_one_optimizer_step():
    config = small_config(ppo_epochs=3, minibatches=4)
    trainer, experience, _ = prepared(config)
    epochs = [list(trainer._minibatches(8, epoch)) for epoch in range(3)]
    for minibatches in epochs:
        assert [len(m) for m in minibatches] == [2, 2, 2, 2]
        assert sorted(s for m in minibatches for s in m) == list(range(8))
    assert len({str(e) for e in epochs}) == 3
    assert trainer.update(experience)["policy/optimizer_steps"] == 12


def test_bootstrap_is_the_value_after_truncated_rows_only():
    trainer, experience, _ = prepared(small_config(bootstrap_truncated=True))
    rollout = experience.scored.rollout
    found = trainer._bootstrap(rollout)
    assert 0 < int(rollout.ended.sum()) < len(rollout)
    ids = rollout.sequences()
    for s, ended in enumerate(rollout.ended.tolist()):
        with torch.no_grad():
            expected = trainer.roles.critic.values(ids.select([s]))[-1]
        torch.testing.assert_close(found[s], torch.zeros(()) if ended else expected)
    without, _, _ = prepared(small_config(bootstrap_truncated=False))
    assert without._bootstrap(rollout) is None


def test_importance_weights_are_capped_and_finite():
    scored = prepared(small_config())[1].scored
    shift = torch.linspace(-200.0, 200.0, scored.old_logprobs.numel()).view_as(scored.old_logprobs)
    shifted = with_rollout_logprobs(scored, scored.old_logprobs - shift)
    assert bool((importance_weights(shifted, 0.0) == 1).all())
    weights = importance_weights(shifted, 2.0)
    expected = shift.clamp(-20, 20).exp().clamp(max=2.0)
    mask = scored.loss_mask
    torch.testing.assert_close(weights[mask], expected[mask], rtol=1e-4, atol=1e-9)
    assert bool((weights[~mask] == 1).all())


def test_target_kl_ends_the_epochs_before_the_step_that_would_exceed_it():
    config = small_config(ppo_epochs=4)
    trainer, experience, _ = prepared(config)
    full = trainer.update(experience)
    assert full["policy/early_stop"] == 0
    assert full["policy/optimizer_steps"] == 4

    config = small_config(ppo_epochs=4, target_kl=1e-12)
    trainer, experience, _ = prepared(config)
    stopped = trainer.update(experience)
    assert stopped["policy/early_stop"] == 1
    assert stopped["policy/optimizer_steps"] == 1
    assert all(p.grad is None for p in trainer.roles.actor.module.parameters())


@pytest.mark.parametrize("estimator", ["gae", "rloo"])
def test_an_update_that_target_kl_ends_at_once_has_the_columns_of_any_other(monkeypatch, estimator):
    config = small_config(estimator=estimator, target_kl=0.1)
    trainer, experience, _ = prepared(config)
    full = trainer.update(experience)
    monkeypatch.setattr(UpdateStatistics, "minibatch_kl", lambda self: 1.0)
    stopped = trainer.update(experience)
    assert stopped["policy/early_stop"] == 1
    assert set(full) - set(stopped) == ({"lr", "lr_value"} if estimator == "gae" else {"lr"})
    assert stopped.keys() <= full.keys()
    for name in ("optimizer_steps", "grad_norm", "skipped_steps"):
        assert stopped[f"policy/{name}"] == 0
    assert all(math.isfinite(value) for value in stopped.values())


def test_generator_and_trainer_that_disagree_stop_the_run():
    trainer, experience, shaped = prepared()
    scored = experience.scored
    for gap, fatal in ((0.5, False), (2.0, True)):
        moved = with_rollout_logprobs(scored, scored.old_logprobs + gap)
        parts = {f.name: getattr(experience, f.name) for f in dataclasses.fields(Experience)}
        metrics = rollout_metrics(Experience(**parts | {"scored": moved}), shaped, kl_coef=0.1)
        assert metrics["rollout/logprob_gap"] == pytest.approx(gap, rel=1e-4)
        if fatal:
            with pytest.raises(NumericalError, match="RF6002"):
                trainer._check_logprob_gap(metrics)
        else:
            assert trainer._check_logprob_gap(metrics)
