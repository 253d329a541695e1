"""Our functions against those of verl's own package."""

from __future__ import annotations

import importlib
import inspect
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bench.integrations.stubs import stand_in
from rlhf_fast.integrations import verl as adapter
from rlhf_fast.integrations import verl_losses
from tests.integrations.peers import EXAMPLES, Batch, batches, compare, installed

installed("verl", "0.9.1")
stand_in("verl")

verl_F = importlib.import_module("verl.utils.torch_functional")  # verl's own name for it
core_algos = importlib.import_module("verl.trainer.ppo.core_algos")
fused_head = importlib.import_module("verl.utils.experimental.torch_functional")

VOCAB = 13


def one(function: Callable[..., Any], *rest: Any) -> Callable[..., Any]:
    return lambda *tensors: (function(*tensors, *rest),)


# ---- log-probs and entropy ----------------------------------------------------------------------


@EXAMPLES
@given(batch=batches())
def test_logprobs(batch: Batch) -> None:
    logits, labels = batch.floats(VOCAB, scale=4.0), batch.labels(VOCAB)
    theirs, ours = verl_F.logprobs_from_logits, adapter.logprobs_from_logits
    compare(one(theirs, labels), one(ours, labels), logits)
    assert ours(logits, labels).dtype == torch.float32


def test_gradients_are_written_over_outputs_of_a_model_alone() -> None:
    leaf = torch.randn(3, 8, requires_grad=True)
    output = leaf * 1.0
    assert adapter.may_overwrite(output)
    assert adapter.may_overwrite(output.view(1, 3, 8))
    for logits in (leaf, leaf.view(1, 3, 8), leaf.detach(), output[:, :-1]):
        assert not adapter.may_overwrite(logits)


@EXAMPLES
@given(batch=batches())
def test_entropy(batch: Batch) -> None:
    logits = batch.floats(VOCAB, scale=4.0)
    compare(one(verl_F.entropy_from_logits), one(adapter.entropy_from_logits), logits)
    assert adapter.entropy_from_logits(logits).dtype == logits.dtype


@EXAMPLES
@given(batch=batches())
def test_entropy_in_chunks(batch: Batch) -> None:
    logits = batch.floats(VOCAB, scale=4.0).flatten(0, 1)
    ours = adapter.entropy_from_logits_with_chunking
    # Theirs has no gradient to compare: it writes into a tensor of zeros, chunk by chunk.
    torch.testing.assert_close(
        ours(logits), verl_F.entropy_from_logits_with_chunking(logits, 2), rtol=1e-5, atol=1e-5
    )


@EXAMPLES
@given(batch=batches(), temperature=st.sampled_from((1.0, 0.7)))
def test_fused_head(batch: Batch, temperature: float) -> None:
    hidden, labels = batch.floats(5), batch.labels(VOCAB)
    weight = torch.randn(VOCAB, 5, generator=batch.generator).to(batch.dtype)
    module = fused_head.FusedLinearForPPO(chunk_size=3)
    compare(
        lambda h, w: module(h, w, labels, temperature),
        lambda h, w: adapter._fused_linear_forward(module, h, w, labels, temperature),
        *(hidden, weight),
    )


# ---- statistics ---------------------------------------------------------------------------------

MASK_DTYPES = st.sampled_from((torch.bool, torch.int64, torch.float32))


@EXAMPLES
@given(batch=batches(), axis=st.sampled_from((None, 0, 1, -1)), as_mask=MASK_DTYPES)
def test_masked_sum_and_mean(batch: Batch, axis: int | None, as_mask: torch.dtype) -> None:
    mask = batch.mask.to(as_mask)
    for name in ("masked_sum", "masked_mean"):
        theirs, ours = getattr(verl_F, name), getattr(adapter, name)
        compare(one(theirs, mask, axis), one(ours, mask, axis), batch.floats())
        with torch.no_grad():
            compare(one(theirs, mask, axis), one(ours, mask, axis), batch.floats())


