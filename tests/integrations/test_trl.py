"""Our functions against those of TRL's own packages: 1.16, and 1.12 with its PPO trainer."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rlhf_fast.integrations import trl as adapter
from tests.integrations.peers import EXAMPLES, Batch, batches, compare, installed

VERSION = installed("trl", "1.16.0", "1.12.0")
NEW = VERSION == "1.16.0"
utils = importlib.import_module("trl.trainer.utils")
VOCAB = 13
only_new = pytest.mark.skipif(not NEW, reason="TRL 1.12 does not have it")
only_old = pytest.mark.skipif(NEW, reason="TRL 1.16 does not have it")


def ours(name: str) -> Callable[..., Any]:
    with adapter.patched():
        return getattr(utils, name)


# ---- log-probs and entropy ----------------------------------------------------------------------


@EXAMPLES
@given(batch=batches())
def test_selective_log_softmax(batch: Batch) -> None:
    logits, labels = batch.floats(VOCAB, scale=4.0), batch.labels(VOCAB)
    function = ours("selective_log_softmax")
    compare(
        lambda x: (utils.selective_log_softmax(x, labels),),
        lambda x: (function(x, labels),),
        logits,
    )
    # On an accelerator TRL 1.16 has a kernel with fp32 results, where Triton is installed.
    kept = logits.device.type == "cpu" or not NEW
    assert function(logits, labels).dtype == (logits.dtype if kept else torch.float32)


@EXAMPLES
@given(batch=batches())
def test_selective_log_softmax_of_several_entries(batch: Batch) -> None:
    logits = batch.floats(VOCAB)
    index = torch.randint(0, VOCAB, (*batch.shape, 3), generator=batch.generator)
    found = ours("selective_log_softmax")(logits, index)
    assert torch.equal(found, utils.selective_log_softmax(logits, index))


@only_new
@EXAMPLES
@given(batch=batches(), temperature=st.sampled_from((1.0, 0.7)), entropy=st.booleans())
def test_temperature_and_row_mask(batch: Batch, temperature: float, entropy: bool) -> None:
    logits, labels = batch.floats(VOCAB, scale=4.0), batch.labels(VOCAB)
    options = {"temperature": temperature, "row_mask": batch.mask.long()}
    for name in ("selective_log_softmax", "selective_log_softmax_and_entropy"):
        extra = {} if name == "selective_log_softmax" else {"entropy_requires_grad": entropy}
        own, function = getattr(utils, name), ours(name)

        def call(f: Callable[..., Any], extra: dict[str, Any] = extra) -> Callable[..., Any]:
            def run(x: Tensor) -> tuple[Tensor, ...]:
                result = f(x, labels, **options, **extra)
                return result if isinstance(result, tuple) else (result,)

            return run

        compare(call(own), call(function), logits)


@EXAMPLES
@given(batch=batches())
def test_entropy(batch: Batch) -> None:
    function = ours("entropy_from_logits")
    compare(
        lambda x: (utils.entropy_from_logits(x, 2),),
        lambda x: (function(x, 2),),
        batch.floats(VOCAB, scale=4.0),
    )


# ---- the head of 1.16 ---------------------------------------------------------------------------


@only_new
@EXAMPLES
@given(
    batch=batches(),
    softcap=st.sampled_from((None, 3.0)),
    with_bias=st.booleans(),
    outputs=st.sampled_from((("log_probs",), ("log_probs", "entropy"))),
)
def test_chunked_head(
    batch: Batch, softcap: float | None, with_bias: bool, outputs: tuple[str, ...]
) -> None:
    hidden, labels = batch.floats(5).flatten(0, 1), batch.labels(VOCAB).flatten()
    weight = torch.randn(VOCAB, 5, generator=batch.generator).to(batch.dtype)
    bias = torch.randn(VOCAB, generator=batch.generator).to(batch.dtype)

    def call(function: Any) -> Callable[..., Any]:
        def run(h: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, ...]:
            b_or_none = b if with_bias else None
            result = function.apply(h, w, b_or_none, labels, 0.7, 4, softcap, 1.0, outputs)
            assert [x is not None for x in result[1:]] == ["entropy" in outputs, *(False,) * 3]
            return result

        return run

    compare(
        call(utils._ChunkedLogProbFunction),
        call(ours("_ChunkedLogProbFunction")),
        hidden,
        weight,
        bias,
    )


@only_new
@pytest.mark.parametrize(
    "rest", [(None, 0.5, ("log_probs",)), (None, 1.0, ("log_probs", "is_top1")), ()], ids=str
)
def test_further_outputs_and_scaled_logits_run_their_own_head(rest: tuple[Any, ...]) -> None:
    hidden, weight, labels = torch.randn(4, 5), torch.randn(VOCAB, 5), torch.arange(4)
    call = (hidden, weight, None, labels, 1.0, 4, *rest)
    expected = utils._ChunkedLogProbFunction.apply(*call)
    found = ours("_ChunkedLogProbFunction").apply(*call)
    for a, b in zip(expected, found, strict=True):
        assert a is b is None or torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_on_an_accelerator_the_new_one_rounds_no_fp64(dtype: torch.dtype) -> None:
    logits = torch.empty(2, VOCAB, dtype=dtype, device="meta")
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert adapter._fused_dtype(logits) == wide
    assert adapter._fused_dtype(torch.empty(2, VOCAB, dtype=dtype, device="cpu")) == dtype


# ---- GRPO's and RLOO's method -------------------------------------------------------------------


def tiny_model() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    return LlamaForCausalLM(config)


class Accelerator:
    is_main_process = True

    def autocast(self) -> Any:
        return torch.autocast("cpu", enabled=False)


@pytest.mark.parametrize("trainer", ["GRPOTrainer", "RLOOTrainer"])
@pytest.mark.parametrize("batch_size", [None, 2])
@pytest.mark.parametrize("bonus", [False, True])
def test_per_token_method(trainer: str, batch_size: int | None, bonus: bool) -> None:
    """Left-padded prompts, right-padded completions; outputs and the model's gradient."""
    module = importlib.import_module(f"trl.trainer.{trainer[:4].lower()}_trainer")
    method = "_get_per_token_logps_and_entropies"
    host = SimpleNamespace(
        temperature=0.7,
        model_kwarg_keys={"logits_to_keep"},
        accelerator=Accelerator(),
    )
    if trainer == "GRPOTrainer":  # RLOO has no such term
        host._entropy_bonus_enabled = bonus
    ids = torch.randint(0, VOCAB, (3, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    mask[1, -2:] = 0

    def run() -> tuple[Any, ...]:
        model = tiny_model()
        if NEW:
            utils.add_fused_lm_head(model, temperature=0.7, outputs=("log_probs", "entropy"))
        function = getattr(getattr(module, trainer), method)
        logprobs, entropies, aux = function(
            host, model, ids, mask, 4, batch_size, compute_entropy=True
        )
        assert aux is None
        total = (logprobs * mask[:, -4:]).sum()
        if entropies.requires_grad:
            total = total + (entropies * mask[:, -4:]).sum()
        total.backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        return logprobs, entropies, entropies.requires_grad, gradients

    own = run()
    with adapter.patched():
        found = run()
    if not NEW:
        assert own[2] == found[2] == (bonus and trainer == "GRPOTrainer")
    kept = mask[:, -4:].bool()
    for a, b in zip(own[:2], found[:2], strict=True):
        torch.testing.assert_close(b[kept], a[kept], rtol=1e-5, atol=1e-5)
    for a, b in zip(own[3], found[3], strict=True):
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-5)


# ---- PPO of 1.12 --------------------------------------------------------------------------------


@only_old
@EXAMPLES
@given(batch=batches(), choice=st.booleans(), grad=st.booleans())
def test_masked_statistics(batch: Batch, choice: bool, grad: bool) -> None:
    ppo = importlib.import_module("trl.experimental.ppo.ppo_trainer")
    x = batch.floats()
    spread = float(ppo.masked_var(x.double(), batch.mask))
    calls: list[tuple[str, tuple[Any, ...]]] = [("masked_mean", ()), ("masked_mean", (1,))]
    calls += [("masked_var", (choice,))]
    calls += [("masked_whiten", (choice,))] if spread > 1e-2 else []
    rows = batch.mask.any(1)
    for name, rest in calls:
        own, mine = getattr(ppo, name), getattr(adapter, name)
        mask = batch.mask[rows] if rest == (1,) else batch.mask
        inputs = x[rows] if rest == (1,) else x
        with torch.set_grad_enabled(grad):
            compare(
                lambda v, f=own, m=mask, r=rest: (f(v, m, *r),),
                lambda v, f=mine, m=mask, r=rest: (f(v, m, *r),),
                inputs,
            )


@only_old
def test_statistics_ignore_nan_outside_the_mask_where_theirs_do_not() -> None:
    ppo = importlib.import_module("trl.experimental.ppo.ppo_trainer")
    batch = Batch(2, 3, 8, "holes", torch.float32)
    x = batch.floats()
    poisoned = x.masked_fill(~batch.mask, torch.nan)
    for name in ("masked_mean", "masked_var"):
        function = getattr(adapter, name)
        assert torch.isnan(getattr(ppo, name)(poisoned, batch.mask))
        torch.testing.assert_close(function(poisoned, batch.mask), function(x, batch.mask))


@only_old
def test_a_sample_variance_of_one_raises_where_theirs_is_nan() -> None:
    ppo = importlib.import_module("trl.experimental.ppo.ppo_trainer")
    mask = torch.tensor([[True, False]])
    assert torch.isnan(ppo.masked_var(torch.ones(1, 2), mask))
    with pytest.raises(ValueError, match="more than one"):
        adapter.masked_var(torch.ones(1, 2), mask)


# ---- switching on -------------------------------------------------------------------------------


def test_switching_on_reaches_importers_and_switching_off_gives_all_back() -> None:
    importer = "trl.experimental.a2po.a2po_trainer" if NEW else "trl.trainer.dpo_trainer"
    module = importlib.import_module(importer)
    own = module.selective_log_softmax
    with adapter.patched() as report:
        assert module.selective_log_softmax is utils.selective_log_softmax
        assert module.selective_log_softmax is not own
        assert f"{importer}.selective_log_softmax" in report.replaced
    assert module.selective_log_softmax is utils.selective_log_softmax is own
