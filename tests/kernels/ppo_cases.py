"""Inputs and comparisons for the tests of ppo_loss."""

from __future__ import annotations

import math
from typing import Any

import torch

from rlhf_fast_kernels import PPOLossOutput, native, ppo_loss, triton_support

FAST = "reference" if native.missing("ppo_loss") else "cpu"
TRITON = triton_support.on_triton(torch.device("cpu")) is None  # in the interpreter
IMPLS = sorted({"reference", FAST}) + ["triton"] * TRITON
DTYPES = (torch.float32, torch.bfloat16)
NAMES = (
    "logprobs",
    "old_logprobs",
    "advantages",
    "entropy",
    "ref_logprobs",
    "weights",
    "values",
    "old_values",
    "returns",
)
LEAVES = ("logprobs", "entropy", "values")
FULL: dict[str, Any] = {
    "dual_clip": 1.7,
    "clip_eps_high": 0.28,
    "entropy_coef": 0.01,
    "kl_coef": 0.1,
    "value_coef": 0.3,
}


def draw(
    shape: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.float32
) -> dict[str, torch.Tensor]:
    """All tensors of a call: ratios inside and outside the band, advantages of both signs."""
    generator = torch.Generator().manual_seed(seed)

    def normal(scale: float, offset: float = 0.0) -> torch.Tensor:
        return (offset + scale * torch.randn(shape, generator=generator)).to(dtype)

    tensors = {name: normal(0.4) for name in NAMES}
    for name in ("logprobs", "old_logprobs", "ref_logprobs"):
        tensors[name] = normal(0.4, -2.0)
    tensors["advantages"], tensors["weights"] = normal(1.0), normal(0.1, 1.0)
    tensors["mask"] = torch.rand(shape, generator=generator) < 0.75
    return tensors


def run(
    tensors: dict[str, torch.Tensor],
    normalizer: Any = None,
    impl: str | None = None,
    **options: Any,
) -> tuple[PPOLossOutput, dict[str, torch.Tensor]]:
    """The output and the gradients of LEAVES and of kl."""
    leaves = (*LEAVES, "kl")
    given_ = {
        name: x.detach().clone().requires_grad_() if name in leaves else x
        for name, x in tensors.items()
    }
    if normalizer is None:
        normalizer = max(int(tensors["mask"].sum()), 1)
    out = ppo_loss(**given_, normalizer=normalizer, impl=impl, **options)
    out.loss.backward()
    grads = {name: given_[name].grad for name in leaves if name in given_}
    return out, {name: g for name, g in grads.items() if g is not None}


def assert_same(
    got: tuple[PPOLossOutput, dict[str, torch.Tensor]],
    want: tuple[PPOLossOutput, dict[str, torch.Tensor]],
    tolerance: float,
) -> None:
    assert abs(float(got[0].loss) - float(want[0].loss)) <= tolerance
    assert got[0].metrics.keys() == want[0].metrics.keys()
    count = max(float(next(iter(want[0].metrics.values()))), 1.0)
    for name, value in want[0].metrics.items():
        assert abs(float(got[0].metrics[name]) - float(value)) / count <= tolerance, name
    for name, value in want[0].extrema.items():
        assert math.isclose(float(got[0].extrema[name]), float(value), rel_tol=1e-5), name
    for name, grad in want[1].items():
        scale = float(grad.abs().max()) if grad.numel() else 0.0
        error = (got[1][name].double() - grad.double()).abs()
        assert float(error.max() if error.numel() else 0.0) <= tolerance * (1e-9 + scale), name


def with_exact_kl(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same call with the KL given per token; for `kl_estimator="exact"`."""
    changed = {name: x for name, x in tensors.items() if name != "ref_logprobs"}
    return {**changed, "kl": tensors["ref_logprobs"].square()}


def bf16_digit(impl: str) -> float:
    """Half a digit of bf16; a whole one in Triton's interpreter, which cuts where a GPU rounds."""
    return 2**-7 if impl == "triton" and TRITON else 2**-8


def doubles(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: x if name == "mask" else x.double() for name, x in tensors.items()}


def one_token(**fields: float) -> dict[str, torch.Tensor]:
    tensors = {name: torch.tensor([value]) for name, value in fields.items()}
    return {**tensors, "mask": torch.tensor([True])}


# Per case: the fields of one token, options, the gradient of its one leaf. All numbers are exact.
TIES: dict[str, tuple[dict[str, float], dict[str, Any], float]] = {
    "inside a band of width 0": (
        {"logprobs": -1.0, "old_logprobs": -1.0, "advantages": 2.0},
        {"clip_eps_low": 0.0, "clip_eps_high": 0.0},
        -2.0,
    ),
    "outside the band with advantage 0": (
        {"logprobs": 1.0, "old_logprobs": 0.0, "advantages": 0.0},
        {"dual_clip": 2.0},
        0.0,
    ),
    "at the bound of the clamp": (
        {"logprobs": 2.0, "old_logprobs": 0.0, "advantages": -1.0},
        {"log_ratio_clamp": 2.0},
        math.exp(2.0),
    ),
    "behind the bound of the clamp": (
        {"logprobs": 2.25, "old_logprobs": 0.0, "advantages": -1.0},
        {"log_ratio_clamp": 2.0},
        0.0,
    ),
    "values as far off on both sides, outside the band": (
        {"values": 1.5, "old_values": 1.0, "returns": 1.375},
        {"value_clip_eps": 0.25},
        0.0625,
    ),
    "value at the edge of the band": (
        {"values": 1.25, "old_values": 1.0, "returns": 2.0},
        {"value_clip_eps": 0.25},
        -0.75,
    ),
}


def check_tie(case: str, impl: str) -> None:
    """The gradient is torch's: halves at ties, clamps that pass at their bounds."""
    fields, options, slope = TIES[case]
    out, grads = run(one_token(**fields), impl=impl, **options)
    (gradient,) = grads.values()
    assert math.isclose(float(gradient), slope, rel_tol=1e-6)
    assert not out.metrics.get("value_clip", torch.zeros(())).any()
