"""Shared forwards: 1, 2 and 4 ranks find the same metrics, gradients and weights."""

import dataclasses
from collections import Counter

import numpy as np
import pytest
import torch

from rlhf_fast.config import KLConfig, PtxConfig
from rlhf_fast.data.packing import deal, pack_by_tokens
from rlhf_fast.distributed.gradients import RankGradients
from rlhf_fast.distributed.work import WorldSplit
from rlhf_fast.distributed.world import World
from rlhf_fast.errors import PeerError, RewardError
from rlhf_fast.optim import GuardedOptimizer
from rlhf_fast.ppo.layout import token_packs
from rlhf_fast.ppo.pretraining import PretrainingBatch
from rlhf_fast.ppo.split_rewards import DealtReward, OneRankReward
from rlhf_fast.protocols import Alone, RewardOutput
from rlhf_fast.types import IGNORE_INDEX, PackedSequences
from tests.distributed.ranks import on_ranks
from tests.ppo.synthetic import FixedReward, learner, random_rollout, small_config

BUDGET = 24


class PerToken:
    """A score for each response token; the third row abstains."""

    def score(self, rollout):
        scores = torch.where(rollout.response_mask, rollout.responses % 5 - 2.0, 0.0)
        scored = torch.arange(len(rollout)) != 2
        return RewardOutput(torch.where(scored[:, None], scores, 0.0), scored)


class Pretraining:
    """One text a rank, of those it is dealt; the last rank has none of its own."""

    def __init__(self, split):
        self.split = split

    def next_batch(self):
        return PretrainingBatch(6, self._microbatches)

    def _microbatches(self, budget):
        texts = [[1, 2, 3, 4], [5, 6, 7], [8, 9]]
        mine = [
            dealt[self.split.rank] for dealt in deal([[0], [1], [2]], [4, 3, 2], self.split.ranks)
        ]
        return [_text(texts[b[0]]) if b else _text([1, 1], idle=True) for b in mine]


def _text(ids, idle=False):
    targets = torch.tensor([*ids[1:], IGNORE_INDEX])
    return PackedSequences.from_lists([ids]), torch.full_like(targets, -100) if idle else targets


def _cases():
    return {
        "gae": (small_config(ppo_epochs=2, minibatches=2), FixedReward()),
        "minibatch whitening, per token": (
            small_config(whiten_scope="minibatch", minibatches=2, bootstrap_truncated=True),
            PerToken(),
        ),
        "target_kl": (small_config(ppo_epochs=4, minibatches=2, target_kl=2e-2), FixedReward()),
        "rloo, exact KL in the loss, ptx": (
            dataclasses.replace(
                small_config(estimator="rloo"),
                kl=KLConfig(coef=0.1, estimator="exact", placement="loss"),
                ptx=PtxConfig(coef=0.5, data="-"),
            ),
            FixedReward(),
        ),
        "grpo": (small_config(estimator="grpo", ppo_epochs=2), PerToken()),
        "anchors": (
            small_config(old_logprobs="rollout", rollout_correction=2.0, max_rollout_kl=1e9),
            FixedReward(),
        ),
        "anchors turned down": (
            small_config(old_logprobs="rollout", rollout_correction=2.0, max_rollout_kl=1e-9),
            FixedReward(),
        ),
        "exact KL in the reward": (
            dataclasses.replace(small_config(), kl=KLConfig(coef=0.1, estimator="exact")),
            FixedReward(),
        ),
    }


def _count(calls, name, method):
    def counted(*arguments, **options):
        calls[name] += 1
        return method(*arguments, **options)

    return counted


def _sent(tensors):
    """As arrays: tensors go from process to process by handles that end with the sender."""
    return [t.detach().numpy().copy() for t in tensors]


