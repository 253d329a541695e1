"""What must not matter does not: microbatch split, padding, row order, masked content, packing."""

import dataclasses

import pytest
import torch

from rlhf_fast.ppo.advantages import whitened
from rlhf_fast.ppo.layout import build_microbatch
from rlhf_fast.ppo.statistics import UpdateStatistics
from tests.ppo.synthetic import learner, random_rollout, small_config

TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}


def gradients(ppo, rollout, packs):
    """Gradients of one optimizer step over `rollout`, forwards split as `packs`."""
    experience, _ = ppo.prepare(ppo.score(rollout))
    mask = experience.scored.loss_mask
    advantages = whitened(experience.advantages, mask, unbiased=False)
    statistics = UpdateStatistics()
    statistics.begin_minibatch()
    for indices in packs:
        microbatch = build_microbatch(
            experience,
            indices,
            advantages=advantages,
            weights=torch.ones_like(advantages),
            num_loss_tokens=int(mask.sum()),
        )
        ppo._backward([microbatch], statistics)
    modules = (ppo.roles.actor.module, ppo.roles.critic.module)
    return [p.grad.clone() for m in modules for p in m.parameters() if p.grad is not None]


def everything(rollout):
    return [list(range(len(rollout)))]


def assert_same(first, second):
    assert len(first) == len(second) > 10
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, **TOLERANCE)


@pytest.fixture
def base():
    rollout = random_rollout()
    return rollout, gradients(learner(small_config()), rollout, everything(rollout))


@pytest.mark.parametrize(
    "packs", [[[i] for i in range(8)], [[0, 5, 2], [7, 1], [3, 4, 6]], [[7, 6, 5, 4, 3, 2, 1, 0]]]
)
def test_microbatch_split_and_packing_order(base, packs):
    rollout, expected = base
    assert_same(gradients(learner(small_config()), rollout, packs), expected)


@pytest.mark.parametrize("extra", [1, 13])
def test_padding_columns(base, extra):
    _, expected = base
    padded = random_rollout(extra_columns=extra)
    assert_same(gradients(learner(small_config()), padded, everything(padded)), expected)


def test_content_of_padding(base):
    _, expected = base
    rollout = random_rollout(extra_columns=3)
    inside = torch.arange(rollout.responses.shape[1]) < rollout.lengths[:, None]
    dirty = dataclasses.replace(
        rollout,
        responses=torch.where(inside, rollout.responses, 10**6),
        rollout_logprobs=torch.where(inside, rollout.rollout_logprobs, float("nan")),
    )
    assert_same(gradients(learner(small_config()), dirty, everything(dirty)), expected)


def test_strided_tensors(base):
    rollout, expected = base
    strided = dataclasses.replace(
        rollout,
        responses=rollout.responses.t().contiguous().t(),
        response_mask=rollout.response_mask.repeat_interleave(2, 1)[:, ::2],
    )
    assert not strided.responses.is_contiguous()
    assert_same(gradients(learner(small_config()), strided, everything(strided)), expected)


def test_row_order():
    """Reversing prompts and their samples permutes rows and changes nothing else."""
    rollout = random_rollout()
    config = small_config()
    forward = learner(config)
    experience, _ = forward.prepare(forward.score(rollout))
    order = torch.arange(len(rollout) - 1, -1, -1)
    sequences = rollout.prompts.sequences
    count = len(rollout.prompts)
    flipped = dataclasses.replace(
        rollout,
        prompts=dataclasses.replace(
            rollout.prompts, sequences=sequences.select(list(range(count))[::-1])
        ),
        **{
            name: getattr(rollout, name)[order]
            for name in ("responses", "response_mask", "lengths", "ended", "rollout_logprobs")
        },
    )
    backward = learner(config)
    mirrored, _ = backward.prepare(backward.score(flipped))
    for name in ("rewards", "kl", "advantages", "returns"):
        torch.testing.assert_close(
            getattr(mirrored, name)[order], getattr(experience, name), **TOLERANCE
        )


def test_a_whole_update_does_not_depend_on_the_token_budget():
    rollout = random_rollout()
    results = []
    for budget in (16, 40, 4096):
        config = dataclasses.replace(
            small_config(ppo_epochs=2, minibatches=2), microbatch_tokens=budget
        )
        ppo = learner(config)
        experience, _ = ppo.prepare(ppo.score(rollout))
        metrics = ppo.update(experience)
        results.append((metrics, [p.detach().clone() for p in ppo.roles.actor.module.parameters()]))
    for metrics, weights in results[1:]:
        for a, b in zip(weights, results[0][1], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        assert metrics["loss/policy_avg"] == pytest.approx(
            results[0][0]["loss/policy_avg"], abs=1e-5
        )


def test_ratio_is_one_on_the_first_minibatch():
    ppo = learner(small_config())
    experience, _ = ppo.prepare(ppo.score(random_rollout()))
    assert ppo.update(experience)["val/first_ratio_gap"] < 1e-5
