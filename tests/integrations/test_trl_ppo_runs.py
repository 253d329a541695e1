"""TRL 1.12's PPO trainer in whole runs on our functions."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import set_seed

from rlhf_fast.integrations import trl as adapter
from tests.integrations.peers import installed
from tests.integrations.trl_cases import Recorder, ppo_models, ppo_settings

if installed("trl", "1.16.0", "1.12.0") == "1.16.0":
    pytest.skip("TRL 1.16 has no PPO", allow_module_level=True)
ppo = importlib.import_module("trl.experimental.ppo")

SERIES = (
    *("objective/kl", "objective/entropy", "objective/scores", "objective/rlhf_reward"),
    *("policy/approxkl_avg", "policy/clipfrac_avg", "policy/entropy_avg", "val/clipfrac_avg"),
    *("loss/policy_avg", "loss/value_avg"),
)


def theirs(folder: Path, **options: Any) -> tuple[Recorder, Any]:
    recorder = Recorder()
    args = ppo.PPOConfig(**ppo_settings(folder, **options))
    set_seed(0)  # numpy's too, which TRL shuffles by and does not seed
    trainer = ppo.PPOTrainer(args=args, callbacks=[recorder], **ppo_models())
    trainer.train()
    return recorder, trainer


@pytest.mark.parametrize("whiten", [False, True])
def test_training_on_our_functions_has_the_same_losses(whiten: bool, tmp_path: Path) -> None:
    own, _ = theirs(tmp_path / "own", whiten_rewards=whiten)
    with adapter.patched() as report:
        assert "trl.experimental.ppo.ppo_trainer.masked_whiten" in report.replaced
        swapped, _ = theirs(tmp_path / "swapped", whiten_rewards=whiten)
    for name in SERIES:
        assert len(own.series(name)) == 3
        torch.testing.assert_close(swapped.series(name), own.series(name), rtol=1e-5, atol=1e-5)
    assert own.series("loss/value_avg")[0] != own.series("loss/value_avg")[2]
