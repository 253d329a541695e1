"""Our functions against those of AReaL's own package."""

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
from rlhf_fast.integrations import areal as adapter
from tests.integrations.peers import EXAMPLES, Batch, batches, compare, installed

installed("areal", "1.0.4")
stand_in("areal")

functional = importlib.import_module("areal.utils.functional")
vocab_parallel = importlib.import_module("areal.utils.functional.vocab_parallel")

VOCAB = 13
OWN = {name: getattr(functional, name) for name in ("gather_logprobs", "gather_logprobs_entropy")}


@pytest.fixture(autouse=True)
def _uncompiled() -> Any:
    """Theirs are compiled; their maths is what is compared."""
    with torch.compiler.set_stance("force_eager"):
        yield


def outputs(function: Callable[..., Any], *rest: Any) -> Callable[..., tuple[Tensor, ...]]:
    def call(logits: Tensor) -> tuple[Tensor, ...]:
        result = function(logits, *rest)
        return result if isinstance(result, tuple) else (result,)

    return call


@pytest.mark.parametrize("name", OWN)
@EXAMPLES
@given(
    batch=batches(), temperature=st.sampled_from((1.0, 0.7, 2)), chunk=st.sampled_from((1, 1024))
)
def test_both(name: str, batch: Batch, temperature: float, chunk: int) -> None:
    """Padded `[B, T, V]` and packed `[N, V]`."""
    logits, labels = batch.floats(VOCAB, scale=4.0), batch.labels(VOCAB)
    theirs, ours = OWN[name], getattr(adapter, name)
    for x, y in ((logits, labels), (logits.flatten(0, 1), labels.flatten())):
        arguments = (y, temperature, None, chunk)
        compare(outputs(theirs, *arguments), outputs(ours, *arguments), x)
        for a, b in zip(outputs(theirs, *arguments)(x), outputs(ours, *arguments)(x), strict=True):
            assert a.dtype == b.dtype


def test_the_switch() -> None:
    with adapter.patched() as report:
        for name in OWN:
            assert getattr(functional, name) is getattr(adapter, name)
            assert getattr(vocab_parallel, name) is getattr(adapter, name)
            assert f"areal.utils.functional.{name}" in report.replaced
    for name, own in OWN.items():
        assert getattr(functional, name) is getattr(vocab_parallel, name) is own
