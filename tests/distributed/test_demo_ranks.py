"""PPO on the demo's task, by the demo's own plan in small: 2 and 4 ranks follow one process."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from rlhf_fast.config import PPOConfig
from rlhf_fast.distributed.world import World
from rlhf_fast.stages import demo_plan
from rlhf_fast.stages.demo import Demo
from rlhf_fast.stages.demo_plan import KL_COEF, Plan
from rlhf_fast.stages.ppo import PPOTrainer
from rlhf_fast.stages.reward_model import run_reward_model
from rlhf_fast.stages.sft import run_sft
from tests.distributed.ranks import on_ranks
from tests.stages.tiny_runs import metric_lines

STEPS = 3


def plan_of(folder: Path) -> Plan:
    return Plan(
        folder,
        1,
        sft_rows=1_280,
        sft_steps=20,
        pairs=200,
        ppo_steps=STEPS,
        no_kl_steps=0,
        prompts=16,
    )


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Data, SFT policy and reward model, made as the demo makes them."""
    plan = plan_of(tmp_path_factory.mktemp("demo"))
    demo = Demo(plan, quick=True)
    demo._base_model()
    run_sft(demo_plan.sft(plan, demo.data["sft_train"], demo.data["sft_eval"]), quiet=True)
    pairs = demo._preferences()
    run_reward_model(demo_plan.reward_model(plan, pairs, demo.data["sft_eval"]), quiet=True)
    return plan.folder


def config_of(base: Path, name: str) -> PPOConfig:
    """The demo's, with models one by one: ranks have no two side by side (RF1045)."""
    plan = plan_of(base)
    prompts = plan.place("data") / "prompts_train.jsonl"
    config = demo_plan.ppo(plan, name, prompts, kl_coef=KL_COEF, steps=STEPS)
    return dataclasses.replace(config, side_by_side=1)


def trained(world, base: Path, name: str):
    """By step: the prompts' uids in their order, and the sampled tokens, padded with -1."""
    steps = []

    def keep(step, output):
        rollout = output.experience.scored.rollout
        tokens = np.where(rollout.response_mask.numpy(), rollout.responses.numpy(), -1)
        steps.append((list(rollout.prompts.uid), tokens))
        return {}

    PPOTrainer(config_of(base, name), on_step=keep, quiet=True, world=world).train()
    return steps


def _trained(world: World, base: str, name: str):
    return trained(world, Path(base), name)


@pytest.fixture(scope="module")
def alone(base):
    return trained(None, base, "alone")


@pytest.mark.parametrize(
    ("ranks", "replicas"), [(2, 1), pytest.param(4, 1, marks=pytest.mark.long), (4, 2)]
)
def test_ranks_follow_one_process(base, alone, ranks, replicas):
    name = f"{ranks} ranks, {replicas} replicas"
    found = on_ranks(ranks, _trained, str(base), name, replicas=replicas)
    assert len({tuple(uids) for uids, _ in alone}) == STEPS
    for steps in found:
        assert [uids for uids, _ in steps] == [uids for uids, _ in alone]
        assert np.array_equal(steps[0][1], alone[0][1])
    expected, lines = metric_lines(base / "alone"), metric_lines(base / name)
    assert len(expected) == len(lines) == STEPS
    for step, (one, other) in enumerate(zip(expected, lines, strict=True)):
        assert other == pytest.approx(one, abs=1e-5, rel=1e-5), step
    # They are those of a run that moves, not zeros.
    assert all(abs(line["loss/policy_avg"]) > 1e-3 for line in lines)
