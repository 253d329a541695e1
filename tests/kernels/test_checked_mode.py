"""Values are looked at on the CPU always, on an accelerator in checked mode only."""

from __future__ import annotations

import math

import pytest
import torch

from rlhf_fast_kernels import checked_mode, linear_logprobs
from tests.kernels.linear_cases import close, head


def test_an_accelerator_is_waited_for_in_checked_mode_only(monkeypatch):
    monkeypatch.delenv(checked_mode.ENVIRONMENT, raising=False)
    elsewhere = torch.empty(1, device="meta")
    assert checked_mode.reads_values(torch.empty(1))
    assert not checked_mode.reads_values(elsewhere)
    for text, looks in (("1", True), ("0", False), ("", False)):
        monkeypatch.setenv(checked_mode.ENVIRONMENT, text)
        assert checked_mode.reads_values(elsewhere) == looks


def test_temperatures_are_looked_at_where_a_token_counts():
    hidden, weight, labels = head(3, 8, 20)
    labels[1] = -100
    temperature = torch.tensor([0.5, math.nan, 2.0])
    linear_logprobs(hidden, weight, labels, temperature=temperature)
    labels[1] = 4
    with pytest.raises(ValueError, match="every temperature must be positive"):
        linear_logprobs(hidden, weight, labels, temperature=temperature)


def test_tracing_looks_at_nothing_and_the_op_does_when_it_runs():
    hidden, weight, labels = head(3, 8, 20)

    def run(temperature):
        return linear_logprobs(hidden, weight, labels, temperature=temperature)[0]

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    temperature = torch.tensor([0.5, 1.0, 2.0])
    close(compiled(temperature), run(temperature), 1e-7)
    with pytest.raises(ValueError, match="every temperature must be positive"):
        compiled(-temperature)