@EXAMPLES
@given(batch=batches())
def test_weights_for_a_mask(batch: Batch) -> None:
    weights = torch.rand(batch.shape, generator=batch.generator) * batch.mask
    for name in ("masked_sum", "masked_mean"):
        theirs, ours = getattr(verl_F, name), getattr(adapter, name)
        compare(one(theirs, weights), one(ours, weights), batch.floats())


@EXAMPLES
@given(batch=batches(), as_mask=MASK_DTYPES, choice=st.booleans(), grad=st.booleans())
def test_variance_and_whitening(
    batch: Batch, as_mask: torch.dtype, choice: bool, grad: bool
) -> None:
    mask = batch.mask.to(as_mask)
    for name in ("masked_var", "masked_whiten"):
        theirs, ours = getattr(verl_F, name), getattr(adapter, name)
        with torch.set_grad_enabled(grad):
            x = batch.floats()
            if name == "masked_var" or float(verl_F.masked_var(x.double(), mask)) > 1e-2:
                compare(one(theirs, mask, choice), one(ours, mask, choice), x)


@pytest.mark.parametrize("name", ["masked_var", "masked_whiten"])
@pytest.mark.parametrize("slots", [0, 1])
def test_a_variance_of_too_few_raises_as_theirs(name: str, slots: int) -> None:
    mask = torch.zeros(2, 3)
    mask.view(-1)[:slots] = 1
    for module in (verl_F, adapter):
        with pytest.raises(ValueError, match="mask"):
            getattr(module, name)(torch.randn(2, 3), mask)


@pytest.mark.parametrize("grad", [False, True])
def test_statistics_ignore_nan_outside_the_mask(grad: bool) -> None:
    batch = Batch(2, 3, 8, "holes", torch.float32)
    x = batch.floats()
    poisoned = x.masked_fill(~batch.mask, torch.nan).requires_grad_(grad)
    for name in ("masked_sum", "masked_mean", "masked_var"):
        function = getattr(adapter, name)
        torch.testing.assert_close(function(poisoned, batch.mask), function(x, batch.mask))


# ---- advantages ---------------------------------------------------------------------------------


