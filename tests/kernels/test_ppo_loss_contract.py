"""Besides numbers, ppo_loss promises gradients to the right tensors, torch.library and messages."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from rlhf_fast_kernels import ppo_loss, reference
from rlhf_fast_kernels.ppo_arguments import Inputs, Settings
from rlhf_fast_kernels.ppo_launchers import token_gradients
from tests.kernels.ppo_cases import (
    FAST,
    FULL,
    IMPLS,
    LEAVES,
    NAMES,
    TIES,
    assert_same,
    check_tie,
    doubles,
    draw,
    run,
    with_exact_kl,
)


@pytest.mark.parametrize("kl_estimator", ["k1", "k2", "k3"])
def test_reference_passes_gradcheck_in_fp64(kl_estimator: str) -> None:
    tensors = doubles(draw((11,)))
    leaves = [tensors[name].requires_grad_() for name in LEAVES]

    def loss(logprobs: torch.Tensor, entropy: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        changed = {**tensors, "logprobs": logprobs, "entropy": entropy, "values": values}
        options = {**FULL, "kl_estimator": kl_estimator, "kl_gradient": "own"}
        return ppo_loss(**changed, normalizer=7, impl="reference", **options).loss

    assert torch.autograd.gradcheck(loss, leaves)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("normalizer", [13, torch.tensor(13), 0])
def test_token_gradients_are_those_of_the_public_function(impl: str, normalizer: Any) -> None:
    tensors = draw((5, 70))
    out, want = run(tensors, normalizer, impl=impl, **FULL)
    settings_ = Settings(0.2, 0.28, 1.7, 0.01, 0.1, "k3", "k2", 0.2, 0.3, 20.0)
    inputs = Inputs(*(tensors[name] for name in NAMES))
    call = (impl, inputs, tensors["mask"], normalizer, settings_)
    with torch.no_grad():
        loss, sums, extrema, *grads = token_gradients(*call, (True, True, True))
        assert token_gradients(*call, (False, True, False))[3::2] == (None, None)
    assert torch.equal(loss, out.loss)
    assert torch.equal(sums, torch.stack(list(out.metrics.values())))
    assert torch.equal(extrema, torch.stack(list(out.extrema.values())))
    for name, grad in zip(LEAVES, grads, strict=True):
        assert grad is not None
        assert grad.dtype == torch.float32
        assert torch.equal(grad, want[name])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("case", TIES)
def test_ties_and_bounds_of_clamps(case: str, impl: str) -> None:
    check_tie(case, impl)


@pytest.mark.parametrize("impl", IMPLS)
def test_backward_twice_scales_and_accumulates(impl: str) -> None:
    tensors = draw((50,))
    _, want = run(tensors, impl=impl)
    leaf = tensors["values"].clone().requires_grad_()
    scaled = {**tensors, "values": leaf}
    out = ppo_loss(**scaled, normalizer=int(tensors["mask"].sum()), impl=impl)
    out.loss.backward(retain_graph=True)
    out.loss.backward(retain_graph=True)
    (out.loss * 3.0).backward()
    assert leaf.grad is not None
    assert torch.allclose(leaf.grad, 5.0 * want["values"], rtol=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
def test_strided_upstream_gradients(impl: str) -> None:
    """Of a loss that is expanded and multiplied, so that its gradient is no plain number."""
    tensors = draw((50,))
    _, want = run(tensors, 40, impl=impl)
    leaf = tensors["values"].clone().requires_grad_()
    out = ppo_loss(**{**tensors, "values": leaf}, normalizer=40, impl=impl)
    out.loss.expand(3, 4).backward(torch.arange(24.0).view(3, 8)[:, ::2])
    factor = torch.arange(24.0).view(3, 8)[:, ::2].sum()
    assert leaf.grad is not None
    assert torch.allclose(leaf.grad, factor * want["values"], rtol=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
def test_constants_receive_no_gradient_and_no_grad_is_respected(impl: str) -> None:
    tensors = draw((50,))
    for name in NAMES:
        tensors[name].requires_grad_()
    out = ppo_loss(**tensors, normalizer=50, impl=impl, **FULL)
    out.loss.backward()
    for name in NAMES:
        assert (tensors[name].grad is not None) == (name in LEAVES), name
    assert not any(x.requires_grad for x in [*out.metrics.values(), *out.extrema.values()])
    with torch.no_grad():
        assert not ppo_loss(**tensors, normalizer=50, impl=impl, **FULL).loss.requires_grad


@pytest.mark.parametrize("impl", IMPLS)
def test_normalizer_as_number_and_as_tensor(impl: str) -> None:
    tensors = draw((50,))
    for value in (31, 31.0, torch.tensor(31), torch.tensor([31.0])):
        assert_same(run(tensors, value, impl=impl), run(tensors, 31, impl=impl), 1e-7)


@pytest.mark.skipif(FAST != "cpu", reason="torch.library holds the compiled op")
@pytest.mark.parametrize("part", ["both", "policy", "value", "exact"])
def test_opcheck(part: str) -> None:
    tensors: dict[str, torch.Tensor | None] = dict(draw((3, 20)))
    absent = {"both": (), "policy": NAMES[6:], "value": NAMES[:6], "exact": ()}[part]
    for name in absent:
        tensors[name] = None
    for name in LEAVES:
        x = tensors[name]
        if x is not None:
            tensors[name] = x.requires_grad_()
    settings_: tuple[Any, ...] = (0.2, 0.28, 2.0, 0.01, 0.1, "k3", "k2", 0.2, 0.5, 20.0)
    count = torch.tensor(17.0, dtype=torch.float64)
    kl = None
    if part == "exact":
        kl, tensors["ref_logprobs"] = tensors["ref_logprobs"], None
        settings_ = (*settings_[:5], "exact", *settings_[6:])
    inputs = (*(tensors[name] for name in NAMES), kl)
    arguments = (*inputs, tensors["mask"], count, *settings_, "cpu")
    torch.library.opcheck(torch.ops.rlhf_fast.ppo_loss.default, arguments)


@pytest.mark.parametrize("impl", IMPLS)
def test_compiled_metrics_carry_no_gradient(impl: str) -> None:
    tensors = draw((2, 9))

    def run(logprobs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        out = ppo_loss(**{**tensors, "logprobs": logprobs}, normalizer=18, impl=impl)
        return out.loss, *out.metrics.values(), *out.extrema.values()

    leaf = tensors["logprobs"].clone().requires_grad_()
    for function in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        loss, *constants = function(leaf)
        assert loss.requires_grad
        assert not any(x.requires_grad for x in constants)


@pytest.mark.parametrize("impl", IMPLS)
def test_torch_compile_without_graph_break(impl: str) -> None:
    options = {**FULL, "kl_estimator": "exact", "impl": impl}

    def loss(tensors: dict[str, torch.Tensor], *leaves: torch.Tensor) -> torch.Tensor:
        changed = {**tensors, **dict(zip(LEAVES, leaves, strict=True))}
        changed["logprobs"] = changed["logprobs"] * 1.0
        out = ppo_loss(**changed, normalizer=150, **options)
        return out.loss * 2.0 + 0.0 * out.metrics["kl"]

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (200, 77):
        tensors, results = with_exact_kl(draw((tokens,))), []
        for function in (loss, compiled):
            leaves = [tensors[name].clone().requires_grad_() for name in LEAVES]
            value = function(tensors, *leaves)
            value.backward()
            results.append((value.detach(), *(x.grad for x in leaves)))
        for a, b in zip(*results, strict=True):
            assert torch.allclose(a, b, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"old_logprobs": None}, "go together"),
        ({"returns": None}, "values and returns go together"),
        ({"old_values": None}, "value clipping needs old_values"),
        ({"ref_logprobs": None}, "ref_logprobs is absent"),
        ({"entropy": None}, "entropy is absent"),
        ({"advantages": torch.zeros(3)}, r"advantages has shape \(3,\), mask has \(20,\)"),
        ({"kl_estimator": "exact"}, "kl and kl_estimator='exact' go together"),
        ({"kl": torch.zeros(20)}, "kl and kl_estimator='exact' go together"),
        ({"kl": torch.zeros(20), "kl_estimator": "exact"}, "not both"),
        ({"kl_estimator": "k4"}, "kl_estimator must be one of"),
        ({"kl_gradient": "k3"}, "kl_gradient must be one of"),
        ({"clip_eps_low": -0.1}, "must not be negative"),
        ({"dual_clip": 1.0}, "dual_clip must be above 1"),
        ({"value_clip_eps": 0.0}, "value_clip_eps must be positive"),
        ({"log_ratio_clamp": 100.0}, "log_ratio_clamp"),
        ({"normalizer": -1}, "normalizer must be finite"),
        ({"normalizer": math.nan}, "normalizer must be finite"),
        ({"normalizer": torch.ones(2)}, "one element"),
        (dict.fromkeys(NAMES), "give the policy part"),
        (dict.fromkeys(NAMES[:3]), "belongs to the policy part"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, Any], message: str) -> None:
    arguments = {**draw((20,)), **FULL, "normalizer": 20, **change}
    with pytest.raises(ValueError, match=message):
        ppo_loss(**arguments)


def test_bad_dtypes_are_named() -> None:
    tensors = draw((20,))
    with pytest.raises(TypeError, match="mask must be bool"):
        ppo_loss(**{**tensors, "mask": tensors["mask"].float()}, normalizer=20)
    with pytest.raises(TypeError, match="returns must be floating"):
        ppo_loss(**{**tensors, "returns": tensors["returns"].long()}, normalizer=20)


def test_names_of_sums_follow_the_enum_of_the_source() -> None:
    """The order is part of the interface between csrc/cpu/ppo_loss.h and Python."""
    tensors = draw((64,))
    if FAST == "cpu":
        got = run(tensors, impl="cpu", **FULL)[0].metrics
        want = run(tensors, impl="reference", **FULL)[0].metrics
        assert list(got) == list(want)
        assert len({round(float(v), 3) for v in want.values()}) >= 15  # distinct enough to tell
    assert len(reference.PPO_SUM_NAMES) == len(set(reference.PPO_SUM_NAMES)) == 19
