"""Log-probs of the generator as anchors: the gate, the importance weight, what is saved."""

import dataclasses

import pytest
import torch

from rlhf_fast.config import KLConfig, MemoryConfig
from rlhf_fast.config_rules import violations
from rlhf_fast.ppo.advantages import importance_weights
from rlhf_fast.ppo.anchors import CHECKED_AT_LEAST, checked_samples, logprob_gap, ratio_cap
from rlhf_fast.ppo.layout import build_microbatch
from rlhf_fast.ppo.statistics import UpdateStatistics
from tests.ppo.synthetic import learner, random_rollout, small_config, with_rollout_logprobs
from tests.ppo.test_trainer import GivenRollout

ANCHORED = {"old_logprobs": "rollout", "rollout_correction": 2.0}
SIZES = {"prompts": 16, "group": 2}


def generated(gap=0.0, *, seed=0):
    """A rollout whose generator log-probs are the trainer's plus normal noise of this size."""
    rollout = random_rollout(**SIZES, seed=seed)
    scored = learner(small_config()).score(rollout)
    noise = torch.randn(rollout.responses.shape, generator=torch.Generator().manual_seed(9))
    logprobs = torch.where(rollout.response_mask, scored.old_logprobs + gap * noise, 0.0)
    return with_rollout_logprobs(scored, logprobs)


def test_which_samples_are_checked_is_drawn_from_the_seed_alone():
    assert checked_samples(5, 1, 2) == [0, 1, 2, 3, 4]
    few, many = checked_samples(100, 1, 2), checked_samples(1000, 1, 2)
    assert (len(few), len(many)) == (CHECKED_AT_LEAST, 63)
    assert few == checked_samples(100, 1, 2) == sorted(set(few))
    assert few != checked_samples(100, 1, 3)


def test_the_gap_is_the_kl_of_generator_and_trainer_by_enumeration():
    g = torch.Generator().manual_seed(0)
    mu, pi = torch.randn(2, 11, generator=g, dtype=torch.float64).log_softmax(-1)
    divergence = float((mu.exp() * (mu - pi)).sum())
    each = [
        logprob_gap(pi[v].view(1, 1), mu[v].view(1, 1), torch.ones(1, 1, dtype=torch.bool))
        for v in range(11)
    ]
    assert all(gap.k3 >= 0 for gap in each)
    mean = sum(float(mu[v].exp()) * gap.k3 for v, gap in enumerate(each))
    assert mean == pytest.approx(divergence, rel=1e-12)
    mask = torch.tensor([[True, False], [False, False]])
    values = torch.tensor([[-1.0, float("nan")], [float("nan"), 0.0]])
    gap = logprob_gap(values, values - 0.5, mask)
    assert (gap.samples, gap.absolute) == (2, 0.5)
    assert logprob_gap(values, values, torch.zeros_like(mask)).k3 == 0
    assert not logprob_gap(values, values, torch.ones_like(mask)).k3 <= 1.0  # NaN passes no gate


def read_by_actor(ppo):
    """How many sequences each forward of the actor reads, from now on."""
    counts = []
    logprobs = ppo.roles.actor.logprobs

    def watched(sequences, *args, **more):
        counts.append(len(sequences))
        return logprobs(sequences, *args, **more)

    ppo.roles.actor.logprobs = watched
    return counts


@pytest.mark.parametrize("estimator", ["gae", "rloo", "grpo"])
def test_inside_the_gate_only_the_checked_samples_are_recomputed(estimator):
    before = generated(1e-3)
    ppo = learner(small_config(estimator=estimator, **ANCHORED))
    counts = read_by_actor(ppo)
    scored = ppo.score(before.rollout)
    assert sum(counts) == CHECKED_AT_LEAST < len(before.rollout)
    assert torch.equal(scored.old_logprobs, before.rollout.rollout_logprobs)
    torch.testing.assert_close(scored.ref_logprobs, before.ref_logprobs)
    checked = checked_samples(len(before.rollout), ppo.config.run.seed, 0, -2)
    d = (before.old_logprobs - before.rollout.rollout_logprobs)[checked]
    d = d[before.rollout.response_mask[checked]].double()
    assert scored.anchor_gap.absolute == pytest.approx(float(d.abs().mean()), rel=1e-2)
    assert scored.anchor_gap.k3 == pytest.approx(float((d.exp() - 1 - d).mean()), rel=1e-2)
    assert torch.all(importance_weights(scored, 2.0) == 1)
    assert ratio_cap(scored, ppo.config.algorithm) == 2.0

    ppo.roles.generator = GivenRollout(ppo, before.rollout)
    ppo.roles.generator.rollout = before.rollout
    output = ppo.step(before.rollout.prompts)
    assert output.warnings == []  # the first ratio is one to the generator
    assert output.metrics["val/first_ratio_gap"] > 1e-3
    assert output.metrics["rollout/recomputed_fraction"] == CHECKED_AT_LEAST / 32
    assert output.metrics["rollout/logprob_gap"] == pytest.approx(8e-4, rel=0.3)


