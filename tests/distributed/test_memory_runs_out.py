"""Memory that runs out on several ranks: done again in halves, or ended by the rank it befell."""

import dataclasses
import json
import time
from pathlib import Path

import pytest
import torch

from rlhf_fast.config_distributed import DistributedConfig
from rlhf_fast.distributed.fault_board import FaultBoard
from rlhf_fast.distributed.work import WorldSplit
from rlhf_fast.distributed.world import World
from rlhf_fast.engine.shard_gather import Gatherer
from rlhf_fast.engine.tensor_parallel import TensorParallel
from rlhf_fast.errors import PeerError, RewardError, RLHFError
from rlhf_fast.models.rewards import ModelReward
from rlhf_fast.models.roles import RewardModel
from rlhf_fast.ppo.out_of_memory import in_halves
from rlhf_fast.ppo.split_rewards import DealtReward
from rlhf_fast.stages.generation import engine_of
from rlhf_fast.stages.ppo import PPOTrainer
from rlhf_fast.stages.ranks import on_ranks_of
from tests.distributed.ranks import on_ranks
from tests.models.tiny import tokenizer
from tests.ppo.synthetic import learner, random_rollout, small_config, tiny_critic
from tests.stages.killed_runs import ppo_config
from tests.stages.tiny_runs import demonstrations, metric_lines, model_directory, write_rows

PATIENCE = 1.0


# ---- the agreement ------------------------------------------------------------------------------


def _agreed(world: World):
    world = dataclasses.replace(world, patience_seconds=PATIENCE)
    together = [world.any_exhausted(flag) for flag in (False, world.rank == 1, False, True)]
    halved = []
    split = WorldSplit(world)

    def call():
        if len(halved) < 2 and world.rank == 0:
            raise torch.OutOfMemoryError("as a device says it")

    redone = in_halves(call, split, halve=lambda: halved.append(1))
    return together, redone, len(halved)


def test_ranks_agree_that_one_ran_out_and_do_it_again_together():
    assert on_ranks(2, _agreed) == [([False, True, False, True], 2, 2)] * 2


@pytest.mark.parametrize("flag", [False, True])
def test_a_rank_comes_once_its_device_is_through_with_its_collectives(monkeypatch, flag):
    """The host of a GPU is ahead of it: what it still waits for would meet another rank's next."""
    done = []

    class Board(FaultBoard):
        def come(self, wait_seconds=0.0):
            done.append("came")
            return True

    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: done.append(device))
    monkeypatch.setattr(World, "any", lambda world, flag: flag)
    device = torch.device("cuda", 1)
    world = World(device, rank=1, size=2, mesh=object(), board=Board(None, 1, 2))
    assert world.any_exhausted(flag) == flag
    assert done == [device, "came"]


def _stranded(world: World):
    """Rank 1 runs out inside of work in which rank 0 waits for it."""
    world = dataclasses.replace(world, patience_seconds=PATIENCE)
    halved = []

    def call():
        if world.rank == 1:
            raise torch.OutOfMemoryError("as a device says it")
        world.sum(torch.ones(1))

    start = time.monotonic()
    try:
        with on_ranks_of(world, DistributedConfig()):
            in_halves(call, WorldSplit(world), halve=lambda: halved.append(1))
    except RLHFError as error:
        return error.code, str(error), len(halved), time.monotonic() - start
    return None


def test_a_rank_that_others_wait_for_says_so_and_ends_the_job():
    waited, alone = on_ranks(2, _stranded)
    assert (waited[0], waited[2]) == ("RF7059", 0)
    assert (alone[0], alone[2]) == ("RF7063", 1)
    assert "out of memory on rank 1" in alone[1]
    assert "--max-restarts" in alone[1]
    assert max(waited[3], alone[3]) < 20 * PATIENCE  # not the 60 s of a collective


def _second_fails(call, fails):
    """`call`, for which the memory does not suffice the second time."""
    calls = []

    def checked(*arguments, **options):
        calls.append(1)
        if fails and len(calls) == 2:
            raise torch.OutOfMemoryError("as a device says it")
        return call(*arguments, **options)

    return checked


