"""Our functions against those of OpenRLHF's own package."""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys
import textwrap
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bench.integrations.stubs import stand_in
from rlhf_fast.integrations import openrlhf as adapter
from tests.integrations.peers import EXAMPLES, Batch, batches, compare, installed

installed("openrlhf", "0.11.2")
stand_in("openrlhf")

their_loss = importlib.import_module("openrlhf.models.loss")
their_utils = importlib.import_module("openrlhf.models.utils")
experience_maker = importlib.import_module("openrlhf.trainer.ppo_utils.experience_maker")

VOCAB = 13


@pytest.fixture(autouse=True)
def _uncompiled() -> Any:
    """`compute_entropy` is compiled at OpenRLHF; its maths is what is compared."""
    with torch.compiler.set_stance("force_eager"):
        yield


def outputs(function: Callable[..., Any], *rest: Any, **options: Any) -> Callable[..., Any]:
    def call(*tensors: torch.Tensor) -> tuple[Any, ...]:
        result = function(*tensors, *rest, **options)
        return result if isinstance(result, tuple) else (result,)

    return call


@EXAMPLES
@given(batch=batches(), temperature=st.sampled_from((1.0, 0.7)))
def test_log_probs(batch: Batch, temperature: float) -> None:
    logits, labels = batch.floats(VOCAB, scale=4.0), batch.labels(VOCAB)

    def call(function: Callable[..., Any]) -> Callable[..., Any]:
        # Theirs divides in place: it gets a tensor of its own.
        return lambda x: (function(x * 1.0, labels, temperature),)

    compare(call(their_utils.log_probs_from_logits), call(adapter.log_probs_from_logits), logits)
    own = their_utils.log_probs_from_logits(logits.clone(), labels)
    assert adapter.log_probs_from_logits(logits, labels).dtype == own.dtype


def test_log_probs_leave_the_logits_unchanged() -> None:
    logits = torch.randn(2, 3, VOCAB)
    before = logits.clone()
    adapter.log_probs_from_logits(logits, torch.zeros(2, 3, dtype=torch.long), 0.5)
    assert torch.equal(logits, before)


@EXAMPLES
@given(batch=batches())
def test_entropy(batch: Batch) -> None:
    logits = batch.floats(VOCAB, scale=4.0)
    compare(outputs(their_utils.compute_entropy), outputs(adapter.compute_entropy), logits)


def test_entropy_of_a_forbidden_token_is_finite() -> None:
    logits = torch.tensor([[0.0, 0.0, -torch.inf]])
    assert torch.isnan(their_utils.compute_entropy(logits)).all()
    torch.testing.assert_close(adapter.compute_entropy(logits), torch.tensor([2.0]).log())


@EXAMPLES
@given(
    batch=batches(),
    estimator=st.sampled_from(("k1", "k2", "k3")),
    unbiased=st.booleans(),
    with_old=st.booleans(),
    scale=st.sampled_from((1.0, 8.0)),
)
def test_approx_kl(
    batch: Batch, estimator: str, unbiased: bool, with_old: bool, scale: float
) -> None:
    new, base = batch.floats(scale=scale), batch.floats(scale=scale)
    old = batch.floats() if with_old else None
    options = {"log_probs_old": old, "kl_estimator": estimator, "unbiased_gradient": unbiased}
    compare(
        outputs(their_utils.compute_approx_kl, **options),
        outputs(adapter.compute_approx_kl, **options),
        *(new, base),
    )


