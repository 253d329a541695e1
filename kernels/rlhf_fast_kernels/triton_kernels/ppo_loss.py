"""Triton kernels of `ppo_loss`: the two launches of csrc/cuda/ppo_loss.cu, with its formulas.

`tile_kernel` computes one tile of tokens a program and leaves a row of sums in the workspace;
`finish_kernel` adds the rows in fp64, in the same order always. An absent tensor or setting is
None.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from rlhf_fast_kernels.reference import PPO_SUM_NAMES
from rlhf_fast_kernels.triton_support import AotCase

TILE = 1024
TILE_WARPS = 8
ROWS = 32  # of the workspace, read at once by finish_kernel
SLOTS = 32  # a row: the sums, the two extrema, padding
FINISH_WARPS = 4

_SLOTS = tl.constexpr(SLOTS)
_SUMS = tl.constexpr(len(PPO_SUM_NAMES))


def _slot(name: str) -> Any:
    return tl.constexpr(PPO_SUM_NAMES.index(name))


_TOKENS, _POLICY_LOSS = _slot("tokens"), _slot("policy_loss")
_APPROX_KL_K1, _APPROX_KL_K2 = _slot("approx_kl_k1"), _slot("approx_kl_k2")
_APPROX_KL_K3 = _slot("approx_kl_k3")
_RATIO, _RATIO_SQUARED = _slot("ratio"), _slot("ratio_squared")
_CLIP_LOW, _CLIP_HIGH, _CLIP_DUAL = _slot("clip_low"), _slot("clip_high"), _slot("clip_dual")
_KL, _ENTROPY = _slot("kl"), _slot("entropy")
_VALUE_TOKENS, _VALUE_LOSS = _slot("value_tokens"), _slot("value_loss")
_VALUE_CLIP = _slot("value_clip")
_RETURNS, _RETURNS_SQUARED = _slot("returns"), _slot("returns_squared")
_RESIDUAL, _RESIDUAL_SQUARED = _slot("residual"), _slot("residual_squared")


def tiles_of(tokens: int) -> int:
    return -(-tokens // TILE)


@triton.jit
def _larger(a, b):
    """`b` where one of them is NaN."""
    return tl.where(a > b, a, b)


@triton.jit
def _smaller(a, b):
    return tl.where(a < b, a, b)


@triton.jit
def _clamp(x, low, high):
    """NaN passes, as in torch.clamp."""
    x = tl.where(x < low, low, x)
    return tl.where(x > high, high, x)


@triton.jit
def _beyond_linear(x, exponential):
    """exp(x) - 1 - x, by a series where the difference would cancel."""
    p = 1.0 / 362880.0 + x * (1.0 / 3628800.0)
    p = 1.0 / 40320.0 + x * p
    p = 1.0 / 5040.0 + x * p
    p = 1.0 / 720.0 + x * p
    p = 1.0 / 120.0 + x * p
    p = 1.0 / 24.0 + x * p
    p = 1.0 / 6.0 + x * p
    p = 0.5 + x * p
    return tl.where(tl.abs(x) < 0.5, p * x * x, exponential - 1.0 - x)


@triton.jit
def _add(row, slot, x):
    tl.store(row + slot, tl.sum(x, axis=0))


@triton.jit
def _load(tensor, at, valid):
    return tl.load(tensor + at, mask=valid, other=0.0).to(tl.float32)


@triton.jit
def _inverse(normalizer_tensor, normalizer):
    """1 / normalizer, 0 for a step without loss tokens."""
    if normalizer_tensor is not None:
        count = tl.load(normalizer_tensor).to(tl.float32)
    else:
        count = normalizer
    return tl.where(count > 0.0, 1.0 / tl.where(count > 0.0, count, 1.0), 0.0)


@triton.jit
def _policy(row, delta, advantage, weight, valid, slope, low, high, dual_clip, bound):
    """Writes the sums; returns the gradient with respect to the log ratio `delta`."""
    clamped = _clamp(delta, -bound, bound)
    ratio = tl.exp(clamped)
    banded = _clamp(ratio, low, high)
    unclipped, clipped = -advantage * ratio, -advantage * banded
    use_clip, negative = clipped > unclipped, advantage < 0.0
    loss = _larger(clipped, unclipped)
    # Inside the band both are equal and torch gives each a half; outside, a half is lost at a tie.
    share = tl.where((banded == ratio) | (unclipped > clipped), 1.0, 0.0)
    share = tl.where((banded != ratio) & (unclipped == clipped), 0.5, share)
    if dual_clip is not None:
        cap = tl.where(negative, -dual_clip * advantage, float("inf"))
        above = loss > cap
        share = tl.where(above, 0.0, tl.where(loss == cap, 0.5 * share, share))
        loss = _smaller(cap, loss)
        _add(row, _CLIP_DUAL, above.to(tl.float32))
    else:
        tl.store(row + _CLIP_DUAL, 0.0)
    gradient = unclipped * share * (weight * slope)
    kept = tl.where(valid, ratio, 0.0)
    _add(row, _TOKENS, valid.to(tl.float32))
    _add(row, _POLICY_LOSS, loss * weight)
    _add(row, _APPROX_KL_K1, -delta)
    _add(row, _APPROX_KL_K2, 0.5 * delta * delta)
    _add(row, _APPROX_KL_K3, _beyond_linear(clamped, ratio))
    _add(row, _RATIO, kept)
    _add(row, _RATIO_SQUARED, kept * kept)
    _add(row, _CLIP_LOW, (use_clip & negative).to(tl.float32))
    _add(row, _CLIP_HIGH, (use_clip & (advantage > 0.0)).to(tl.float32))
    tl.store(row + _SUMS, tl.max(tl.where(valid, ratio, -float("inf")), axis=0))
    tl.store(row + _SUMS + 1, tl.max(tl.where(valid, -ratio, -float("inf")), axis=0))
    return tl.where(clamped == delta, gradient, gradient * 0.0)  # the clamp passes at its bounds


@triton.jit
def _kl(row, log_ratio, valid, slope, bound, ESTIMATOR: tl.constexpr, OWN: tl.constexpr):
    """Writes the sum of the estimate; returns the gradient with respect to logprobs."""
    d = _clamp(log_ratio, -bound, bound)
    estimate, gradient = d, d
    if ESTIMATOR == 2:
        estimate = 0.5 * d * d
    if ESTIMATOR == 3:
        estimate = _beyond_linear(-d, tl.exp(-d))
    if OWN:
        if ESTIMATOR == 1:
            gradient = tl.zeros_like(d) + 1.0
        if ESTIMATOR == 3:
            gradient = d - estimate  # 1 - exp(-d)
    _add(row, _KL, estimate)
    return tl.where(valid, slope * gradient, 0.0)


@triton.jit
def _value(row, value, old_values, at, target, valid, slope, eps):
    """Writes the sums; returns the gradient with respect to `value`."""
    error = value - target
    squared = error * error
    worst, gradient = squared, error
    if old_values is not None:
        old = _load(old_values, at, valid)
        moved = value - old
        banded = _clamp(moved, -eps, eps)
        near_error = old + banded - target
        near_squared = near_error * near_error
        near_wins = near_squared > squared
        near_gradient = tl.where(banded == moved, near_error, 0.0)
        gradient = tl.where(near_wins, near_gradient, 0.5 * (error + near_gradient))
        gradient = tl.where(squared > near_squared, error, gradient)
        worst = _larger(near_squared, squared)
        # Inside the band near_error is error up to rounding, which must not count as clipped.
        _add(row, _VALUE_CLIP, (near_wins & (banded != moved)).to(tl.float32))
    else:
        tl.store(row + _VALUE_CLIP, 0.0)
    _add(row, _VALUE_TOKENS, valid.to(tl.float32))
    _add(row, _VALUE_LOSS, 0.5 * worst)
    _add(row, _RETURNS, target)
    _add(row, _RETURNS_SQUARED, target * target)
    _add(row, _RESIDUAL, -error)
    _add(row, _RESIDUAL_SQUARED, squared)
    return gradient * slope


@triton.jit
def tile_kernel(
    logprobs,
    old_logprobs,
    advantages,
    entropy,
    ref_logprobs,
    weights,
    values,
    old_values,
    returns,
    kl,
    mask,
    d_logprobs,
    d_entropy,
    d_values,
    d_kl,
    workspace,
    normalizer_tensor,
    normalizer,
    tokens,
    low,
    high,
    dual_clip,
    entropy_coef,
    kl_coef,
    eps,
    value_coef,
    bound,
    ESTIMATOR: tl.constexpr,
    OWN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sums and gradients of tokens [program * BLOCK, ...); every tensor is contiguous."""
    tile = tl.program_id(0).to(tl.int64)
    at = tile * BLOCK + tl.arange(0, BLOCK)
    inside = at < tokens
    valid = inside & (tl.load(mask + at, mask=inside, other=0) != 0)
    row = workspace + tile * _SLOTS
    inverse = _inverse(normalizer_tensor, normalizer)
    if logprobs is not None:
        current = _load(logprobs, at, valid)
        delta = current - _load(old_logprobs, at, valid)
        advantage = _load(advantages, at, valid)
        weight = tl.zeros_like(delta) + 1.0
        if weights is not None:
            weight = _load(weights, at, valid)
        gradient = _policy(
            row, delta, advantage, weight, valid, inverse, low, high, dual_clip, bound
        )
        if ref_logprobs is not None:
            log_ratio = current - _load(ref_logprobs, at, valid)
            gradient += _kl(row, log_ratio, valid, kl_coef * inverse, bound, ESTIMATOR, OWN)
        if d_logprobs is not None:
            tl.store(d_logprobs + at, gradient, mask=inside)
    if entropy is not None:
        _add(row, _ENTROPY, _load(entropy, at, valid))
        if d_entropy is not None:
            slope = tl.where(valid, -entropy_coef * inverse, 0.0)
            tl.store(d_entropy + at, slope, mask=inside)
    if kl is not None:
        _add(row, _KL, _load(kl, at, valid))
        if d_kl is not None:
            tl.store(d_kl + at, tl.where(valid, kl_coef * inverse, 0.0), mask=inside)
    if values is not None:
        value, target = _load(values, at, valid), _load(returns, at, valid)
        slope = value_coef * inverse
        gradient = _value(row, value, old_values, at, target, valid, slope, eps)
        if d_values is not None:
            tl.store(d_values + at, gradient, mask=inside)