def _read_again(world: World | None, what: str):
    """What is read of a rollout, the second forward of every rank having run out of memory."""
    config = small_config(bootstrap_truncated=True, old_logprobs="rollout")
    ppo = learner(dataclasses.replace(config, microbatch_tokens=48))
    rollout = random_rollout(9, 2, seed=3)
    rollout = dataclasses.replace(rollout, ended=torch.zeros_like(rollout.ended))
    if world is not None:
        ppo.roles.split = WorldSplit(world)
    fails = world is not None
    if what == "values":
        ppo.roles.critic.values = _second_fails(ppo.roles.critic.values, fails)
        found = ppo._bootstrap(rollout)
    else:
        ppo.roles.actor.logprobs = _second_fails(ppo.roles.actor.logprobs, fails)
        with torch.no_grad():
            found = ppo.scoring._recomputed(rollout, range(len(rollout)))
    assert ppo.budget.tokens == (24 if fails else 48)
    return found.tolist()


@pytest.mark.parametrize("what", ["values", "log-probs"])
def test_what_was_read_before_memory_ran_out_does_not_count_beside_what_is_read_again(what):
    one, other = on_ranks(2, _read_again, what, replicas=2)
    assert one == other
    expected = torch.tensor(_read_again(None, what))
    torch.testing.assert_close(torch.tensor(one), expected, rtol=1e-5, atol=1e-5)


# ---- whole runs ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("memory")
    model_directory(folder / "sft" / "model")
    write_rows(folder / "train.jsonl", demonstrations(24))
    prompts = [{"prompt": row["prompt"]} for row in demonstrations(20, seed=3)]
    write_rows(folder / "prompts.jsonl", prompts)
    return folder


def _repeats(completions, **_):
    return [float(len(text)) for text in completions]


def _trainer(base: str, name: str, weights: str, world: World | None) -> PPOTrainer:
    config = ppo_config(Path(base), Path(base))
    config = dataclasses.replace(
        config,
        run=dataclasses.replace(config.run, output_dir=str(Path(base) / name), save_every=1),
        reward=dataclasses.replace(config.reward, model=""),
        distributed=DistributedConfig(weights=weights),
        total_steps=3,
        microbatch_tokens=96,
    )
    return PPOTrainer(config, reward_function=_repeats, quiet=True, world=world)


def _raises_once(module, when):
    """A layer of the model runs out of memory the first time that `when()` holds."""
    left = [1]

    def check(*_):
        if left[0] and when():
            left[0] = 0
            raise torch.OutOfMemoryError("as a device says it")

    list(module.modules())[-3].register_forward_pre_hook(check)


def _run(world: World, base: str, name: str, weights: str, where: str):
    """PPO; memory runs out in step 2, on rank 1 or (`all`) on both. Returns how it ended."""
    world = dataclasses.replace(world, patience_seconds=PATIENCE)
    trainer = _trainer(base, name, weights, world)
    engine = engine_of(trainer.roles.generator)
    on_all = where.startswith("all")
    mine = world.rank == 1 or on_all
    learner = trainer.learner

    def in_update():
        return mine and learner.steps == 1 and torch.is_grad_enabled()

    def in_scoring():
        return mine and learner.steps == 1 and engine.mode.value == "score"

    if where.endswith("update"):
        _raises_once(trainer.roles.actor.module, in_update)
    elif where.endswith("scoring"):
        _raises_once(trainer.roles.critic.module, in_scoring)
    elif where == "decoding":
        summed = TensorParallel.sum

        def exhausted(parallel, x):
            if mine and learner.steps == 1:
                raise torch.OutOfMemoryError("as a device says it")
            return summed(parallel, x)

        TensorParallel.sum = exhausted
    elif where == "gathering":
        left, take = [1], Gatherer.take_room

        def no_room(gatherer, pairs):
            if left[0] and mine and learner.steps == 1:
                left[0] = 0
                raise torch.OutOfMemoryError("as a device says it")
            take(gatherer, pairs)

        engine.view.gatherer.take_room = no_room.__get__(engine.view.gatherer)
    try:
        with on_ranks_of(world, DistributedConfig()):
            trainer.train()
    except RLHFError as error:
        return error.code, learner.budget.tokens, learner.rollout_halvings
    return None, learner.budget.tokens, learner.rollout_halvings


@pytest.fixture(scope="module")
def unbroken(base: Path):
    _trainer(str(base), "unbroken", "auto", None).train()
    return metric_lines(base / "unbroken")


def _assert_followed(base: Path, name: str, expected) -> None:
    """The same steps: what counts attempts apart."""
    for line, wanted in zip(metric_lines(base / name), expected, strict=True):
        for metrics in (line, wanted):
            for key in ("policy/redone_minibatches", "rollout/redone", "rollout/preemptions"):
                metrics.pop(key, None)
        shared = {key: value for key, value in wanted.items() if key in line}
        assert len(shared) > 20
        if line["step"] <= 2:  # later, rounding differs enough to be seen
            assert line == pytest.approx(shared, abs=1e-4, rel=1e-4), name


