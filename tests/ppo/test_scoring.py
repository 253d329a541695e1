"""Scoring while generation runs gives what scoring afterwards gives, whatever the roles are."""

import dataclasses

import pytest
import torch

from rlhf_fast.config import EngineConfig, KLConfig, RolloutConfig
from rlhf_fast.engine.hybrid import HybridEngine, Mode
from rlhf_fast.engine.settings import EngineSettings
from rlhf_fast.errors import GenerationError, RewardError
from rlhf_fast.models.forward import set_compute_dtype
from rlhf_fast.models.reward_function import FunctionReward
from rlhf_fast.models.rewards import ModelReward, SumReward
from rlhf_fast.models.roles import Actor, Critic, Reference, RewardModel, TrunkCritic
from rlhf_fast.optim import GuardedOptimizer
from rlhf_fast.ppo.roles import Roles
from rlhf_fast.ppo.trainer import PPOLearner
from rlhf_fast.protocols import RewardOutput, SampleReward
from rlhf_fast.types import PackedSequences, PromptBatch, ScoredRollout
from tests.models.tiny import tokenizer as make_tokenizer
from tests.ppo.synthetic import VOCAB, FixedReward, small_config, tiny_actor, tiny_critic

PROMPTS, GROUP = 8, 2
ENDS = (2, 3)  # of 23 tokens: lengths differ
TOKENIZER = make_tokenizer()


class SplitReward(FixedReward):
    """A number for each response; a few abstain; may be asked for some samples at a time."""

    splits = True

    def __init__(self):
        self.asked = []

    def score(self, rollout):
        return self.prepare(rollout, range(len(rollout)))()()

    def prepare(self, rollout, samples, *, at_once=False):
        self.asked.append(list(samples))
        scores = super().score(rollout).scores
        scored = torch.tensor([ids[0] % 4 != 0 for ids in rollout.response_ids()])
        return lambda: lambda: RewardOutput(torch.where(scored, scores, 0.0), scored)


def model_reward(seed=7):
    return ModelReward(RewardModel(tiny_critic(seed)), TOKENIZER, TOKENIZER, token_budget=64)


def config_for(overlap, *, kl=None, **algorithm):
    config = small_config(**algorithm)
    return dataclasses.replace(
        config,
        rollout=RolloutConfig(prompts=PROMPTS, samples_per_prompt=GROUP, max_batch=12),
        sampling=dataclasses.replace(config.sampling, max_new_tokens=16, temperature=0.9),
        engine=EngineConfig(overlap_scoring=overlap),
        kl=kl or config.kl,
        microbatch_tokens=36,
    )


def learner(
    config, *, reward=None, path="auto", kv_bytes=0, trunk=False, device="cpu", dtype="float32"
):
    actor = Actor(tiny_actor(0).to(device))
    set_compute_dtype(actor.module, dtype)  # an engine keeps the type that it was made with
    critic = None
    if config.algorithm.estimator == "gae":
        critic = TrunkCritic(actor.module) if trunk else Critic(tiny_critic(1))
    if trunk:
        torch.nn.init.normal_(critic.head.score.weight, generator=torch.Generator().manual_seed(3))
    engine = HybridEngine(
        actor.module,
        eos_ids=ENDS,
        weight_version=lambda: actor.weight_version,
        settings=EngineSettings(
            path=path,
            max_batch=config.rollout.max_batch,
            page_size=4,
            kv_bytes=kv_bytes,
            poison=True,
        ),
    )
    heads = {"value_head": (critic.module, config.critic_optim)} if trunk else {}
    optimizer = GuardedOptimizer(actor.module, config.actor_optim, 100, heads=heads)
    engine.guard(optimizer.optimizer)
    own = critic is not None and not trunk
    return PPOLearner(
        config,
        Roles(
            actor=actor,
            reference=Reference(tiny_actor(5)),
            critic=critic,
            reward=reward or SplitReward(),
            generator=engine,
            actor_optimizer=optimizer,
            critic_optimizer=GuardedOptimizer(critic.module, config.critic_optim, 100)
            if own
            else None,
            on_update=actor.bump_version,
            scoring=engine.scoring,
        ),
    )


