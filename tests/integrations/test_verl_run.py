"""A PPO step of verl by verl's own engines on its own batches, with our functions and without."""

from __future__ import annotations

import importlib
from dataclasses import replace

import pytest

from bench.integrations import verl_run
from bench.integrations.stubs import stand_in
from rlhf_fast.integrations import verl as adapter
from tests.integrations.peer_runs import compare_runs
from tests.integrations.peers import installed

installed("verl", "0.9.1")
stand_in("verl")
verl_run.one_process()


@pytest.mark.parametrize(
    "mode",
    [
        *("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-sum-norm"),
        "seq-mean-token-mean",
    ],
)
def test_losses_gradients_and_weights_are_theirs(mode: str) -> None:
    sizes = replace(verl_run.TINY, loss_agg_mode=mode)
    found = compare_runs(lambda: verl_run.Run(sizes), adapter.patched)
    assert abs(found["actor"]["actor/pg_loss"]) > 1e-3
    assert found["actor"]["actor/pg_clipfrac"] > 0.1
    assert found["critic"]["critic/vf_loss"] > 0.0
    assert found["reward"]["actor/reward_kl_penalty"] > 0.0


@pytest.mark.parametrize("name", ["gspo", "clip_cov"])
def test_other_policy_losses(name: str) -> None:
    sizes = replace(verl_run.TINY, loss_mode=name)
    compare_runs(lambda: verl_run.Run(sizes), adapter.patched)


def test_the_name_of_ours_by_verls_own_configuration() -> None:
    with adapter.patched():
        vanilla, ours = (
            verl_run.Run(replace(verl_run.TINY, loss_mode=name)).step()["actor"]
            for name in ("vanilla", "rlhf_fast")
        )
    assert vanilla == ours


def test_the_step_runs_on_ours() -> None:
    """Every function of this path, so that a comparison of verl with itself is noticed."""
    losses = importlib.import_module("verl.workers.utils.losses")
    engine = importlib.import_module("verl.workers.engine.fsdp.transformer_impl")
    with adapter.patched():
        places = (engine.logprobs_from_logits, losses.compute_value_loss, losses.kl_penalty)
        places += (losses.get_policy_loss_fn("vanilla"), engine.verl_F.entropy_from_logits)
        assert all(f.__module__.startswith("rlhf_fast.") for f in places)