def _together(ppo, config, world):
    """Optimizers that step with those of the other ranks."""
    roles, ranks = ppo.roles, RankGradients.of(world)
    roles.actor_optimizer = GuardedOptimizer(
        roles.actor.module, config.actor_optim, 100, ranks=ranks
    )
    if roles.critic is None:
        return [roles.actor_optimizer]
    roles.critic_optimizer = GuardedOptimizer(
        roles.critic.module, config.critic_optim, 100, ranks=ranks
    )
    return [roles.actor_optimizer, roles.critic_optimizer]


def _record(optimizer, grads):
    """Keep the gradients that each step applies."""

    def keep(*_):
        grads.extend(p.grad.clone() for p in optimizer.parameters)

    optimizer.optimizer.register_step_pre_hook(keep)


def _updates(world: World):
    """Per case: metrics, gradients of the last step, weights, and forwards of each model."""
    found = {}
    split = Alone() if world.size == 1 else WorldSplit(world)
    for name, (config, reward) in _cases().items():
        ppo = learner(dataclasses.replace(config, microbatch_tokens=BUDGET))
        roles = ppo.roles
        roles.split, roles.reward = split, reward
        if config.ptx.coef:
            roles.pretraining = Pretraining(split)
        optimizers, grads = _together(ppo, config, world), []
        for optimizer in optimizers:
            _record(optimizer, grads)
        parameters = [p for optimizer in optimizers for p in optimizer.parameters]
        calls = Counter()
        for role in ("actor", "reference", "critic"):
            module = getattr(getattr(roles, role), "module", None)
            if module is not None:
                base = module.base_model
                base.forward = _count(calls, role, base.forward)
        experience, _ = ppo.prepare(ppo.score(random_rollout(5 if name == "gae" else 4)))
        metrics = ppo.update(experience)
        scored = experience.scored
        found[name] = {
            "metrics": metrics,
            "grads": _sent(grads[-len(parameters) :]),
            "weights": _sent(parameters),
            "calls": dict(calls),
            "padded": _sent(
                [scored.old_logprobs, scored.ref_logprobs, scored.values, scored.scores]
            ),
        }
    return found


@pytest.fixture(scope="module")
def alone():
    return _updates(World(torch.device("cpu")))


@pytest.mark.parametrize("ranks", [2, 4])
def test_any_number_of_ranks_makes_the_same_update(alone, ranks):
    found = on_ranks(ranks, _updates)
    for name, expected in alone.items():
        first = found[0][name]
        for rank in found:
            assert rank[name]["metrics"] == first["metrics"], name
            assert rank[name]["calls"] == first["calls"], name
        assert first["metrics"] == pytest.approx(expected["metrics"], abs=1e-5, rel=1e-5), name
        for key in ("padded", "grads", "weights"):
            for a, b in zip(first[key], expected[key], strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5, err_msg=f"{name}: {key}")
    stopped = alone["target_kl"]["metrics"]
    assert stopped["policy/early_stop"] == 1.0
    assert stopped["policy/optimizer_steps"] > 0


def test_packs_are_dealt_evenly_and_every_sample_once():
    rollout = random_rollout(9, 3, seed=4)
    lengths = (rollout.prompt_lengths + rollout.lengths).tolist()
    packs = pack_by_tokens(lengths, BUDGET, balanced=True)
    assert [p.rows for p in token_packs(rollout, range(27), BUDGET)] == packs
    for ranks in (2, 3, 4, 8):
        shares = []
        for rank in range(ranks):
            split = Alone()
            split.rank, split.ranks = rank, ranks
            shares.append(list(token_packs(rollout, range(27), BUDGET, split)))
        assert len({len(share) for share in shares}) == 1
        busy = [pack for share in shares for pack in share if not pack.idle]
        assert sorted(s for pack in busy for s in pack.rows) == list(range(27))
        assert max(sum(lengths[s] for s in pack.rows) for pack in busy) <= BUDGET
        totals = [sum(lengths[s] for p in share if not p.idle for s in p.rows) for share in shares]
        assert max(totals) - min(totals) <= BUDGET / 2
    assert deal([[0, 1]], [3, 4], 3) == [[[1], [0], []]]
    assert list(token_packs(rollout, [], BUDGET)) == []


