"""Memory that runs out: the same step again in halves, nothing of the first attempt left."""

import dataclasses

import pytest
import torch

from rlhf_fast.config import MemoryConfig, PtxConfig
from rlhf_fast.engine.hybrid import HybridEngine
from rlhf_fast.engine.settings import EngineSettings
from rlhf_fast.errors import EnvironmentFault
from rlhf_fast.optim import GuardedOptimizer
from rlhf_fast.ppo.pretraining import PretrainingBatch
from rlhf_fast.seeds import derive_seed
from rlhf_fast.types import IGNORE_INDEX, PackedSequences
from tests.ppo.synthetic import learner, random_rollout, small_config, tiny_actor


def with_budget(tokens, **algorithm):
    config = small_config(ppo_epochs=2, minibatches=2, **algorithm)
    return learner(dataclasses.replace(config, microbatch_tokens=tokens))


def limited(ppo, tokens, times=100):
    """The critic runs out of memory above so many tokens, after the actor's backward."""
    critic, left = ppo.roles.critic, [times]
    values = critic.values

    def checked(sequences):
        if torch.is_grad_enabled() and sequences.ids.numel() > tokens and left[0]:
            left[0] -= 1
            raise torch.OutOfMemoryError("as a device says it")
        return values(sequences)

    critic.values = checked
    return ppo


def updated(ppo):
    experience, _ = ppo.prepare(ppo.score(random_rollout(5, 2)))
    metrics = ppo.update(experience)
    modules = (ppo.roles.actor.module, ppo.roles.critic.module)
    return metrics, [p.detach().clone() for m in modules for p in m.parameters()]


