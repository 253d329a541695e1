"""Our policy losses against those of verl's registry, asked for as verl's workers ask for them."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bench.integrations.stubs import stand_in
from rlhf_fast.integrations import verl as adapter
from tests.integrations.peers import EXAMPLES, Batch, batches, compare, installed

installed("verl", "0.9.1")
stand_in("verl")

core_algos = importlib.import_module("verl.trainer.ppo.core_algos")
worker_config = importlib.import_module("verl.workers.config")

MODES = (
    *("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-sum-norm"),
    "seq-mean-token-mean",
)
TOTALS = st.sampled_from(
    (
        {},
        {"dp_size": 2, "batch_num_tokens": 17, "global_batch_size": 5, "loss_scale_factor": 40},
    )
)
Loss = Callable[..., tuple[Tensor, dict[str, float]]]


def make_config(totals: dict[str, Any] | None = None, **options: Any) -> Any:
    """verl's own; the defaults are those of its YAML."""
    cov = {"clip_cov_ratio": 0.3, "clip_cov_lb": -0.5, "clip_cov_ub": 2.0}
    fixed = {"strategy": "fsdp", "rollout_n": 1, "use_dynamic_bsz": True, "clip_ratio_high": 0.28}
    policy_loss = worker_config.PolicyLossConfig(**cov | options.pop("policy_loss", {}))
    config = worker_config.ActorConfig(**fixed | {"policy_loss": policy_loss} | options)
    config.global_batch_info.update(totals or {})
    return config


def theirs_and_ours(name: str) -> tuple[Loss, Loss]:
    theirs = core_algos.get_policy_loss_fn(name)
    with adapter.patched():
        ours = core_algos.get_policy_loss_fn(name)
    assert ours is not theirs
    assert ours.__module__ == "rlhf_fast.integrations.verl_losses"
    return theirs, ours


def keys_and_values(metrics: dict[str, float]) -> tuple[list[str], Tensor]:
    return list(metrics), torch.tensor(list(metrics.values()))


def both(name: str, batch: Batch, mode: str, config: Any, weighted: bool, scale: float) -> None:
    old, advantages = batch.floats(), batch.floats()
    new, mask = old + batch.floats(scale=scale), batch.mask.long()
    weights = batch.floats().exp() if weighted else None
    keys = []

    def call(function: Loss) -> Callable[..., Any]:
        def run(x: Tensor) -> tuple[Tensor, ...]:
            same = [t if t is None else t.to(x.dtype) for t in (old, advantages, weights)]
            torch.manual_seed(5)
            loss, metrics = function(
                *(same[0], x, same[1], mask, mode, config), rollout_is_weights=same[2]
            )
            names, values = keys_and_values(metrics)
            keys.append(names)
            return loss, values

        return run

    theirs, ours = theirs_and_ours(name)
    compare(call(theirs), call(ours), new)
    assert all(names == keys[0] for names in keys)


@pytest.mark.parametrize("mode", MODES)
@EXAMPLES
@given(batch=batches(), totals=TOTALS, weighted=st.booleans(), scale=st.sampled_from((0.3, 3.0)))
def test_gspo(
    batch: Batch, mode: str, totals: dict[str, Any], weighted: bool, scale: float
) -> None:
    both("gspo", batch, mode, make_config(totals), weighted, scale)


def test_gspo_stops_learning_from_a_ratio_past_its_bound_as_theirs() -> None:
    new = torch.full((1, 3), 11.0, requires_grad=True)
    zeros, mask = torch.zeros(1, 3), torch.ones(1, 3)
    for function in theirs_and_ours("gspo"):
        loss, _ = function(zeros, new, -torch.ones(1, 3), mask, config=make_config())
        assert float(loss) == pytest.approx(float(torch.tensor(10.0).exp()))
        assert not torch.autograd.grad(loss, new)[0].any()


@pytest.mark.parametrize("mode", MODES)
@EXAMPLES
@given(
    batch=batches(columns=20).filter(lambda b: b.dtype == torch.float32),
    totals=TOTALS,
    weighted=st.booleans(),
)
def test_clip_cov_drops_the_tokens_that_theirs_drops(
    batch: Batch, mode: str, totals: dict[str, Any], weighted: bool
) -> None:
    """fp32 alone: in bf16 rounding decides which tokens there are to draw from."""
    both("clip_cov", batch, mode, make_config(totals), weighted, 0.3)