@EXAMPLES
@given(batch=batches(), gamma=st.sampled_from((1.0, 0.97)), lam=st.sampled_from((1.0, 0.9, 0.0)))
def test_gae_carries_across_holes(batch: Batch, gamma: float, lam: float) -> None:
    mask = batch.mask.long()
    rewards, values = batch.floats(), batch.floats()
    advantages, _ = core_algos.compute_gae_advantage_return(
        rewards.double(), values.double(), mask, gamma, lam
    )
    if float(advantages[batch.mask].std()) < 0.1:
        return  # Whitening divides by the spread: with next to none it shows rounding alone.

    def call(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda r, v: function(r, v, mask, gamma, lam)

    theirs = call(core_algos.compute_gae_advantage_return)
    ours = call(adapter.compute_gae_advantage_return)
    compare(theirs, ours, rewards, values, where=batch.mask)


def test_gae_is_0_in_masked_slots_whatever_they_hold() -> None:
    batch = Batch(4, 3, 8, "holes", torch.float32)
    rewards, values = batch.floats(), batch.floats()
    poisoned = [x.masked_fill(~batch.mask, torch.nan) for x in (rewards, values)]
    clean = adapter.compute_gae_advantage_return(rewards, values, batch.mask, 1.0, 0.95)
    found = adapter.compute_gae_advantage_return(*poisoned, batch.mask.long(), 1.0, 0.95)
    for a, b in zip(clean, found, strict=True):
        assert torch.equal(a, b)
        assert not a[~batch.mask].any()


@pytest.mark.parametrize("tokens", [0, 1])
def test_gae_of_a_batch_with_one_token_or_none(tokens: int) -> None:
    mask = torch.zeros(2, 3, dtype=torch.long)
    mask.view(-1)[:tokens] = 1
    inputs = (torch.randn(2, 3), torch.randn(2, 3), mask, 1.0, 0.95)
    with pytest.raises(ValueError, match="mask"):
        core_algos.compute_gae_advantage_return(*inputs)
    assert not adapter.compute_gae_advantage_return(*inputs)[0].any()


# ---- KL and losses ------------------------------------------------------------------------------

NAMES = ("kl", "k1", "abs", "mse", "k2", "low_var_kl", "k3", "k1+", "k2+", "k3+", "low_var_kl+")


@EXAMPLES
@given(batch=batches(), name=st.sampled_from(NAMES), scale=st.sampled_from((1.0, 12.0)))
def test_kl_penalty(batch: Batch, name: str, scale: float) -> None:
    new, ref = batch.floats(scale=scale), batch.floats(scale=scale)
    compare(one(core_algos.kl_penalty, name), one(adapter.kl_penalty, name), new, ref)
    assert adapter.kl_penalty(new, ref, name).dtype == new.dtype


@pytest.mark.parametrize("far", [-torch.inf, -300.0, 300.0, torch.inf])
def test_k3_of_a_far_token_is_bounded_as_theirs(far: float) -> None:
    new, ref = torch.tensor([far]), torch.zeros(1)
    assert float(core_algos.kl_penalty(new, ref, "k3")) == 10.0
    assert float(adapter.kl_penalty(new, ref, "k3")) == 10.0


@pytest.mark.parametrize("name", ["full", "k4"])
def test_an_unknown_kl_penalty_raises_as_theirs(name: str) -> None:
    for function in (core_algos.kl_penalty, adapter.kl_penalty):
        with pytest.raises(NotImplementedError):
            function(torch.zeros(2), torch.zeros(2), name)


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


class Config(dict[str, Any]):
    """What `compute_policy_loss_vanilla` reads of verl's `ActorConfig`."""

    clip_ratio, clip_ratio_low, clip_ratio_high = 0.2, None, 0.28

    def __init__(self, totals: dict[str, Any]) -> None:
        super().__init__(clip_ratio_c=2.0)
        self.global_batch_info = totals


@pytest.mark.parametrize("mode", MODES)
@EXAMPLES
@given(
    batch=batches(),
    totals=TOTALS,
    weighted=st.booleans(),
    scale=st.sampled_from((0.3, 20.0)),
)
def test_policy_loss(
    batch: Batch, mode: str, totals: dict[str, Any], weighted: bool, scale: float
) -> None:
    old, advantages = batch.floats(), batch.floats()
    new, mask = old + batch.floats(scale=scale), batch.mask.long()
    weights = batch.floats().exp() if weighted else None

    def call(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(x: Tensor) -> tuple[Tensor, ...]:
            same = [t if t is None else t.to(x.dtype) for t in (old, advantages, weights)]
            loss, metrics = function(
                same[0], x, same[1], mask, mode, Config(totals), rollout_is_weights=same[2]
            )
            assert list(metrics) == ["actor/pg_clipfrac", "actor/ppo_kl", "actor/pg_clipfrac_lower"]
            return loss, torch.tensor(list(metrics.values()))

        return run

    theirs = call(core_algos.compute_policy_loss_vanilla)
    compare(theirs, call(adapter.compute_policy_loss_vanilla), new)


@pytest.mark.parametrize("mode", MODES)
@EXAMPLES
@given(batch=batches(), clip=st.sampled_from((0.3, 0.0)), totals=TOTALS)
def test_value_loss(batch: Batch, mode: str, clip: float, totals: dict[str, Any]) -> None:
    returns, old, values = batch.floats(), batch.floats(), batch.floats()
    mask = batch.mask.long()

    def call(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda x: function(
            x, returns.to(x.dtype), old.to(x.dtype), mask, clip, mode, **totals
        )

    own = core_algos.compute_value_loss
    compare(call(own), call(verl_losses.value_loss_or(own)), values)


@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-sum"])
def test_several_ranks_without_totals_raise_as_theirs(mode: str) -> None:
    ones = torch.ones(2, 3)
    for function in (core_algos.compute_value_loss, verl_losses.value_loss_or(_unreachable)):
        with pytest.raises(ValueError, match="is required when dp_size > 1"):
            function(ones, ones, ones, ones, 0.2, mode, dp_size=2)


def test_an_unknown_aggregation_raises_as_theirs() -> None:
    ones = torch.ones(2, 3)
    for function in (core_algos.compute_value_loss, verl_losses.value_loss_or(_unreachable)):
        with pytest.raises(ValueError, match="Invalid loss_agg_mode: mean"):
            function(ones, ones, ones, ones, 0.2, "mean")


def _unreachable(*_: Any) -> Any:
    raise AssertionError("their own function ran")


def test_a_microbatch_without_tokens_has_loss_0_where_theirs_is_nan() -> None:
    tensors = [torch.randn(2, 3) for _ in range(3)]
    call = (*tensors, torch.zeros(2, 3, dtype=torch.long), "token-mean", Config({}))
    assert torch.isnan(core_algos.compute_policy_loss_vanilla(*call)[0])
    loss, metrics = adapter.compute_policy_loss_vanilla(*call)
    assert float(loss) == 0.0
    assert set(metrics.values()) == {0.0}


# ---- switching on -------------------------------------------------------------------------------


def test_switching_on_reaches_importers_and_registries_and_switching_off_gives_all_back() -> None:
    own = core_algos.get_policy_loss_fn("vanilla"), core_algos.get_adv_estimator_fn("gae")
    own += (verl_F.masked_mean, core_algos.verl_F.masked_whiten)
    with adapter.patched() as report:
        assert core_algos.get_policy_loss_fn("vanilla") is adapter.compute_policy_loss_vanilla
        assert core_algos.get_adv_estimator_fn("gae") is adapter.compute_gae_advantage_return
        assert core_algos.verl_F.masked_whiten is adapter.masked_whiten
        assert "verl.trainer.ppo.core_algos.POLICY_LOSS_REGISTRY.vanilla" in report.replaced
    now = core_algos.get_policy_loss_fn("vanilla"), core_algos.get_adv_estimator_fn("gae")
    now += (verl_F.masked_mean, core_algos.verl_F.masked_whiten)
    assert own == now


@pytest.mark.parametrize(
    ("module", "name"),
    [
        *((verl_F, n) for n in ("logprobs_from_logits", "entropy_from_logits", "masked_sum")),
        *((verl_F, n) for n in ("entropy_from_logits_with_chunking", "masked_mean", "masked_var")),
        *((verl_F, n) for n in ("masked_whiten",)),
        *((core_algos, n) for n in ("compute_gae_advantage_return", "kl_penalty")),
        *((core_algos, n) for n in ("compute_policy_loss_vanilla", "compute_value_loss")),
    ],
)
def test_parameters_are_theirs(module: Any, name: str) -> None:
    def described(function: Callable[..., Any]) -> list[tuple[str, Any]]:
        return [(p.name, p.default) for p in inspect.signature(function).parameters.values()]

    own = getattr(module, name)
    with adapter.patched():
        assert described(getattr(module, name)) == described(own)


def test_verl_loads_the_adapter_by_its_environment_variable() -> None:
    script = """
        import sys
        from bench.integrations.stubs import stand_in
        stand_in("verl")
        import verl
        from verl.utils.torch_functional import logprobs_from_logits
        from verl.trainer.ppo.core_algos import get_policy_loss_fn
        print(logprobs_from_logits.__module__, get_policy_loss_fn("vanilla").__module__)
    """
    for value, expected in (("rlhf_fast.integrations.verl", "rlhf_fast."), ("", "verl.")):
        ran = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(script)],
            capture_output=True,
            text=True,
            env=os.environ | {"VERL_USE_EXTERNAL_MODULES": value},
        )
        assert ran.returncode == 0, ran.stderr
        modules = ran.stdout.split()[-2:]
        assert all(m.startswith(expected) for m in modules), modules
