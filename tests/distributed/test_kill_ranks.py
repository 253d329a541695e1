"""One rank of a PPO job is killed at a random instant, once; `kill_ranks` does it 20 times."""

import random
import time
from pathlib import Path

import pytest

from rlhf_fast.distributed.world import World
from rlhf_fast.stages.ppo import PPOTrainer
from tests.distributed.kill_ranks import config_of, exported, kill_one, prepare
from tests.distributed.ranks import on_ranks

pytestmark = [pytest.mark.slow, pytest.mark.long]


def _to_the_end(world: World, base: str, out: str) -> int:
    return PPOTrainer(config_of(Path(base), Path(out)), quiet=True, world=world).train().steps


def test_a_killed_ppo_job_goes_on_to_the_bits_of_an_unbroken_one(tmp_path):
    seed = time.time_ns()
    prepare(tmp_path)
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    rank, instant, _ = kill_one(tmp_path, killed, random.Random(seed))
    said = f"seed {seed}: rank {rank} killed {instant:.2f} s after its first step"
    steps = [on_ranks(2, _to_the_end, str(tmp_path), str(out)) for out in (killed, whole)]
    assert steps[0] == steps[1], said
    expected = exported(whole)
    assert expected
    assert exported(killed) == expected, said