def test_clip_cov_drops_something_or_nothing_was_compared() -> None:
    batch = Batch(3, 4, 20, "right", torch.float32)
    old, advantages, mask = batch.floats(), batch.floats(), batch.mask.long()
    for function in theirs_and_ours("clip_cov"):
        torch.manual_seed(1)
        _, metrics = function(old, old + 0.01, advantages, mask, config=make_config())
        assert metrics["actor/pg_clipfrac"] > 0.1


def test_clip_cov_with_an_empty_band_is_the_clipped_loss() -> None:
    batch = Batch(3, 4, 8, "right", torch.float32)
    config = make_config(policy_loss={"clip_cov_lb": 100.0, "clip_cov_ub": 101.0})
    both("clip_cov", batch, "token-mean", config, False, 0.3)


def test_clip_cov_refuses_a_share_of_0() -> None:
    ones = torch.ones(1, 3)
    for function in theirs_and_ours("clip_cov"):
        with pytest.raises((ValueError, AssertionError), match="0"):
            function(ones, ones, ones, ones, config=make_config(policy_loss={"clip_cov_ratio": 0}))


@pytest.mark.parametrize("name", ["vanilla", "gspo", "clip_cov", "rlhf_fast"])
def test_what_masked_slots_hold_changes_neither_loss_nor_gradient(name: str) -> None:
    batch = Batch(2, 3, 8, "holes", torch.float32)
    old, advantages = batch.floats(), batch.floats()
    new, mask = old + batch.floats(scale=0.2), batch.mask.long()
    with adapter.patched():
        function = core_algos.get_policy_loss_fn(name)
    results = []
    for fill in (0.0, torch.nan):
        tensors = [x.masked_fill(~batch.mask, fill) for x in (old, new, advantages)]
        tensors[1].requires_grad_()
        torch.manual_seed(0)
        loss, metrics = function(*tensors, mask, config=make_config())
        (gradient,) = torch.autograd.grad(loss, tensors[1])
        results.append((loss.detach(), gradient, keys_and_values(metrics)[1]))
    for clean, poisoned in zip(*results, strict=True):
        assert torch.equal(clean, poisoned)


# ---- the name of our own ------------------------------------------------------------------------


def test_without_the_adapter_the_name_of_ours_is_unknown_to_verl() -> None:
    with pytest.raises(ValueError, match="rlhf_fast"):
        core_algos.get_policy_loss_fn("rlhf_fast")
    with adapter.patched() as report:
        assert "verl.trainer.ppo.core_algos.POLICY_LOSS_REGISTRY.rlhf_fast" in report.replaced
        core_algos.get_policy_loss_fn("rlhf_fast")
    with pytest.raises(ValueError, match="rlhf_fast"):
        core_algos.get_policy_loss_fn("rlhf_fast")


def test_the_name_of_ours_is_vanilla_and_a_bound_of_null_leaves_the_dual_clip_out() -> None:
    batch = Batch(2, 3, 8, "right", torch.float32)
    old, mask, advantages = batch.floats(), batch.mask.long(), -batch.floats().abs()
    new = old + batch.floats(scale=3.0)
    theirs = core_algos.get_policy_loss_fn("vanilla")
    with adapter.patched():
        ours = core_algos.get_policy_loss_fn("rlhf_fast")
    inputs = (old, new, advantages, mask, "token-mean")
    expected, _ = theirs(*inputs, make_config())
    torch.testing.assert_close(ours(*inputs, make_config())[0], expected)
    unbounded, _ = theirs(*inputs, make_config(clip_ratio_c=1e9))
    found, metrics = ours(*inputs, make_config(clip_ratio_c=None))
    torch.testing.assert_close(found, unbounded)
    assert float(found) > float(expected)
    assert metrics["actor/pg_clipfrac_lower"] == 0.0


def test_the_bypass_of_old_log_probs_runs_on_ours() -> None:
    """verl's own function, which calls the clipped loss by its name in the module."""
    batch = Batch(2, 3, 8, "right", torch.float32)
    old, mask, advantages = batch.floats(), batch.mask.long(), batch.floats()
    correction = importlib.import_module("verl.trainer.config").RolloutCorrectionConfig
    config = make_config(
        policy_loss={"rollout_correction": correction(bypass_mode=True, loss_type="ppo_clip")}
    )
    inputs = (old, old + batch.floats(scale=0.3), advantages, mask, "token-mean", config)
    function = core_algos.get_policy_loss_fn("bypass_mode")
    expected, metrics = function(*inputs)
    with adapter.patched():
        found, same = function(*inputs)
    torch.testing.assert_close(found, expected)
    assert list(metrics) == list(same)
