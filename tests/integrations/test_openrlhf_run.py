"""A PPO step of OpenRLHF by its own trainers on its own experience, with ours and without."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from bench.integrations import openrlhf_run
from bench.integrations.stubs import stand_in
from rlhf_fast.integrations import openrlhf as adapter
from tests.integrations.peer_runs import compare_runs
from tests.integrations.peers import installed

installed("openrlhf", "0.11.2")
stand_in("openrlhf")


@pytest.fixture(autouse=True)
def _uncompiled() -> Iterator[None]:
    """`compute_entropy` is compiled at OpenRLHF; its maths is what is compared."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.mark.parametrize("kl_in_loss", [False, True])
@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-mean"])
def test_losses_gradients_and_weights_are_theirs(mode: str, kl_in_loss: bool) -> None:
    sizes = replace(openrlhf_run.TINY, loss_agg_mode=mode, kl_in_loss=kl_in_loss)
    found = compare_runs(lambda: openrlhf_run.Run(sizes), adapter.patched)
    assert abs(found["actor"]["policy_loss"]) > 1e-3
    assert found["actor"]["ppo_clip_ratio"] > 0.1
    assert found["actor"]["kl"] > 0.0
    assert found["actor"]["entropy_loss"] > 1.0
    assert found["critic"]["critic_loss"] > 0.0


def test_the_step_runs_on_ours() -> None:
    """Every function of this path, so that a comparison of OpenRLHF with itself is noticed."""
    actor = importlib.import_module("openrlhf.models.actor")
    maker = importlib.import_module(openrlhf_run.MAKER)
    trainer = importlib.import_module("openrlhf.trainer.ray.ppo_actor")
    with adapter.patched():
        places = (actor.log_probs_from_logits, actor.compute_entropy, maker.compute_reward)
        places += (maker.compute_approx_kl, trainer.compute_approx_kl, trainer.PolicyLoss.forward)
        places += (maker.RemoteExperienceMaker.get_advantages_and_returns,)
        assert all(f.__module__.startswith("rlhf_fast.") for f in places)