@triton.jit
def finish_kernel(
    workspace,
    loss,
    sums,
    extrema,
    normalizer_tensor,
    normalizer,
    tiles,
    entropy_coef,
    kl_coef,
    value_coef,
    HAS_POLICY: tl.constexpr,
    HAS_KL: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    HAS_VALUES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Adds the rows that `tile_kernel` left. A part that is absent left nothing: it counts as 0."""
    slot = tl.arange(0, _SLOTS)
    written = slot < 0
    if HAS_POLICY:
        written = (slot <= _CLIP_DUAL) | (slot == _SUMS) | (slot == _SUMS + 1)
    if HAS_KL:
        written = written | (slot == _KL)
    if HAS_ENTROPY:
        written = written | (slot == _ENTROPY)
    if HAS_VALUES:
        written = written | ((slot >= _VALUE_TOKENS) & (slot < _SUMS))
    is_sum = slot < _SUMS
    totals = tl.zeros([BLOCK, _SLOTS], dtype=tl.float64)
    peaks = tl.full([BLOCK, _SLOTS], -float("inf"), dtype=tl.float32)
    for first in range(0, tiles, BLOCK):
        tile = first + tl.arange(0, BLOCK)
        present = (tile < tiles)[:, None] & written[None, :]
        at = tile.to(tl.int64)[:, None] * _SLOTS + slot[None, :]
        x = tl.load(workspace + at, mask=present, other=0.0)
        totals += tl.where(is_sum[None, :], x, 0.0).to(tl.float64)
        peaks = _larger(tl.where(present, x, -float("inf")), peaks)
    total, peak = tl.sum(totals, axis=0), tl.max(peaks, axis=0)
    tl.store(sums + slot, total.to(tl.float32), mask=is_sum)
    tl.store(extrema + slot - _SUMS, peak, mask=(slot >= _SUMS) & (slot < _SUMS + 2))
    coefficient = tl.where(slot == _POLICY_LOSS, 1.0, 0.0)
    coefficient = tl.where(slot == _KL, kl_coef, coefficient)
    coefficient = tl.where(slot == _ENTROPY, -entropy_coef, coefficient)
    coefficient = tl.where(slot == _VALUE_LOSS, value_coef, coefficient).to(tl.float64)
    used = (coefficient != 0.0) & is_sum
    objective = tl.sum(tl.where(used, coefficient * total, 0.0), axis=0)
    if normalizer_tensor is not None:
        count = tl.load(normalizer_tensor).to(tl.float64)
    else:
        count = tl.zeros([], dtype=tl.float64) + normalizer
    # A step without loss tokens has normalizer 0: its sums are exact zeros.
    result = tl.where(count > 0.0, objective / tl.where(count > 0.0, count, 1.0), objective * 0.0)
    tl.store(loss, result.to(tl.float32))


@triton.jit
def _scale(source, target, at, inside, factor):
    x = tl.load(source + at, mask=inside, other=0.0)
    # A gradient of a masked slot is 0 and stays it, even for an upstream that is not finite.
    x = tl.where(x == 0.0, 0.0, x * factor)
    tl.store(target + at, x.to(target.dtype.element_ty), mask=inside)


@triton.jit
def scale_kernel(
    upstream,
    d_logprobs,
    d_entropy,
    d_values,
    d_kl,
    to_logprobs,
    to_entropy,
    to_values,
    to_kl,
    tokens,
    BLOCK: tl.constexpr,
):
    """The gradients times the upstream gradient, in the dtypes of the inputs."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < tokens
    factor = tl.load(upstream)
    if d_logprobs is not None:
        _scale(d_logprobs, to_logprobs, at, inside, factor)
    if d_entropy is not None:
        _scale(d_entropy, to_entropy, at, inside, factor)
    if d_values is not None:
        _scale(d_values, to_values, at, inside, factor)
    if d_kl is not None:
        _scale(d_kl, to_kl, at, inside, factor)


# ---- ahead of time ------------------------------------------------------------------------------

_INPUTS = (
    *("logprobs", "old_logprobs", "advantages", "entropy", "ref_logprobs", "weights", "values"),
    *("old_values", "returns", "kl"),
)
_OUTPUTS = ("d_logprobs", "d_entropy", "d_values", "d_kl")
_NUMBERS = ("low", "high", "dual_clip", "entropy_coef", "kl_coef", "eps", "value_coef", "bound")


def _tile_case(dtype: str, absent: tuple[str, ...], normalizer: str, estimator: int) -> AotCase:
    signature = dict.fromkeys(_INPUTS, dtype) | {"mask": "*u8"}
    signature |= dict.fromkeys(_OUTPUTS, "*fp32") | {"workspace": "*fp32", "tokens": "i32"}
    signature |= {"normalizer_tensor": normalizer, "normalizer": "fp32"}
    signature |= dict.fromkeys(_NUMBERS, "fp32")
    constants = {"ESTIMATOR": estimator, "OWN": True, "BLOCK": TILE} | dict.fromkeys(absent)
    signature = {name: kind for name, kind in signature.items() if name not in absent}
    return AotCase(tile_kernel, signature, constants, num_warps=TILE_WARPS)


def _finish_case(normalizer: str | None, parts: bool) -> AotCase:
    signature = dict.fromkeys(("workspace", "loss", "sums", "extrema"), "*fp32") | {"tiles": "i32"}
    signature |= dict.fromkeys(("entropy_coef", "kl_coef", "value_coef", "normalizer"), "fp32")
    constants: dict[str, Any] = {"HAS_POLICY": True, "HAS_KL": parts, "HAS_ENTROPY": parts}
    constants |= {"HAS_VALUES": parts, "BLOCK": ROWS}
    if normalizer is None:
        constants["normalizer_tensor"] = None
    else:
        signature["normalizer_tensor"] = normalizer
    return AotCase(finish_kernel, signature, constants, num_warps=FINISH_WARPS)


AOT_CASES = (
    _tile_case("*fp32", ("kl",), "*i64", 3),
    _tile_case("*bf16", ("kl", "weights", "dual_clip", "d_kl", "normalizer_tensor"), "", 3),
    _tile_case("*bf16", ("ref_logprobs", *_INPUTS[6:9], "d_values"), "*fp64", 4),
    _finish_case("*i64", True),
    _finish_case(None, False),
    AotCase(
        scale_kernel,
        {
            "upstream": "*fp32",
            **dict.fromkeys(("d_logprobs", "d_entropy", "d_values"), "*fp32"),
            **dict.fromkeys(("to_logprobs", "to_entropy", "to_values"), "*bf16"),
            "tokens": "i32",
        },
        {"d_kl": None, "to_kl": None, "BLOCK": TILE},
        num_warps=TILE_WARPS,
    ),
)
