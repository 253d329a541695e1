"""Prompts dealt to ranks: what all of them took for a rollout."""

import pytest
import torch

from rlhf_fast.distributed.world import World
from rlhf_fast.engine.dealt_generator import DealtGenerator
from rlhf_fast.engine.hybrid import HybridEngine
from rlhf_fast.engine.progress import GenerationSummary
from rlhf_fast.seeds import derive_seed
from rlhf_fast.types import SamplingParams
from tests.distributed.ranks import on_ranks
from tests.ppo.synthetic import NoGenerator, random_rollout, tiny_actor

SAMPLING = SamplingParams(max_new_tokens=6)


def _drawn(world: World, prompts: int):
    """Two rollouts over whole models; tokens drawn by this rank, by all, and what is said of it."""
    engine = HybridEngine(tiny_actor().eval(), eos_ids=[3])
    dealt = DealtGenerator(engine, world, engine)
    facts = []
    for count in (prompts, 1):
        batch = random_rollout(count, 2).prompts
        seeds = [derive_seed(1, 0, uid, g) for uid in batch.uid for g in range(2)]
        rollout = dealt.generate(batch, SAMPLING, samples_per_prompt=2, seeds=seeds)
        assert dealt.last is not None
        facts.append((int(rollout.lengths.sum()), dealt.last))
    return engine.last.seconds, facts


def test_the_summary_is_of_all_ranks_and_of_the_last_rollout():
    found = on_ranks(2, _drawn, 5, replicas=2)
    assert found[0][1] == found[1][1]
    for tokens, summary in found[0][1]:
        assert summary.tokens == tokens > 0
        assert summary.seconds > 0
        assert 0 < summary.peak_cache_use <= 1
    # The second rank had no prompt in the second rollout: its time is not that of the first.
    seconds = found[0][1][1][1].seconds
    assert seconds == pytest.approx(found[0][0], abs=1e-6)


def test_ranks_in_step_count_once():
    spent = torch.tensor([[300, 2_000_000, 3, 250_000], [0, 2_500_000, 0, 500_000]])
    assert DealtGenerator._summary(spent) == GenerationSummary(300, 2.5, 3, 0.5)
    unpaged = torch.tensor([[300, 1_000_000, 0, -1_000_000], [-1, 0, 0, -1]])
    assert DealtGenerator._summary(unpaged) == GenerationSummary(300, 1.0, 0, None)


def test_a_generator_without_an_engine_says_nothing():
    dealt = DealtGenerator(NoGenerator(), World(torch.device("cpu")))
    assert dealt.last is None
    assert DealtGenerator._summary(torch.tensor([dealt._spent()] * 2)) is None
