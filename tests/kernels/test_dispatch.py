"""Choosing implementations: precedence, names, reasons, and the self-test."""

from __future__ import annotations

import pytest
import torch

from rlhf_fast_kernels import dispatch, gae, native

X = torch.zeros(2, 3)
CPU = torch.device("cpu")


@pytest.fixture
def toy(monkeypatch):
    """An op with a reference that works and a CUDA implementation that says why it does not."""
    ops = dict(dispatch._ops)
    monkeypatch.setattr(dispatch, "_ops", ops)
    monkeypatch.delenv(dispatch.ENVIRONMENT, raising=False)
    dispatch.register("toy", "reference", lambda: "reference")
    dispatch.register("toy", "cpu", lambda: "cpu", dtypes=[torch.float32])
    dispatch.register("toy", "cuda", lambda: "cuda", lambda _device: "the driver is asleep")
    yield "toy"
    dispatch._choose.cache_clear()


def test_the_preferred_one_that_can_run_is_chosen(toy):
    choice = dispatch.choose(toy, None, X)
    assert choice.impl == "cpu"
    assert choice.function() == "cpu"
    assert "preferred" in choice.reason


def test_a_dtype_that_it_does_not_read_passes_to_the_next(toy):
    assert dispatch.choose(toy, None, X.half()).impl == "reference"
    assert dispatch.choose(toy, None, X, X.double()).impl == "reference"
    assert dispatch.choose(toy, None, X, X.bool()).impl == "cpu"
    with pytest.raises(RuntimeError, match=r"toy.*'cpu'.*torch.float32, not torch.float16"):
        dispatch.choose(toy, "cpu", X.half())


def test_one_registration_adds_an_implementation(toy):
    dispatch.register(toy, "triton", lambda: "triton")
    assert dispatch.choose(toy, None, X).impl == "triton"
    dispatch.register(toy, "triton", lambda: "triton", preference=-1)
    assert dispatch.choose(toy, None, X).impl == "cpu"
    with pytest.raises(ValueError, match="impl must be one of triton, cuda, cpu, reference"):
        dispatch.register(toy, "opencl", lambda: "opencl")


def test_an_implementation_that_cannot_run_raises_op_name_and_reason(toy):
    with pytest.raises(RuntimeError, match=r"toy: implementation 'cuda'.*the driver is asleep"):
        dispatch.choose(toy, "cuda", X)
    with pytest.raises(RuntimeError, match=r"toy: implementation 'triton'.*no such"):
        dispatch.choose(toy, "triton", X)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "cpu"),
        ("auto", "cpu"),
        ("reference", "reference"),
        ("toy=reference", "reference"),
        ("gae=reference", "cpu"),
        ("reference, toy = cpu", "cpu"),
        ("toy=auto,reference", "cpu"),
    ],
)
def test_environment(toy, monkeypatch, text, expected):
    monkeypatch.setenv(dispatch.ENVIRONMENT, text)
    assert dispatch.choose(toy, None, X).impl == expected


def test_the_argument_wins_over_the_environment(toy, monkeypatch):
    monkeypatch.setenv(dispatch.ENVIRONMENT, "toy=cuda")
    assert dispatch.choose(toy, "reference", X).impl == "reference"
    assert dispatch.choose(toy, "auto", X).impl == "cpu"
    with pytest.raises(RuntimeError, match="RLHF_FAST_OPS=toy=cuda"):
        dispatch.choose(toy, None, X)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cpp", "no implementation 'cpp'; choices are auto, triton, cuda, cpu, reference"),
        ("toy=fast", "no implementation 'fast'"),
        ("gea=cpu", "no op 'gea'; ops are .*gae"),
    ],
)
def test_a_wrong_name_in_the_environment_lists_the_choices(toy, monkeypatch, text, message):
    monkeypatch.setenv(dispatch.ENVIRONMENT, text)
    with pytest.raises(ValueError, match=message):
        dispatch.choose(toy, None, X)


def test_public_functions_obey(monkeypatch):
    mask = torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="no implementation 'fast'"):
        gae(X, X, mask, gamma=1.0, gae_lambda=1.0, impl="fast")
    monkeypatch.setenv(dispatch.ENVIRONMENT, "gae=cuda")
    with pytest.raises(RuntimeError, match=r"gae: implementation 'cuda'.*tensors are on cpu"):
        gae(X, X, mask, gamma=1.0, gae_lambda=1.0)


def test_report_has_a_row_for_every_op(toy):
    rows = {row.op: row for row in dispatch.report() if row.device == "cpu"}
    assert set(rows) == set(dispatch.ops())
    assert rows[toy].impl == "cpu"
    assert rows[toy].unavailable == {"cuda": "the driver is asleep"}
    assert "tensors are on cpu" in rows["gae"].unavailable["cuda"]


def test_report_shows_a_broken_wish_instead_of_raising(toy, monkeypatch):
    monkeypatch.setenv(dispatch.ENVIRONMENT, "toy=cuda")
    row = next(row for row in dispatch.report() if row.op == toy)
    assert row.impl == "none"
    assert "the driver is asleep" in row.reason


def test_selftest_passes_on_this_machine():
    rows = dispatch.selftest()
    compiled = native.missing("gae") is None
    assert {row.op for row in rows} >= ({"gae", "rewards_and_gae", "whiten"} if compiled else set())
    for row in rows:
        assert row.ok, row


def test_selftest_reports_wrong_and_raising_implementations(toy):
    def case(_device, _dtype, _generator):
        def run(impl):
            if impl == "triton":
                raise RuntimeError("illegal memory access")
            return (torch.tensor([1.0, 2.0 if impl == "reference" else 2.5]),)

        return run

    dispatch.register(toy, "triton", lambda: "triton")
    dispatch.register_selftest(toy, case)
    rows = [row for row in dispatch.selftest() if row.op == toy and row.dtype == "float32"]
    by_impl = {row.impl: row for row in rows}
    assert not by_impl["cpu"].ok
    assert by_impl["cpu"].max_error == pytest.approx(0.5 / 3)
    assert not by_impl["triton"].ok
    assert "illegal memory access" in by_impl["triton"].note
    assert "cuda" not in by_impl