@pytest.mark.parametrize(
    ("where", "weights"),
    [("all update", "tp"), ("all scoring", "tp"), ("gathering", "gather")],
)
def test_ranks_that_run_out_together_go_on_together(base, unbroken, where, weights):
    found = on_ranks(2, _run, str(base), where, weights, where)
    assert found[0] == found[1]
    code, tokens, halvings = found[0]
    assert code is None
    assert (tokens < 96, halvings) == (where != "gathering", int(where == "gathering"))
    _assert_followed(base, where, unbroken)


@pytest.mark.parametrize("where", ["update", "decoding"])
def test_the_next_run_starts_with_half_of_what_one_rank_had_no_memory_for(base, unbroken, where):
    name = f"lone {where}"
    waited, alone = on_ranks(2, _run, str(base), name, "tp", where)
    assert waited[0] == "RF7059"
    assert alone[0] == "RF7063"
    written = json.loads((base / name / "out_of_memory.json").read_text())
    assert written["token_budget"]["tokens"] == alone[1] == (48 if where == "update" else 96)
    assert written["rollout_halvings"] == (where == "decoding")
    found = on_ranks(2, _run, str(base), name, "tp", "nowhere")
    assert found == [(None, alone[1], alone[2])] * 2
    assert len(metric_lines(base / name)) == 3
    _assert_followed(base, name, unbroken)


# ---- reward models ------------------------------------------------------------------------------


class _Judge:
    """Refuses one sample before any forward; its forwards are counted."""

    splits = True

    def __init__(self, bad):
        self.bad, self.forwards = bad, 0

    def prepare(self, rollout, samples, *, at_once=False):
        if self.bad in samples:
            raise RewardError("RF5012", "too long")

        def start():
            self.forwards += 1
            raise AssertionError("a forward that the other rank does not make")

        return start


def _refused(world: World):
    judge = _Judge(bad=3)
    try:
        DealtReward(judge, WorldSplit(world), token_budget=64).score(random_rollout(5, 2))
    except (RewardError, PeerError) as error:
        return error.code, error.exit_code, judge.forwards
    return None


def test_a_sample_that_is_refused_stops_every_rank_before_a_forward():
    found = on_ranks(2, _refused)
    assert sorted(found) == [("RF5012", 2, 0), ("RF7059", 2, 0)]


def _judge(limit=None):
    """A reward model, and the tokens of its forwards; above the limit memory runs out."""
    model, seen = RewardModel(tiny_critic(7)), []
    hidden = model._last_hidden

    def counted(sequences):
        seen.append(sequences.ids.numel())
        if limit is not None and seen[-1] > limit:
            raise torch.OutOfMemoryError("as a device says it")
        return hidden(sequences)

    model._last_hidden = counted
    return model, seen


def test_a_reward_model_alone_reads_again_in_halves():
    rollout = random_rollout(5, 2)
    expected = _reward(_judge()[0], 4096).score(rollout)
    model, seen = _judge(40)
    found = _reward(model, 96).score(rollout)
    torch.testing.assert_close(found.scores, expected.scores, rtol=1e-5, atol=1e-6)
    assert seen[0] > 40 > max(seen[-2:])
    none, _ = _judge(1)
    with pytest.raises(torch.OutOfMemoryError):
        _reward(none, 96).score(rollout)


def _reward(model, tokens, **options):
    return ModelReward(model, tokenizer(), tokenizer(), token_budget=tokens, **options)


def _dealt(world: World):
    """Texts that the judge's tokenizer makes longer than the policy's, and then too little room."""
    rollout = random_rollout(5, 2)
    long = _reward(
        *(_judge()[0], 16), retokenize=True, render=lambda prompt, text: f"{prompt} {text} " * 3
    )
    model, seen = _judge()
    long.reward_model = model
    scores = DealtReward(long, WorldSplit(world), token_budget=48).score(rollout).scores
    assert max(seen) > 48  # more than the rollout's count, and in one forward all the same
    packs = len(seen)
    limited, _ = _judge(20)
    reward = DealtReward(_reward(limited, 96), WorldSplit(world), token_budget=96)
    halves = reward.score(rollout).scores
    return scores.tolist(), packs, halves.tolist(), reward.budget.tokens


def test_ranks_make_equally_many_forwards_whatever_the_judge_s_tokens():
    one, other = on_ranks(2, _dealt)
    assert one == other
    expected = _reward(_judge()[0], 4096).score(random_rollout(5, 2)).scores
    torch.testing.assert_close(torch.tensor(one[2]), expected, rtol=1e-5, atol=1e-6)
    assert one[3] < 96