@pytest.mark.parametrize("gap", [0.1, float("nan")])
def test_outside_the_gate_all_are_recomputed_and_weighed(gap):
    before = generated(gap)
    ppo = learner(small_config(**ANCHORED))
    counts = read_by_actor(ppo)
    scored = ppo.score(before.rollout)
    assert sum(counts) == len(before.rollout)
    assert scored.anchor_gap is None
    torch.testing.assert_close(scored.old_logprobs, before.old_logprobs)
    assert ratio_cap(scored, ppo.config.algorithm) == 0
    if gap == 0.1:
        weights = importance_weights(scored, 2.0)[scored.loss_mask]
        assert float(weights.std()) > 0.05
        ppo.roles.generator = GivenRollout(ppo, before.rollout)
        ppo.roles.generator.rollout = before.rollout
        output = ppo.step(before.rollout.prompts)
        assert output.metrics["rollout/recomputed_fraction"] == 1
        assert any("algorithm.max_rollout_kl" in warning for warning in output.warnings)
        assert output.metrics["val/first_ratio_gap"] < 1e-3


def gradients(scored, **algorithm):
    ppo = learner(small_config(clip_eps_low=1.0, clip_eps_high=100.0, **algorithm))
    experience, _ = ppo.prepare(scored)
    rollout = scored.rollout
    microbatch = build_microbatch(
        experience,
        range(len(rollout)),
        # Advantages of one and the same scored rollout: the anchors move the KL in the reward too.
        advantages=torch.where(scored.loss_mask, torch.sin(1.0 + rollout.responses), 0.0),
        weights=importance_weights(scored, ppo.config.algorithm.rollout_correction),
        num_loss_tokens=int(scored.loss_mask.sum()),
        ratio_cap=ratio_cap(scored, ppo.config.algorithm),
    )
    statistics = UpdateStatistics()
    ppo._backward([microbatch], statistics)
    found = [p.grad for p in ppo.roles.actor.module.parameters() if p.grad is not None]
    return torch.cat([g.flatten() for g in found]), statistics.finalize(early_stop=False)


def test_the_mismatch_is_weighed_once_whichever_the_anchor():
    """pi / mu as the ratio, or 1 as the ratio and pi / mu as its weight: the same gradient."""
    recomputed = generated(0.3)
    wide = {"rollout_correction": 1e4}
    by_weight, _ = gradients(recomputed, **wide)
    ppo = learner(small_config(**ANCHORED, max_rollout_kl=10.0))
    anchored = ppo.score(recomputed.rollout)
    assert anchored.anchor_gap is not None
    by_ratio, _ = gradients(anchored, **wide)
    torch.testing.assert_close(by_ratio, by_weight, rtol=1e-3, atol=1e-5)
    unweighed, _ = gradients(recomputed)
    assert float((unweighed - by_weight).norm() / by_weight.norm()) > 0.05


def test_the_cap_bounds_the_ratio_where_the_clip_does_not():
    ppo = learner(small_config(**ANCHORED, max_rollout_kl=10.0))
    scored = ppo.score(generated(0.6).rollout)
    _, loose = gradients(scored, rollout_correction=1e4)
    _, capped = gradients(scored, rollout_correction=1.5)
    assert loose["policy/dual_clipfrac_avg"] == 0
    ratio = (generated(0.6).old_logprobs - scored.old_logprobs).exp()
    negative = torch.sin(1.0 + scored.rollout.responses) < 0
    beyond = (ratio > 1.5) & negative & scored.loss_mask
    assert capped["policy/dual_clipfrac_avg"] == pytest.approx(
        float(beyond.sum() / scored.loss_mask.sum()), abs=1e-6
    )
    _, both = gradients(scored, rollout_correction=1e4, dual_clip=1.5)
    assert both["policy/dual_clipfrac_avg"] == capped["policy/dual_clipfrac_avg"]


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"algorithm": {"rollout_correction": 0.0}}, "rollout_correction above 1"),
        ({"algorithm": {"rollout_correction": 1.0}}, "rollout_correction above 1"),
        ({"memory": MemoryConfig(value_head="actor")}, "memory.value_head=actor saves nothing"),
        ({"kl": KLConfig(estimator="exact")}, "kl.estimator=exact in the reward saves nothing"),
        ({"kl": KLConfig(estimator="exact", placement="loss")}, None),
        ({}, None),
    ],
)
def test_settings_that_would_save_nothing_or_bound_nothing_are_refused(changes, word):
    config = small_config(**ANCHORED | changes.get("algorithm", {}))
    rest = {k: v for k, v in changes.items() if k != "algorithm"}
    found = [f for f in violations(dataclasses.replace(config, **rest)) if "old_logprobs" in f]
    assert (len(found) == 0) if word is None else (len(found) == 1 and word in found[0])