@EXAMPLES
@given(
    batch=batches(),
    kl_coef=st.sampled_from((-0.1, 0.0, 0.05)),
    clip=st.sampled_from((None, (-0.5, 0.5))),
    empty_row=st.booleans(),
)
def test_reward(batch: Batch, kl_coef: float, clip: Any, empty_row: bool) -> None:
    kl, score = batch.floats(), batch.per_row()
    if empty_row:
        batch.mask[-1] = False

    def call(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda r, x: (function(r, kl_coef, x, batch.mask.long(), clip),)

    compare(call(their_utils.compute_reward), call(adapter.compute_reward), score, kl)


def test_the_score_lands_on_the_last_action_also_after_a_hole() -> None:
    mask = torch.tensor([[0, 1, 0, 1, 0]])
    rewards = adapter.compute_reward(torch.tensor([2.0]), 0.0, torch.zeros(1, 5), mask)
    assert rewards.tolist() == [[0, 0, 0, 2.0, 0]]


@EXAMPLES
@given(batch=batches(), gamma=st.sampled_from((1.0, 0.97)), lambd=st.sampled_from((1.0, 0.9, 0.0)))
def test_gae_in_every_column(batch: Batch, gamma: float, lambd: float) -> None:
    own = experience_maker.RemoteExperienceMaker.get_advantages_and_returns

    def call(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda v, r: function(None, v, r, batch.mask, gamma, lambd)

    compare(call(own), call(adapter.get_advantages_and_returns), batch.floats(), batch.floats())


@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.long, torch.float32])
def test_gae_ignores_what_masked_slots_hold(mask_dtype: torch.dtype) -> None:
    batch = Batch(3, 4, 8, "holes", torch.float32)
    values, rewards = batch.floats(), batch.floats()
    poisoned = [x.masked_fill(~batch.mask, torch.nan) for x in (values, rewards)]
    run = adapter.get_advantages_and_returns
    clean = run(None, values, rewards, batch.mask.to(mask_dtype), 0.99, 0.95)
    for a, b in zip(
        clean, run(None, *poisoned, batch.mask.to(mask_dtype), 0.99, 0.95), strict=True
    ):
        assert torch.equal(a, b)


TOTALS = st.sampled_from(
    ({}, {"dp_size": 2, "batch_num_tokens": 17.0, "global_batch_size": 5.0}, {"dp_size": 4})
)


@EXAMPLES
@given(
    batch=batches(),
    dual_clip=st.sampled_from((None, 2.0)),
    token_level=st.booleans(),
    totals=TOTALS,
    scale=st.sampled_from((0.3, 20.0)),
)
def test_policy_loss(
    batch: Batch, dual_clip: float | None, token_level: bool, totals: dict[str, Any], scale: float
) -> None:
    module = their_loss.PolicyLoss(0.2, 0.28, dual_clip, token_level)
    old = batch.floats()
    new, advantages = old + batch.floats(scale=scale), batch.floats()
    mask = batch.mask.long()

    def call() -> Callable[..., Any]:
        return lambda x: module(x, old.to(x.dtype), advantages.to(x.dtype), mask, **totals)

    forward = adapter._policy_forward(their_loss.PolicyLoss.forward)
    ours = lambda x: forward(  # noqa: E731
        module, x, old.to(x.dtype), advantages.to(x.dtype), mask, **totals
    )
    compare(call(), ours, new)


@EXAMPLES
@given(
    batch=batches(),
    clip=st.sampled_from((None, 0.2, 0.0)),
    token_level=st.booleans(),
    totals=TOTALS,
)
def test_value_loss(
    batch: Batch, clip: float | None, token_level: bool, totals: dict[str, Any]
) -> None:
    module = their_loss.ValueLoss(clip, token_level)
    forward = adapter._value_forward(their_loss.ValueLoss.forward)
    old, returns, values = batch.floats(), batch.floats(), batch.floats()
    mask = batch.mask.long()
    compare(
        lambda x: (module(x, old.to(x.dtype), returns.to(x.dtype), mask, **totals),),
        lambda x: (forward(module, x, old.to(x.dtype), returns.to(x.dtype), mask, **totals),),
        values,
    )


