"""Real jobs of torchrun: a rank that raises, one that is killed, and a stop."""

import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rlhf_fast.config import SFTConfig
from rlhf_fast.config_loading import to_yaml
from rlhf_fast.distributed.world import World
from rlhf_fast.stages.sft import run_sft
from tests.distributed.ranks import on_ranks
from tests.stages.killed_runs import ppo_config, reward_config, sft_config
from tests.stages.tiny_runs import (
    checkpoint_contents,
    demonstrations,
    metric_lines,
    model_directory,
    ranked,
    write_rows,
)

REPOSITORY = Path(__file__).parents[2]
# Of one job on a busy machine; each takes seconds.
LIMIT_SECONDS = 240

# A reward function whose module makes the second rank run out of memory, once, in its third step.
FULL = """
import os
import torch
from rlhf_fast.ppo.trainer import PPOLearner

backward = PPOLearner._backward


def exhausted(learner, microbatch, statistics):
    if learner.steps == 2 and os.environ["RANK"] == "1":
        if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            object.__setattr__(learner.roles.split.world, "patience_seconds", 1.0)
            raise torch.OutOfMemoryError("as a device says it")
    return backward(learner, microbatch, statistics)


PPOLearner._backward = exhausted


def full(completions, **columns):
    return [float(len(text)) for text in completions]
"""

# One whose module takes long to load.
SLOW = """
import os
import time
from pathlib import Path

Path(__file__).with_name(f"loading.{os.environ['RANK']}").touch()
time.sleep(60)
"""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("torchrun")
    model_directory(folder / "base")
    write_rows(folder / "train.jsonl", demonstrations(24))
    write_rows(folder / "ranked.jsonl", ranked(24, 3))
    write_rows(folder / "prompts.jsonl", demonstrations(20, seed=3))
    (folder / "boom.py").write_text(
        "def boom(completions, **columns):\n    raise ValueError('no such thing')\n"
    )
    (folder / "full.py").write_text(FULL)
    (folder / "slow.py").write_text(SLOW)
    return folder


def start(command: str, config, *changes: str, restarts: int = 0) -> subprocess.Popen:
    folder = Path(config.run.output_dir).parent
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(to_yaml(config))
    paths = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "kernels")])
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", "2", "--max-restarts", str(restarts)),
            *("-m", "rlhf_fast", command),
            *("--config", str(folder / "config.yaml"), *changes),
        ],
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def workers_of(job: subprocess.Popen) -> list[int]:
    """The ranks' process ids, in order."""
    children = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
    return [int(pid) for pid in children]


def wait_for_steps(job: subprocess.Popen, metrics: Path, steps: int) -> None:
    deadline = time.monotonic() + LIMIT_SECONDS
    while time.monotonic() < deadline:
        if metrics.exists() and metrics.read_text().count("\n") >= steps:
            return
        assert job.poll() is None, job.communicate()[0]
        time.sleep(0.02)
    raise AssertionError("the job does not get on")


def test_a_fault_before_the_ranks_have_joined_is_told_once(base):
    config = ppo_config(base, base / "early")
    job = start("ppo", config, f"actor={base / 'base'}", "distributed.replicas=3")
    printed, _ = job.communicate(timeout=LIMIT_SECONDS)
    assert job.returncode == 1
    assert printed.count("RF7050: 2 ranks cannot be 3 replicas") == 1


@pytest.mark.long
def test_a_stop_signal_while_ranks_load_is_told_once(base):
    config = ppo_config(base, base / "loading")
    job = start(
        *("ppo", config, f"actor={base / 'base'}", "reward.model="),
        f"reward.function={base / 'slow.py'}:slow",
    )
    deadline = time.monotonic() + LIMIT_SECONDS
    while len(list(base.glob("loading.*"))) < 2:
        assert time.monotonic() < deadline
        assert job.poll() is None, job.communicate()[0]
        time.sleep(0.02)
    job.send_signal(signal.SIGTERM)
    printed, _ = job.communicate(timeout=LIMIT_SECONDS)
    assert printed.count("RF8303: SIGTERM: the run stopped before its first step") == 1


