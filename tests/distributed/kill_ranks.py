"""Kill -9 of one rank at random instants of a PPO run under torchrun, again and again.

    python -m tests.distributed.kill_ranks [--runs 20] [--seed 0]

Each run: a PPO job on two ranks that hold every model between them, one rank of which is killed at
a random instant after its first step; how long torchrun takes to end the job; the same command once
more, which goes on from the last checkpoint; and whether it ends in the bytes of a run that nobody
killed. Minutes; in the suite `test_kill_ranks` does it once, and `test_torchrun` with SFT.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

from rlhf_fast.config import PPOConfig
from rlhf_fast.stages.reward_model import run_reward_model
from rlhf_fast.stages.sft import run_sft
from tests.distributed.test_torchrun import LIMIT_SECONDS, start, wait_for_steps, workers_of
from tests.stages.killed_runs import ppo_config, reward_config, sft_config
from tests.stages.tiny_runs import demonstrations, model_directory, ranked, write_rows

STEPS = 12


def prepare(base: Path) -> None:
    """Models and data that all runs start from."""
    model_directory(base / "base")
    write_rows(base / "train.jsonl", demonstrations(24))
    write_rows(base / "ranked.jsonl", ranked(24, 3))
    prompts = [{"prompt": row["prompt"]} for row in demonstrations(20, seed=3)]
    write_rows(base / "prompts.jsonl", prompts)
    run_sft(sft_config(base, base), quiet=True)
    run_reward_model(reward_config(base, base), quiet=True)


def config_of(base: Path, out: Path) -> PPOConfig:
    """A run whose checkpoints come at every step, written in the background."""
    config = ppo_config(base, base)
    run = dataclasses.replace(config.run, output_dir=str(out / "ppo"), save_every=1)
    return dataclasses.replace(config, run=run, total_steps=STEPS)


def exported(out: Path) -> dict[str, bytes]:
    """The bytes of every weight that a run has left."""
    return {
        f"{name}/{file.name}": file.read_bytes()
        for name in ("model", "critic")
        for file in sorted((out / "ppo" / name).glob("*.safetensors"))
    }


def run_to_the_end(config: PPOConfig) -> None:
    job = start("ppo", config)
    printed, _ = job.communicate(timeout=LIMIT_SECONDS)
    assert job.returncode == 0, printed


def kill_one(base: Path, out: Path, draw: random.Random) -> tuple[int, float, float]:
    """(rank, seconds after its first step, seconds that the job lived on)."""
    config, rank = config_of(base, out), draw.randrange(2)
    job = start("ppo", config)
    wait_for_steps(job, out / "ppo" / "metrics.jsonl", 1)
    instant = draw.uniform(0.0, 2.0)
    time.sleep(instant)
    if job.poll() is None:
        os.kill(workers_of(job)[rank], signal.SIGKILL)
    began = time.monotonic()
    job.communicate(timeout=LIMIT_SECONDS)
    return rank, instant, time.monotonic() - began


def main() -> int:
    """Run, print a line a run, and fail if any differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    draw, different = random.Random(options.seed), 0
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        prepare(base)
        run_to_the_end(config_of(base, base / "whole"))
        expected = exported(base / "whole")
        assert expected
        for number in range(options.runs):
            out = base / f"killed{number}"
            rank, instant, lived = kill_one(base, out, draw)
            run_to_the_end(config_of(base, out))
            same = exported(out) == expected
            different += not same
            print(
                f"run {number + 1}: rank {rank} killed {instant:.2f} s after its first step, the "
                f"job ended {lived:.1f} s later; resumed to {'the same' if same else 'OTHER'} bits",
                flush=True,
            )
    print(f"{options.runs - different} of {options.runs} runs ended in the bits of an unbroken one")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