def prompts():
    g = torch.Generator().manual_seed(4)
    lists = [torch.randint(4, VOCAB, (1 + b % 5,), generator=g).tolist() for b in range(PROMPTS)]
    return PromptBatch(
        PackedSequences.from_lists(lists),
        tuple(range(PROMPTS)),
        tuple({"tag": b} for b in range(PROMPTS)),
        tuple(f"p{b}" for b in range(PROMPTS)),
    )


def scored_by(ppo) -> tuple[ScoredRollout, list[int]]:
    """What a rollout of the learner is scored, and the samples that were read early."""
    rollout = ppo.generate(prompts())
    early = ppo.scoring._early
    read = [] if early is None else list(early.samples)
    return ppo.score(rollout), read


def assert_same(one: ScoredRollout, other: ScoredRollout):
    assert one.rollout.response_ids() == other.rollout.response_ids()
    assert torch.equal(one.scored, other.scored)
    for name in ("scores", "old_logprobs", "ref_logprobs", "values", "exact_kl"):
        a, b = getattr(one, name), getattr(other, name)
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-6)
            inside = one.rollout.response_mask if a.dim() == 2 else one.scored
            assert torch.all(a[~inside] == 0)


EXACT = KLConfig(coef=0.1, estimator="exact")
CASES = {
    "gae": ({}, {}),
    "modules": ({}, {"path": "modules"}),
    "rloo": ({"estimator": "rloo"}, {}),
    "exact": ({"kl": EXACT}, {}),
    "trunk": ({}, {"trunk": True}),
    "trunk and exact": ({"kl": EXACT}, {"trunk": True}),
    "anchored": ({"old_logprobs": "rollout", "rollout_correction": 2.0}, {}),
    "preempted": ({}, {"kv_bytes": 14 * 4 * 2 * 2 * 1 * 8 * 4}),
}


@pytest.mark.parametrize("case", CASES)
def test_scoring_inside_generation_equals_scoring_after_it(case):
    rules, options = CASES[case]
    (after, none), (inside, early) = (
        scored_by(learner(config_for(overlap, **rules), **options)) for overlap in ("off", "on")
    )
    assert none == []
    assert 0 < len(early) == len(set(early)) < len(inside.rollout)
    assert_same(inside, after)
    assert not bool(after.scored.all())  # some abstained
    if case == "preempted":
        ppo = learner(config_for("on"), **options)
        ppo.roles.generator.expected.observe(range(PROMPTS), [1] * PROMPTS)
        again, early = scored_by(ppo)
        assert ppo.roles.generator.preemptions > 0
        assert early
        assert_same(again, after)


def test_a_step_comes_to_the_same_weights_and_repeats_to_the_bit():
    found = []
    for overlap in ("off", "on", "on"):
        ppo = learner(config_for(overlap, ppo_epochs=2, minibatches=2))
        metrics = [ppo.step(prompts()).metrics for _ in range(2)]
        flat = torch.cat([p.detach().flatten() for p in ppo.roles.actor.module.parameters()])
        found.append((flat, metrics))
    off, on, again = found
    torch.testing.assert_close(on[0], off[0], rtol=1e-4, atol=1e-5)
    assert torch.equal(on[0], again[0])
    assert on[1] == again[1]
    assert on[1][1]["objective/kl"] == pytest.approx(off[1][1]["objective/kl"], rel=1e-3)


def test_auto_does_not_overlap_on_a_cpu():
    ppo = learner(config_for("auto"))
    assert ppo.scoring.begin() is None
    assert scored_by(ppo)[1] == []


