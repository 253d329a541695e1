"""A PPO step of verl by verl's own engines on its own batches, with our functions and without."""

from __future__ import annotations

import importlib
from dataclasses import replace
from typing import Any

import pytest
import torch

from bench.integrations import verl_run
from bench.integrations.stubs import stand_in
from rlhf_fast.integrations import verl as adapter
from rlhf_fast.integrations.verl_rollout import Rollout
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


def test_a_loop_generates_from_the_weights_that_verls_engine_trains() -> None:
    """The rollout's batch goes through the whole step as it is; the next one sees the step."""
    sizes = verl_run.TINY
    config = importlib.import_module("verl.workers.config").RolloutConfig(
        name="rlhf_fast",
        tensor_model_parallel_size=1,
        response_length=sizes.response,
        calculate_log_probs=True,
        temperature=0.9,
    )
    with adapter.patched():
        run, rollout = verl_run.Run(sizes), Rollout(config, None)
        parameters = list(run.actor.module.parameters())
        rollout.share(run.actor.module)

        def generated(**meta: bool) -> Any:
            prompts = run.batch().batch.select("prompts", "attention_mask")
            prompts["input_ids"] = prompts["prompts"]
            prompts["attention_mask"] = prompts["attention_mask"][:, : sizes.prompt]
            special = {"eos_token_id": 3, "pad_token_id": verl_run.PAD}
            return rollout.generate_sequences(
                importlib.import_module("verl").DataProto(batch=prompts, meta_info=special | meta)
            )

        before = generated(do_sample=False).batch["responses"]
        for _ in range(3):
            batch = generated()
            scores = torch.randn(batch.batch["responses"].shape) * batch.batch["response_mask"]
            batch.batch["token_level_scores"] = scores
            batch.meta_info["temperature"] = config.temperature
            old = run.inferred(run.actor, batch, "log_probs")
            mask = batch.batch["response_mask"].bool()
            drawn = batch.batch["rollout_log_probs"]
            torch.testing.assert_close(drawn[mask], old[mask], rtol=1e-4, atol=1e-4)
            run.step(batch)
        after = generated(do_sample=False).batch["responses"]
    assert not torch.equal(before, after)
    assert all(a is b for a, b in zip(parameters, run.actor.module.parameters(), strict=True))


def test_the_step_runs_on_ours() -> None:
    """Every function of this path, so that a comparison of verl with itself is noticed."""
    losses = importlib.import_module("verl.workers.utils.losses")
    engine = importlib.import_module("verl.workers.engine.fsdp.transformer_impl")
    with adapter.patched():
        places = (engine.logprobs_from_logits, losses.compute_value_loss, losses.kl_penalty)
        places += (losses.get_policy_loss_fn("vanilla"), engine.verl_F.entropy_from_logits)
        assert all(f.__module__.startswith("rlhf_fast.") for f in places)
