"""verl's own trainer on CUDA devices, each worker beside a server that it hands its weights to."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.integrations import verl_loop
from tests.integrations.peers import installed
from tests.integrations.verl_processes import require_steps, trained

installed("verl", "0.9.1")
pytest.importorskip("ray")
pytest.importorskip("transfer_queue")


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_two_ranks_train_on_samples_of_mapped_weights(tmp_path: Path) -> None:
    """PPO with critic, reference, and parameters and moments off the device between phases.

    The server decodes with CUDA graphs and sleeps during updates; the worker maps its memory.
    """
    verl_loop.write_model(tmp_path / "model", verl_loop.build_model())
    verl_loop.write_run(tmp_path)
    ranks = min(2, torch.cuda.device_count())
    offload = [
        f"actor_rollout_ref.{role}.fsdp_config.{what}_offload=True"
        for role, what in (("actor", "param"), ("actor", "optimizer"), ("ref", "param"))
    ]
    printed = trained(
        *(tmp_path, ranks, *verl_loop.critic(tmp_path / "model"), *offload),
        "actor_rollout_ref.actor.use_kl_loss=True",
        "actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu=4",
        device="cuda",
    )
    require_steps(printed, "actor", "critic")
    assert [len(verl_loop.rollouts(tmp_path, step)) for step in (1, 2)] == [8, 8]
