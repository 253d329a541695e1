"""PPO under torchrun on two simulated devices, NCCL and FSDP's streams among them."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf_fast.config_distributed import DistributedConfig
from rlhf_fast.config_loading import to_yaml
from rlhf_fast.stages.ppo import run_ppo
from tests.stages.killed_runs import before_ppo, ppo_config
from tests.stages.tiny_runs import metric_lines

REPOSITORY = Path(__file__).parents[2]
LIMIT_SECONDS = 240

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        "simulated_cuda" not in sys.modules,
        reason="the ranks load the simulated device",
    ),
]


@pytest.mark.parametrize("replicas", [1, 2])
def test_two_devices_follow_one_process_on_the_host(tmp_path: Path, replicas: int) -> None:
    base = before_ppo(tmp_path)
    config = dataclasses.replace(ppo_config(base, base), total_steps=1)
    alone = dataclasses.replace(config.run, output_dir=str(tmp_path / "alone"))
    run_ppo(dataclasses.replace(config, run=alone))
    devices = dataclasses.replace(config.run, output_dir=str(tmp_path / "devices"), device="cuda")
    config = dataclasses.replace(
        config, run=devices, distributed=DistributedConfig(replicas=replicas)
    )
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    paths = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "kernels")])
    job = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", "2", "-m", "tests.simulated_cuda"),
            *("-m", "rlhf_fast", "ppo", "--config", str(tmp_path / "config.yaml")),
        ],
        cwd=REPOSITORY,
        env=os.environ
        | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "SIMULATED_CUDA_DEVICES": "2"},
        capture_output=True,
        text=True,
        timeout=LIMIT_SECONDS,
    )
    assert job.returncode == 0, job.stderr
    (expected,), (found,) = metric_lines(tmp_path / "alone"), metric_lines(tmp_path / "devices")
    for lines in (expected, found):
        lines.pop("rollout/preemptions", None)
    assert found == pytest.approx(expected, abs=1e-5, rel=1e-5)