def test_a_microbatch_without_actions_has_loss_0_where_theirs_is_nan() -> None:
    tensors = [torch.randn(2, 3) for _ in range(3)]
    mask = torch.zeros(2, 3, dtype=torch.long)
    module = their_loss.PolicyLoss()
    assert torch.isnan(module(*tensors, mask)[0])
    with adapter.patched():
        assert [float(x) for x in module(*tensors, mask)[:3]] == [0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    "options",
    [
        {"policy_loss_type": "gspo"},
        {"is_correction_level": "token"},
        {"is_correction_level": "seq", "is_correction_gating": "tv"},
    ],
)
def test_other_options_run_their_own_code(options: dict[str, Any]) -> None:
    if "is_correction_gating" in options:
        options = options | {"is_correction_threshold": [0.0, 0.5]}
    batch = Batch(5, 3, 6, "right", torch.float32)
    module = their_loss.PolicyLoss(**options)
    tensors = [batch.floats(scale=0.3) for _ in range(4)]
    inputs = (*tensors[:3], batch.mask.float(), tensors[3])
    expected = module(*inputs)
    with adapter.patched():
        found = module(*inputs)
    for a, b in zip(expected, found, strict=True):
        assert a is b is None or torch.equal(a, b)


def test_switching_on_reaches_every_importer_and_switching_off_gives_all_back() -> None:
    actor = importlib.import_module("openrlhf.models.actor")
    before = (
        actor.log_probs_from_logits,
        actor.compute_entropy,
        experience_maker.compute_reward,
        their_loss.PolicyLoss.forward,
        experience_maker.RemoteExperienceMaker.get_advantages_and_returns,
    )
    with adapter.patched() as report:
        assert actor.log_probs_from_logits is adapter.log_probs_from_logits
        assert actor.compute_entropy is adapter.compute_entropy
        assert experience_maker.compute_reward is adapter.compute_reward
        assert "openrlhf.models.actor.log_probs_from_logits" in report.replaced
        assert "openrlhf.models.loss.PolicyLoss.forward" in report.replaced
        assert report.version == "0.11.2"
    after = (
        actor.log_probs_from_logits,
        actor.compute_entropy,
        experience_maker.compute_reward,
        their_loss.PolicyLoss.forward,
        experience_maker.RemoteExperienceMaker.get_advantages_and_returns,
    )
    assert before == after


@pytest.mark.parametrize(
    ("own", "ours"),
    [
        (their_utils.log_probs_from_logits, adapter.log_probs_from_logits),
        (their_utils.compute_approx_kl, adapter.compute_approx_kl),
        (their_utils.compute_reward, adapter.compute_reward),
        (
            experience_maker.RemoteExperienceMaker.get_advantages_and_returns,
            adapter.get_advantages_and_returns,
        ),
        (their_loss.PolicyLoss.forward, adapter._policy_forward(their_loss.PolicyLoss.forward)),
        (their_loss.ValueLoss.forward, adapter._value_forward(their_loss.ValueLoss.forward)),
    ],
)
def test_parameters_are_theirs(own: Callable[..., Any], ours: Callable[..., Any]) -> None:
    def described(function: Callable[..., Any]) -> list[tuple[str, Any]]:
        return [(p.name, p.default) for p in inspect.signature(function).parameters.values()]

    assert described(own) == described(ours)


def test_a_worker_gets_our_functions_when_it_imports_openrlhf() -> None:
    """Ray calls the hook before the worker has imported anything of OpenRLHF."""
    script = """
        import sys
        from bench.integrations.stubs import stand_in
        stand_in("openrlhf")
        from rlhf_fast.integrations import openrlhf as adapter
        module, _, name = adapter.WORKER_SETUP.rpartition(".")
        assert module == adapter.__name__
        getattr(adapter, name)()
        assert not any(m.startswith("openrlhf") for m in sys.modules)
        from openrlhf.models import actor, PolicyLoss
        assert actor.log_probs_from_logits is adapter.log_probs_from_logits
        assert PolicyLoss.forward.__module__ == adapter.__name__
        assert len(adapter.install().awaited) == 1
        from openrlhf.trainer.ppo_utils import experience_maker
        assert experience_maker.compute_reward is adapter.compute_reward
        maker = experience_maker.RemoteExperienceMaker
        assert maker.get_advantages_and_returns is adapter.get_advantages_and_returns
        assert not adapter.install().awaited
    """
    ran = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
