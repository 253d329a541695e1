"""How `gae` and `rewards_and_gae` reach their kernels: C++ on a CPU, CUDA C++, Triton."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rlhf_fast_kernels import native, triton_support
from rlhf_fast_kernels.gae_arguments import GAE_KL_ESTIMATORS

# ---- what all of them need ----------------------------------------------------------------------


def new_outputs(values: Tensor, number: int) -> list[Tensor]:
    """fp32 and dense, of the shape and on the device of `values`."""
    first = torch.empty_like(values, dtype=torch.float32, memory_format=torch.contiguous_format)
    return [first, *(torch.empty_like(first) for _ in range(number - 1))]


def new_moments(values: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """[rows, 3] fp64; zeros where no kernel will run."""
    rows = values.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    make = torch.empty if values.numel() else torch.zeros
    return make((rows, 3), dtype=torch.float64, device=values.device)


# ---- C++ and CUDA C++ ---------------------------------------------------------------------------


def _shape(values: Tensor, cu_seqlens: Tensor | None) -> tuple[int, int, int, int, bool]:
    if cu_seqlens is None:
        return values.shape[0], values.shape[1], values.numel(), 0, True
    wide = cu_seqlens.dtype == torch.int64
    return cu_seqlens.shape[0] - 1, 0, values.numel(), cu_seqlens.data_ptr(), wide


def gae_native(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor | None,
    gamma: float,
    gae_lambda: float,
    bootstrap: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    advantages, returns = new_outputs(values, 2)
    if values.numel():
        offsets = None if cu_seqlens is None else cu_seqlens.contiguous()
        native.core().gae(
            _shape(values, offsets),
            native.view(rewards),
            native.view(values),
            native.mask_view(mask),
            native.row_view(bootstrap),
            gamma,
            gae_lambda,
            (advantages.data_ptr(), returns.data_ptr()),
            native.placement(values.device),
        )
    return advantages, returns


def rewards_and_gae_native(
    old_logprobs: Tensor,
    ref_logprobs: Tensor | None,
    kl: Tensor | None,
    values: Tensor,
    scores: Tensor,
    mask: Tensor | None,
    kl_coef: float,
    kl_estimator: str,
    kl_in_reward: bool,
    log_ratio_clamp: float | None,
    reward_clip: float | None,
    gamma: float,
    gae_lambda: float,
    bootstrap: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    rewards, kl_out, advantages, returns = new_outputs(values, 4)
    moments = new_moments(values, cu_seqlens)
    if values.numel():
        offsets = None if cu_seqlens is None else cu_seqlens.contiguous()
        per_token = scores.shape == values.shape
        native.core().rewards_and_gae(
            _shape(values, offsets),
            (
                native.view(old_logprobs),
                native.view(ref_logprobs),
                native.view(kl),
                native.view(scores) if per_token else native.row_view(scores),
                per_token,
            ),
            (_estimator(kl_estimator), kl_coef, kl_in_reward, log_ratio_clamp, reward_clip),
            native.view(values),
            native.mask_view(mask),
            native.row_view(bootstrap),
            gamma,
            gae_lambda,
            (
                advantages.data_ptr(),
                returns.data_ptr(),
                rewards.data_ptr(),
                kl_out.data_ptr(),
                moments.data_ptr(),
            ),
            native.placement(values.device),
        )
    return rewards, kl_out, advantages, returns, moments


def _estimator(name: str) -> int:
    """`enum class KlEstimator` of csrc/cpu/rewards_and_gae.h; an exact KL is told by its tensor."""
    return 1 + GAE_KL_ESTIMATORS.index(name)


# ---- Triton -------------------------------------------------------------------------------------

# log2 of a discount of 0: finite, so that 0^0 = exp2(0 * this) = 1 and 0^1 = exp2(this) = 0.
LOG2_ZERO = -1e30


def _strides(tensor: Tensor | None) -> tuple[int, int]:
    """(row, column) strides of `[S, R]`; of `[N]` as one row."""
    if tensor is None:
        return 0, 0
    return tensor.stride() if tensor.dim() == 2 else (0, tensor.stride(0))  # type: ignore[return-value]


def _launch_triton(
    rewards: Tensor | None,
    log_inputs: tuple[Tensor | None, Tensor | None, Tensor | None],
    scores: Tensor | None,
    values: Tensor,
    mask: Tensor | None,
    bootstrap: Tensor | None,
    cu_seqlens: Tensor | None,
    outputs: tuple[Tensor | None, ...],
    numbers: tuple[float, ...],
    kl_kind: int,
    kl_in_reward: bool,
) -> None:
    kernels = triton_support.kernels("rewards_and_gae")
    offsets = None if cu_seqlens is None else cu_seqlens.contiguous()
    per_token = scores is not None and scores.shape == values.shape
    score_strides = (0, 0) if scores is None else (scores.stride(0), 0)
    triton_support.launch(
        kernels.rewards_and_gae_kernel,
        values.shape[0] if offsets is None else offsets.shape[0] - 1,
        values.device,
        *(rewards, *log_inputs, scores, values, mask, bootstrap, offsets, *outputs),
        values.shape[-1],
        *(stride for x in (rewards, *log_inputs) for stride in _strides(x)),
        *(_strides(scores) if per_token else score_strides),
        *(*_strides(values), *_strides(mask)),
        0 if bootstrap is None else bootstrap.stride(0),
        *numbers,
        KL=kl_kind,
        KL_IN_REWARD=kl_in_reward,
        SCORE_PER_TOKEN=per_token,
        BLOCK=kernels.BLOCK,
        num_warps=kernels.NUM_WARPS,
    )


def _discount(gamma: float, gae_lambda: float) -> tuple[float, float]:
    """gamma, and log2 of gamma times gae_lambda."""
    rate = gamma * gae_lambda
    return gamma, math.log2(rate) if rate > 0 else LOG2_ZERO


def gae_triton(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor | None,
    gamma: float,
    gae_lambda: float,
    bootstrap: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    advantages, returns = new_outputs(values, 2)
    if values.numel():
        _launch_triton(
            rewards,
            (None, None, None),
            None,
            *(values, mask, bootstrap, cu_seqlens),
            (None, None, advantages, returns, None),
            (0.0, math.inf, math.inf, *_discount(gamma, gae_lambda)),
            0,
            False,
        )
    return advantages, returns


def rewards_and_gae_triton(
    old_logprobs: Tensor,
    ref_logprobs: Tensor | None,
    kl: Tensor | None,
    values: Tensor,
    scores: Tensor,
    mask: Tensor | None,
    kl_coef: float,
    kl_estimator: str,
    kl_in_reward: bool,
    log_ratio_clamp: float | None,
    reward_clip: float | None,
    gamma: float,
    gae_lambda: float,
    bootstrap: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    rewards, kl_out, advantages, returns = new_outputs(values, 4)
    moments = new_moments(values, cu_seqlens)
    if values.numel():
        known = kl is not None or ref_logprobs is not None
        bounds = (math.inf if x is None else x for x in (log_ratio_clamp, reward_clip))
        _launch_triton(
            None,
            (None if ref_logprobs is None else old_logprobs, ref_logprobs, kl),
            scores,
            *(values, mask, bootstrap, cu_seqlens),
            (rewards, kl_out, advantages, returns, moments),
            (kl_coef, *bounds, *_discount(gamma, gae_lambda)),
            _estimator(kl_estimator) if known else 0,
            kl_in_reward,
        )
    return rewards, kl_out, advantages, returns, moments