@pytest.mark.long
def test_a_reward_function_that_raises_is_told_once(base):
    config = ppo_config(base, base / "raises")
    job = start(
        *("ppo", config, f"actor={base / 'base'}", "reward.model="),
        f"reward.function={base / 'boom.py'}:boom",
    )
    printed, _ = job.communicate(timeout=LIMIT_SECONDS)
    assert job.returncode == 1
    assert printed.count("RF5004: the reward function raised ValueError: no such thing") == 1
    ours = printed.split("Traceback")[0]  # what follows is torchrun's own
    assert "RF9001" not in printed
    assert "PeerError" not in printed
    assert ours.count("to do:") == 1


@pytest.mark.long
def test_torchrun_starts_again_with_half_of_what_one_rank_had_no_memory_for(base):
    config = ppo_config(base, base / "full")
    job = start(
        *("ppo", config, f"actor={base / 'base'}", "reward.model=", "total_steps=4"),
        *(f"reward.function={base / 'full.py'}:full", "run.save_every=1"),
        restarts=1,
    )
    printed, _ = job.communicate(timeout=LIMIT_SECONDS)
    assert job.returncode == 0, printed
    assert printed.count("RF7063: out of memory on rank 1") == 1
    assert "an earlier run ran out of memory: 64 tokens in a forward" in printed
    assert [line["step"] for line in metric_lines(base / "full" / "ppo")] == [1, 2, 3, 4]


def constant(base: Path, out: Path, steps: int) -> SFTConfig:
    """Whose steps do not depend on how many are to come."""
    config = sft_config(base, out)
    return dataclasses.replace(
        config,
        max_steps=steps,
        optim=dataclasses.replace(config.optim, schedule="constant"),
        run=dataclasses.replace(config.run, save_every=1),
    )


def _sft(world: World, base: str, out: str, steps: int) -> int:
    return run_sft(constant(Path(base), Path(out), steps), quiet=True, world=world).steps


def test_a_killed_rank_ends_the_job_which_then_goes_on_to_the_same_bits(base):
    out, whole = base / "killed", base / "whole"
    job = start("sft", constant(base, out, 100000))
    wait_for_steps(job, out / "sft" / "metrics.jsonl", 3)
    os.kill(workers_of(job)[1], signal.SIGKILL)
    printed, _ = job.communicate(timeout=LIMIT_SECONDS)
    assert job.returncode == 1
    assert printed.count("RF7052") <= 1  # torchrun may end the other before it has noticed
    assert "RF9001" not in printed
    saved = checkpoint_contents(out / "sft")[1]["step"]
    assert 2 <= saved <= len(metric_lines(out / "sft"))
    for folder in (out, whole):
        steps = on_ranks(2, _sft, str(base), str(folder), saved + 2)
        assert steps == [saved + 2] * 2
    expected, found = checkpoint_contents(whole / "sft")[0], checkpoint_contents(out / "sft")[0]
    assert set(found) == set(expected)
    for name, group in expected.items():
        for key, tensor in group.items():
            assert tensor.equal(found[name][key]), (name, key)


def test_a_stop_signal_to_torchrun_lets_all_ranks_save(base):
    out = base / "stopped"
    config = reward_config(base, out)
    job = start("rm", config, f"model={base / 'base'}", "max_steps=100000", "run.save_every=100000")
    wait_for_steps(job, out / "rm" / "metrics.jsonl", 2)
    job.send_signal(signal.SIGTERM)
    printed, _ = job.communicate(timeout=LIMIT_SECONDS)
    assert job.returncode == 1  # torchrun's own; its workers leave with 75
    assert printed.count("RF8301") == 1
    assert "RF9001" not in printed
    steps = len(metric_lines(out / "rm"))
    assert checkpoint_contents(out / "rm")[1]["step"] == steps