class _Judge:
    """As a reward model: the sum of the ids; NaN for one sample."""

    splits = True

    def __init__(self, bad=None):
        self.bad = bad
        self.seen = []

    def prepare(self, rollout, samples, *, at_once=False):
        assert at_once

        def finish():
            self.seen.append(list(samples))
            if self.bad in samples:
                raise RewardError("RF5011", "not finite")
            scores = rollout.responses.sum(1).float()
            return RewardOutput(scores, torch.ones(len(scores), dtype=torch.bool))

        return lambda: finish


class _Function:
    def __init__(self, fails):
        self.fails, self.calls = fails, 0

    def score(self, rollout):
        self.calls += 1
        if self.fails:
            raise RewardError("RF5004", "the function raised")
        return PerToken().score(rollout)


def _rewards(world: World):
    split, rollout = WorldSplit(world), random_rollout(5, 2)
    judge, function = _Judge(), _Function(False)
    dealt = DealtReward(judge, split, token_budget=BUDGET).score(rollout)
    told = OneRankReward(function, split).score(rollout)
    kinds = []
    for reward in (
        DealtReward(_Judge(bad=7), split, token_budget=BUDGET),
        OneRankReward(_Function(True), split),
    ):
        try:
            reward.score(rollout)
        except RewardError as error:
            kinds.append(error.code)
        except PeerError as error:
            kinds.append(error.exit_code)
    return _sent(dealt), len(judge.seen), _sent(told), function.calls, kinds


def test_rewards_are_the_same_everywhere_and_so_are_their_failures():
    rollout = random_rollout(5, 2)
    found = on_ranks(2, _rewards)
    for dealt, _, told, _, _ in found:
        assert np.array_equal(dealt[0], rollout.responses.sum(1))
        assert dealt[1].all()
        for mine, expected in zip(told, PerToken().score(rollout), strict=True):
            assert np.array_equal(mine, expected)
    assert [calls for *_, calls, _ in found] == [1, 0]
    assert found[0][1] == found[1][1] > 1
    kinds = [kinds for *_, kinds in found]
    assert sorted([str(kinds[0][0]), str(kinds[1][0])]) == ["2", "RF5011"]
    assert [kinds[0][1], kinds[1][1]] == ["RF5004", 2]


def _exhausted(world: World):
    """The last rank runs out of memory once, in the second forward of its second minibatch."""
    config = small_config(ppo_epochs=2, minibatches=2)
    ppo = learner(dataclasses.replace(config, microbatch_tokens=BUDGET))
    ppo.roles.split = Alone() if world.size == 1 else WorldSplit(world)
    parameters = [p for optimizer in _together(ppo, config, world) for p in optimizer.parameters]
    backward, calls = ppo._backward, Counter()

    def fails_once(*arguments):
        calls["backward"] += 1
        if world.size > 1 and world.rank == world.size - 1 and calls["backward"] == 3:
            raise torch.OutOfMemoryError("on this rank alone")
        backward(*arguments)

    ppo._backward = fails_once
    experience, _ = ppo.prepare(ppo.score(random_rollout(6)))
    return ppo.update(experience), _sent(parameters), ppo.budget.tokens


def test_memory_that_runs_out_on_one_rank_redoes_the_minibatch_on_all():
    metrics, weights, _ = _exhausted(World(torch.device("cpu")))
    metrics.pop("policy/redone_minibatches")
    for found, parameters, budget in on_ranks(2, _exhausted):
        assert found.pop("policy/redone_minibatches") == 1.0
        assert budget == BUDGET // 2
        assert found == pytest.approx(metrics, abs=1e-5, rel=1e-5)
        for a, b in zip(parameters, weights, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