def test_a_reward_model_is_asked_for_packs_and_numbers_samples_as_the_rollout_does():
    whole = scored_by(learner(config_for("off"), reward=model_reward()))[0]
    inside, early = scored_by(learner(config_for("on"), reward=model_reward()))
    assert early
    assert float(whole.scores.std()) > 0
    assert_same(inside, whole)
    double = SumReward([(0.5, model_reward()), (0.5, model_reward())])
    assert double.splits
    summed, early = scored_by(learner(config_for("on"), reward=double))
    assert early
    assert_same(summed, whole)

    bad = model_reward()
    bad.reward_model.module.score.weight.data.fill_(float("nan"))
    ppo = learner(config_for("on"), reward=bad)
    rollout = ppo.generate(prompts())
    first = ppo.scoring._early.rewards[0][0][0]
    with pytest.raises(RewardError, match=rf"RF5011[\s\S]*sample {first}:"):
        ppo.score(rollout)


def test_a_function_over_texts_sees_the_whole_rollout_once():
    calls = []

    def function(prompts, completions, tag):
        calls.append((list(prompts), list(tag)))
        return [float(len(c)) for c in completions]

    for reward in (
        FunctionReward(function, TOKENIZER),
        SumReward([(1.0, model_reward()), (1.0, FunctionReward(function, TOKENIZER))]),
    ):
        assert not (isinstance(reward, SampleReward) and reward.splits)
        calls.clear()
        after = scored_by(learner(config_for("off"), reward=reward))[0]
        inside, early = scored_by(learner(config_for("on"), reward=reward))
        assert early
        assert_same(inside, after)
        expected = [b for b in range(PROMPTS) for _ in range(GROUP)]
        assert calls == [([f"p{b}" for b in expected], expected)] * 2


class FailsOnce(SplitReward):
    def __init__(self, action):
        super().__init__()
        self.action = action

    def prepare(self, rollout, samples, *, at_once=False):
        action, self.action = self.action, lambda: None
        action()
        return super().prepare(rollout, samples)


@pytest.mark.parametrize("path", ["fused", "modules"])
def test_an_exception_inside_scoring_leaves_training_usable(path):
    def fail():
        raise RewardError("RF5000", "in the middle")

    ppo = learner(config_for("on"), reward=FailsOnce(fail), path=path)
    module = ppo.roles.actor.module
    module.train()
    with pytest.raises(RewardError, match="in the middle"):
        ppo.step(prompts())
    assert ppo.roles.generator.mode is Mode.TRAIN
    assert all(m.training for m in module.modules())
    assert torch.is_grad_enabled()
    other = learner(config_for("on"), path=path)
    metrics = [p.step(prompts()).metrics for p in (ppo, other)]
    assert metrics[0] == metrics[1]


def test_what_a_failed_rollout_was_scored_is_in_no_other():
    class FailsSecond(SplitReward):
        def prepare(self, rollout, samples, *, at_once=False):
            if len(self.asked) == 1:
                self.asked.append([])
                raise RewardError("RF5000", "in the middle")
            return super().prepare(rollout, samples)

    ppo, other = learner(config_for("on"), reward=FailsSecond()), learner(config_for("off"))
    with pytest.raises(RewardError, match="in the middle"):
        ppo.generate(prompts())
    other.steps = 1
    rollout = other.generate(prompts())
    assert_same(ppo.score(rollout), other.score(rollout))


def test_an_optimizer_step_inside_scoring_is_refused():
    reward = FailsOnce(lambda: None)
    ppo = learner(config_for("on"), reward=reward)
    module = ppo.roles.actor.module
    before = [p.detach().clone() for p in module.parameters()]
    for p in module.parameters():
        p.grad = torch.ones_like(p)
    reward.action = ppo.roles.actor_optimizer.optimizer.step
    with pytest.raises(GenerationError, match=r"RF4034.*score"):
        ppo.step(prompts())
    assert all(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))
