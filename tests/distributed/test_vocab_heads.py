"""Models and losses on a head whose rows lie on two ranks, against the same with all of them."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.tensor import Shard, distribute_tensor

from rlhf_fast.config import KLConfig
from rlhf_fast.distributed.vocab_parallel import VocabParallel
from rlhf_fast.distributed.world import World
from rlhf_fast.errors import ModelError
from rlhf_fast.models.vocabulary import likeliest_tokens
from rlhf_fast.ppo.exact_kl import require_exact_kl
from rlhf_fast.ppo.layout import build_microbatch
from rlhf_fast.ppo.trainer import PPOLearner
from rlhf_fast.ppo.trunk import row_logprobs
from rlhf_fast.types import IGNORE_INDEX
from tests.distributed.ranks import on_ranks
from tests.ppo.synthetic import VOCAB, learner, random_rollout, small_config

SAMPLES = (range(3), range(3, 8))
CONFIGS = {
    "k3 in the loss": KLConfig(coef=0.3, placement="loss", estimator="k3"),
    "exact in the loss": KLConfig(coef=0.3, placement="loss", estimator="exact"),
    "exact in the reward": KLConfig(coef=0.3, estimator="exact"),
}


def cut_head(module: Any, world: World) -> Any:
    """Put the rows of the head on the ranks, as a sharded model has them."""
    head, mesh = module.lm_head, world.shard_mesh
    head.weight = nn.Parameter(distribute_tensor(head.weight.detach(), mesh, [Shard(0)]))
    head.vocabulary_shards = VocabParallel.like_shard(mesh.get_group(), VOCAB)
    return head


def _microbatch(ppo: PPOLearner, scored: Any, samples: range) -> Any:
    experience, _ = ppo.prepare(scored)
    found = build_microbatch(
        experience,
        list(samples),
        advantages=experience.advantages,
        weights=torch.ones_like(experience.advantages),
        num_loss_tokens=int(scored.loss_mask.sum()),
    )
    return dataclasses.replace(found, old_logprobs=found.old_logprobs + 0.1)


def _update(ppo: PPOLearner, microbatch: Any) -> Any:
    reference = ppo._reference_rows(microbatch.sequences)
    rows = ppo.roles.actor.head_rows(microbatch.sequences)
    output = ppo._policy_loss(microbatch, rows, reference)
    output.loss.backward()
    return output


def _compare(world: World, name: str, reference_too: bool) -> None:
    config = dataclasses.replace(small_config(entropy_coef=0.1), kl=CONFIGS[name])
    plain, cut = learner(config), learner(config)
    head = cut_head(cut.roles.actor.module, world)
    if reference_too:
        cut_head(cut.roles.reference.module, world)

    want, scored = plain.score(random_rollout()), cut.score(random_rollout())
    for field in ("old_logprobs", "ref_logprobs", "exact_kl"):
        expected, found = getattr(want, field), getattr(scored, field)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-6)

    whole = _microbatch(plain, want, range(8))
    mine = _microbatch(cut, want, SAMPLES[world.rank])
    expected, found = _update(plain, whole), _update(cut, mine)
    torch.testing.assert_close(world.sum(found.loss.detach()), expected.loss.detach())
    assert found.metrics.keys() == expected.metrics.keys()
    for key, value in expected.metrics.items():
        torch.testing.assert_close(world.sum(found.metrics[key]), value, rtol=1e-4, atol=1e-5)
    gradient = head.weight.grad
    assert gradient.placements == (Shard(0),)
    exact = plain.roles.actor.module.lm_head.weight.grad
    torch.testing.assert_close(gradient.full_tensor(), exact, rtol=1e-4, atol=1e-6)
    others = zip(*(p.roles.actor.module.model.parameters() for p in (plain, cut)), strict=True)
    for ours, theirs in others:
        torch.testing.assert_close(world.sum(theirs.grad), ours.grad, rtol=1e-4, atol=1e-6)

    actors = [ppo.roles.actor for ppo in (plain, cut)]
    rows = torch.arange(0, mine.sequences.ids.numel(), 2)
    tokens = [likeliest_tokens(actor.module, mine.sequences, rows) for actor in actors]
    assert torch.equal(*tokens)
    targets = torch.where(mine.loss_mask, mine.targets, IGNORE_INDEX)
    with torch.no_grad():
        read = [
            row_logprobs(actor.head_rows(mine.sequences), targets, temperature=0.8)
            for actor in actors
        ]
    torch.testing.assert_close(*read, rtol=1e-5, atol=2e-6)


def _heads(world: World) -> None:
    for name in CONFIGS:
        _compare(world, name, reference_too=name != "exact in the loss")
    _compare(world, "exact in the loss", reference_too=True)
    roles = [learner(small_config()).roles for _ in range(2)]
    head = cut_head(roles[0].actor.module, world)
    cut, whole = (r.actor.vocabulary_head() for r in roles)
    require_exact_kl(cut, whole)
    with pytest.raises(ModelError, match="RF3073"):
        require_exact_kl(whole, cut)
    head.register_forward_hook(lambda *_: None)
    assert roles[0].actor.vocabulary_head() is None


def test_the_trainer_reads_and_trains_a_head_on_two_ranks() -> None:
    """Scores, losses, metrics, gradients of head and trunk; a reference cut alike, or whole."""
    on_ranks(2, _heads)