def test_a_minibatch_is_done_again_with_half_the_tokens():
    expected, weights = updated(with_budget(24))
    ppo = limited(with_budget(96), 24)
    metrics, found = updated(ppo)
    assert ppo.budget.tokens == 24
    assert metrics.pop("policy/redone_minibatches") == 2.0  # 96, then 48
    expected.pop("policy/redone_minibatches")
    # Scored in packs of another size, then trained in the same ones.
    assert metrics == pytest.approx(expected, rel=1e-5, abs=1e-6)
    for a, b in zip(found, weights, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_what_was_found_to_fit_is_kept_by_a_checkpoint():
    ppo = limited(with_budget(96), 24)
    updated(ppo)
    resumed, other = with_budget(96), with_budget(64)
    resumed.load_state_dict(ppo.state_dict())
    other.load_state_dict(ppo.state_dict())
    assert (resumed.budget.tokens, other.budget.tokens) == (24, 64)


def test_one_row_that_does_not_fit_ends_the_run():
    ppo = limited(with_budget(96), 1)
    before = [p.detach().clone() for p in ppo.roles.actor.module.parameters()]
    with pytest.raises(EnvironmentFault, match="RF7061"):
        updated(ppo)
    for a, b in zip(before, ppo.roles.actor.module.parameters(), strict=True):
        assert torch.equal(a, b)
        assert b.grad is None


def test_a_step_in_backward_keeps_its_one_microbatch_when_scoring_ran_out_of_memory():
    def stepping(tokens):
        ppo = learner(
            dataclasses.replace(
                small_config(), memory=MemoryConfig(step_in_backward=True), microbatch_tokens=96
            )
        )
        roles, config = ppo.roles, ppo.config
        parts = (roles.actor.module, config.actor_optim), (roles.critic.module, config.critic_optim)
        roles.actor_optimizer, roles.critic_optimizer = (
            GuardedOptimizer(module, optim, 100, in_backward=True) for module, optim in parts
        )
        ppo.budget.tokens = tokens
        return updated(ppo)

    (_, expected), (metrics, found) = stepping(96), stepping(24)
    assert metrics["policy/optimizer_steps"] == 1
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


class Texts:
    """Two texts for PPO-ptx; a forward of both runs out of memory."""

    def __init__(self, fits):
        self.fits, self.forwards, self.drawn = fits, [], 0

    def next_batch(self):
        self.drawn += 1
        rows = [[1, 2, 3, 4] * 4, [5, 6, 7, 8] * 4]

        def microbatches(budget):
            packs = [rows] if budget >= 32 else [[row] for row in rows]
            return [self._forward(PackedSequences.from_lists(pack)) for pack in packs]

        return PretrainingBatch(30, microbatches)

    def _forward(self, sequences):
        self.forwards.append(sequences.ids.numel())
        if self.forwards[-1] > self.fits:
            raise torch.OutOfMemoryError("as a device says it")
        targets = sequences.ids.roll(-1)
        targets[sequences.cu_seqlens[1:].long() - 1] = IGNORE_INDEX
        return sequences, targets


def test_texts_of_ppo_ptx_that_do_not_fit_are_read_again_with_the_minibatch():
    found = []
    for fits in (100, 16):
        ppo = with_budget(48)
        ppo.config = dataclasses.replace(ppo.config, ptx=PtxConfig(coef=0.5, data="-"))
        ppo.roles.pretraining = texts = Texts(fits)
        found.append((*updated(ppo), texts))
    (expected, weights, whole), (metrics, halved, texts) = found
    assert whole.drawn == texts.drawn == 4
    assert texts.forwards == [32] + [16, 16] * 4
    assert (expected.pop("policy/redone_minibatches"), ppo.budget.tokens) == (0.0, 24)
    assert metrics.pop("policy/redone_minibatches") == 1.0
    assert metrics == pytest.approx(expected, rel=1e-5, abs=1e-6)
    for a, b in zip(halved, weights, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_values_of_truncated_rows_are_read_again_in_halves():
    ppo = with_budget(96, bootstrap_truncated=True)
    rollout = random_rollout(5, 2)
    rollout = dataclasses.replace(rollout, ended=torch.zeros_like(rollout.ended))
    expected = ppo._bootstrap(rollout)
    values = ppo.roles.critic.values

    def limited(sequences):
        if sequences.ids.numel() > 24:
            raise torch.OutOfMemoryError("as a device says it")
        return values(sequences)

    ppo.roles.critic.values = limited
    torch.testing.assert_close(ppo._bootstrap(rollout), expected, rtol=1e-5, atol=1e-6)
    assert ppo.budget.tokens == 24


class Exhausted:
    """Runs out of memory with more than `rows` side by side."""

    def __init__(self, rows):
        module = tiny_actor().eval()
        self.engine = HybridEngine(module, eos_ids=[3], settings=EngineSettings(max_batch=8))
        self.rows = rows

    def generate(self, *arguments, **options):
        rollout = self.engine.generate(*arguments, **options)
        if self.engine.settings.max_batch > self.rows:
            raise torch.OutOfMemoryError("as a device says it")
        return rollout


@pytest.mark.parametrize("rows", [8, 2, 0])
def test_a_rollout_is_drawn_again_with_half_the_samples(rows):
    ppo = with_budget(96)
    generator = Exhausted(rows)
    ppo.roles.generator, ppo.roles.halve_rollout = generator, generator.engine.halve_batch
    prompts = random_rollout(5, 2).prompts
    if rows == 0:
        with pytest.raises(EnvironmentFault, match="RF7062"):
            ppo.generate(prompts)
        return
    found = ppo.generate(prompts)
    expected = HybridEngine(tiny_actor().eval(), eos_ids=[3]).generate(
        prompts,
        ppo.sampling,
        samples_per_prompt=2,
        seeds=seeds_of(ppo, prompts),
    )
    assert torch.equal(found.responses, expected.responses)
    assert generator.engine.settings.max_batch == rows
    assert ppo._rollouts_redone == {8: 0, 2: 2}[rows]


def seeds_of(ppo, prompts):
    return [derive_seed(ppo.config.run.seed, 0, uid, g) for uid in prompts.uid for g in range(2)]
