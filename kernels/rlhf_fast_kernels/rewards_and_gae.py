"""Per-token KL, reward placement, generalised advantage estimation.

With t+1 the next token whose mask is true (masked steps in between carry value and advantage):

    d_t      = old_logprob_t - ref_logprob_t, clamped to +-log_ratio_clamp if given
    kl_t     = d_t | d_t^2 / 2 | exp(-d_t) - 1 + d_t          k1 | k2 | k3, Schulman 2020
    reward_t = -kl_coef kl_t + score [at the last true token, or per token]
    delta_t  = reward_t + gamma V_{t+1} - V_t
    A_t      = delta_t + gamma gae_lambda A_{t+1}             Schulman et al. 2016, eq. 16
    return_t = A_t + V_t

V after the last true token is `bootstrap` (0 by default: the sequence ended), A after it is 0.
Every output is exactly 0 where the mask is false, and what masked slots hold, NaN included, changes
nothing.

No gradient flows through these ops: advantages and returns are targets. Outputs are detached.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_fast_kernels import dispatch, native, reference
from rlhf_fast_kernels.reference import KL_ESTIMATORS, output_dtype
from rlhf_fast_kernels.registry import opaque_op

FAST_DTYPES = tuple(native.DTYPE_CODES)


class RewardsAndGAE(NamedTuple):
    """What `rewards_and_gae` returns; each `[S, R]` or `[N]`, fp32, exactly 0 where masked.

    Attributes:
        rewards: per token, KL penalty and score included.
        kl: the estimate per token in nats, unscaled.
        advantages: GAE, not whitened.
        returns: advantages + values, the critic's target.
    """

    rewards: Tensor
    kl: Tensor
    advantages: Tensor
    returns: Tensor


# ---- validation ---------------------------------------------------------------------------------


def _check(op: str, name: str, x: Tensor, shape: torch.Size, like: Tensor) -> None:
    if x.shape != shape:
        raise ValueError(f"{op}: {name} has shape {tuple(x.shape)}, expected {tuple(shape)}")
    if not x.dtype.is_floating_point:
        raise TypeError(f"{op}: {name} must be floating point, got {x.dtype}")
    if x.device != like.device:
        raise ValueError(f"{op}: {name} is on {x.device}, values are on {like.device}")


def _check_layout(
    op: str,
    values: Tensor,
    mask: Tensor | None,
    bootstrap: Tensor | None,
    cu_seqlens: Tensor | None,
) -> int:
    """Shapes of padded or packed inputs; returns the number of rows or segments."""
    packed = cu_seqlens is not None
    if values.dim() != (1 if packed else 2):
        wanted = "[N] with cu_seqlens" if packed else "[S, R] (or [N] with cu_seqlens)"
        raise ValueError(f"{op}: values has shape {tuple(values.shape)}, expected {wanted}")
    if not values.dtype.is_floating_point:
        raise TypeError(f"{op}: values must be floating point, got {values.dtype}")
    rows = values.shape[0]
    if cu_seqlens is not None:
        if cu_seqlens.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{op}: cu_seqlens must be int32 or int64, got {cu_seqlens.dtype}")
        if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1 or cu_seqlens.device != values.device:
            raise ValueError(
                f"{op}: cu_seqlens has shape {tuple(cu_seqlens.shape)} on {cu_seqlens.device}, "
                f"expected [K + 1] on {values.device}"
            )
        rows = cu_seqlens.shape[0] - 1
    if mask is None and not packed:
        raise ValueError(f"{op}: mask is needed for padded [S, R] tensors")
    if mask is not None:
        _check_mask(op, mask, values, "values")
    if bootstrap is not None:
        _check(op, "bootstrap", bootstrap, torch.Size([rows]), values)
    return rows


def _check_mask(op: str, mask: Tensor, like: Tensor, name: str) -> None:
    if mask.dtype != torch.bool:
        raise TypeError(f"{op}: mask must be bool, got {mask.dtype}")
    if mask.shape != like.shape or mask.device != like.device:
        raise ValueError(
            f"{op}: mask has shape {tuple(mask.shape)} on {mask.device}, "
            f"expected that of {name}: {tuple(like.shape)} on {like.device}"
        )


def _check_segments(op: str, cu_seqlens: Tensor | None, tokens: int) -> None:
    """On the CPU only: reading the offsets of an accelerator would stall it."""
    if cu_seqlens is None or cu_seqlens.device.type != "cpu":
        return
    ends = cu_seqlens.tolist()
    rising = all(a <= b for a, b in pairwise(ends))
    if ends[0] != 0 or ends[-1] != tokens or not rising:
        raise ValueError(
            f"{op}: cu_seqlens must rise from 0 to the number of tokens ({tokens}), got {ends}"
            if len(ends) <= 16
            else f"{op}: cu_seqlens must rise from 0 to the number of tokens ({tokens}), "
            f"got [{ends[0]}, ..., {ends[-1]}]{'' if rising else ' with a falling step'}"
        )


# ---- launchers ----------------------------------------------------------------------------------


def _placement(device: torch.device) -> int | tuple[int, int]:
    """Number of CPU threads, or CUDA device and stream."""
    if device.type == "cpu":
        return native.thread_count()
    return device.index or 0, torch.cuda.current_stream(device).cuda_stream


def _shape(values: Tensor, cu_seqlens: Tensor | None) -> tuple[int, int, int, int]:
    if cu_seqlens is None:
        return values.shape[0], values.shape[1], values.numel(), 0
    return cu_seqlens.shape[0] - 1, 0, values.numel(), cu_seqlens.data_ptr()


def _outputs(values: Tensor, count: int) -> list[Tensor]:
    return [
        torch.empty(values.shape, dtype=torch.float32, device=values.device) for _ in range(count)
    ]


def _gae_native(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor | None,
    gamma: float,
    gae_lambda: float,
    bootstrap: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    advantages, returns = _outputs(values, 2)
    if values.numel():
        offsets = None if cu_seqlens is None else cu_seqlens.to(torch.int64).contiguous()
        native.core().gae(
            _shape(values, offsets),
            native.view(rewards),
            native.view(values),
            native.mask_view(mask),
            native.row_view(bootstrap),
            gamma,
            gae_lambda,
            (advantages.data_ptr(), returns.data_ptr()),
            _placement(values.device),
        )
    return advantages, returns


def _rewards_and_gae_native(
    old_logprobs: Tensor,
    ref_logprobs: Tensor | None,
    values: Tensor,
    scores: Tensor,
    mask: Tensor | None,
    kl_coef: float,
    kl_estimator: str,
    kl_in_reward: bool,
    log_ratio_clamp: float | None,
    gamma: float,
    gae_lambda: float,
    bootstrap: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rewards, kl, advantages, returns = _outputs(values, 4)
    if values.numel():
        offsets = None if cu_seqlens is None else cu_seqlens.to(torch.int64).contiguous()
        per_token = scores.shape == values.shape
        native.core().rewards_and_gae(
            _shape(values, offsets),
            (
                native.view(old_logprobs),
                native.view(ref_logprobs),
                native.view(scores) if per_token else native.row_view(scores),
                per_token,
                1 + KL_ESTIMATORS.index(kl_estimator),
                kl_coef,
                kl_in_reward,
                log_ratio_clamp,
            ),
            native.view(values),
            native.mask_view(mask),
            native.row_view(bootstrap),
            gamma,
            gae_lambda,
            tuple(x.data_ptr() for x in (advantages, returns, rewards, kl)),
            _placement(values.device),
        )
    return rewards, kl, advantages, returns


# ---- torch.library ------------------------------------------------------------------------------


def _run_gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor | None,
    gamma: float,
    gae_lambda: float,
    bootstrap: Tensor | None,
    cu_seqlens: Tensor | None,
    impl: str | None,
) -> tuple[Tensor, Tensor]:
    _check_segments("gae", cu_seqlens, values.numel())
    floats = [x for x in (rewards, values, bootstrap) if x is not None]
    with torch.no_grad():
        advantages, returns = dispatch.choose("gae", impl, *floats).function(
            rewards, values, mask, gamma, gae_lambda, bootstrap, cu_seqlens
        )
    return advantages, returns


def _run_rewards_and_gae(
    old_logprobs: Tensor,
    ref_logprobs: Tensor | None,
    values: Tensor,
    scores: Tensor,
    mask: Tensor | None,
    kl_coef: float,
    kl_estimator: str,
    kl_in_reward: bool,
    log_ratio_clamp: float | None,
    gamma: float,
    gae_lambda: float,
    bootstrap: Tensor | None,
    cu_seqlens: Tensor | None,
    impl: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check_segments("rewards_and_gae", cu_seqlens, values.numel())
    tensors = (values, old_logprobs, ref_logprobs, scores, bootstrap)
    floats = [x for x in tensors if x is not None]
    kl_settings = (kl_coef, kl_estimator, kl_in_reward, log_ratio_clamp)
    with torch.no_grad():
        rewards, kl, advantages, returns = dispatch.choose(
            "rewards_and_gae", impl, *floats
        ).function(
            *(old_logprobs, ref_logprobs, values, scores, mask),
            *kl_settings,
            *(gamma, gae_lambda, bootstrap, cu_seqlens),
        )
    return rewards, kl, advantages, returns


def _fake_outputs(values: Tensor, count: int, *arguments: object) -> tuple[Tensor, ...]:
    dtype = output_dtype(*(x for x in arguments if isinstance(x, Tensor)))
    return tuple(torch.empty(values.shape, dtype=dtype, device=values.device) for _ in range(count))


_gae = opaque_op("gae", _run_gae, lambda *args: _fake_outputs(args[1], 2, *args))
_rewards_and_gae = opaque_op(
    "rewards_and_gae", _run_rewards_and_gae, lambda *args: _fake_outputs(args[2], 4, *args)
)


# ---- public functions ---------------------------------------------------------------------------


def gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor | None,
    *,
    gamma: float,
    gae_lambda: float,
    bootstrap: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    impl: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimates and returns from per-token rewards and values.

    Args:
        rewards, values: `[S, R]` padded or `[N]` packed, fp32 or bf16 (other floating dtypes run
            in the PyTorch reference); any strides, expanded tensors included.
        mask: bool of the same shape, true for tokens that count. None is allowed when packed.
        gamma: discount per token.
        gae_lambda: weight of the multi-step estimates.
        bootstrap: `[S]` or `[K]`, value of the state after the last token, for truncated
            sequences; None means 0.
        cu_seqlens: int32 or int64 `[K + 1]`, token offsets of the packed sequences.
        impl: implementation by name, see `rlhf_fast_kernels.dispatch`.

    Returns:
        `(advantages, returns)`, fp32 (fp64 if any input is), shape of `values`, detached, exactly
        0 where the mask is false.

    Raises:
        ValueError: shapes, devices or segment offsets that do not fit; names the argument.
        TypeError: a mask that is not bool, inputs that are not floating point.
        RuntimeError: the implementation asked for cannot run here.
    """
    _check_layout("gae", values, mask, bootstrap, cu_seqlens)
    _check("gae", "rewards", rewards, values.shape, values)
    advantages, returns = _gae(
        rewards, values, mask, float(gamma), float(gae_lambda), bootstrap, cu_seqlens, impl
    )
    return advantages, returns


def rewards_and_gae(
    old_logprobs: Tensor,
    ref_logprobs: Tensor | None,
    values: Tensor,
    scores: Tensor,
    mask: Tensor | None,
    *,
    kl_coef: float,
    kl_estimator: str = "k1",
    kl_in_reward: bool = True,
    log_ratio_clamp: float | None = None,
    gamma: float,
    gae_lambda: float,
    bootstrap: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    impl: str | None = None,
) -> RewardsAndGAE:
    """Everything between the four models' outputs and the loss, in one pass over the tokens.

    Args:
        old_logprobs: log-probs of the tokens under the policy at the start of the PPO step,
            `[S, R]` padded or `[N]` packed, fp32 or bf16, any strides.
        ref_logprobs: the same under the reference; None: the KL is 0.
        values: the critic's, same shape.
        scores: one per sequence (`[S]` or `[K]`), added at the last token whose mask is true, or
            one per token (shape of `values`), added where the mask is true.
        mask, gamma, gae_lambda, bootstrap, cu_seqlens, impl: as in `gae`.
        kl_coef: weight of the penalty in the rewards.
        kl_estimator: `"k1"`, `"k2"` or `"k3"`.
        kl_in_reward: False leaves the KL out of the rewards; it is returned all the same.
        log_ratio_clamp: bound of |old - ref| before the estimator; None: none.

    Returns:
        `RewardsAndGAE(rewards, kl, advantages, returns)`.

    Raises:
        ValueError, TypeError, RuntimeError: as in `gae`; also an unknown `kl_estimator` and a
            clamp that is not positive.
    """
    op = "rewards_and_gae"
    rows = _check_layout(op, values, mask, bootstrap, cu_seqlens)
    _check(op, "old_logprobs", old_logprobs, values.shape, values)
    if ref_logprobs is not None:
        _check(op, "ref_logprobs", ref_logprobs, values.shape, values)
    per_sequence = torch.Size([rows])
    if scores.shape != per_sequence and scores.shape != values.shape:
        raise ValueError(
            f"{op}: scores has shape {tuple(scores.shape)}, expected {tuple(per_sequence)} "
            f"(one per sequence) or {tuple(values.shape)} (one per token)"
        )
    _check(op, "scores", scores, scores.shape, values)
    if kl_estimator not in KL_ESTIMATORS:
        raise ValueError(f"{op}: kl_estimator must be one of {KL_ESTIMATORS}, got {kl_estimator!r}")
    if log_ratio_clamp is not None and not log_ratio_clamp > 0:
        raise ValueError(f"{op}: log_ratio_clamp must be positive, got {log_ratio_clamp}")
    clamp = None if log_ratio_clamp is None else float(log_ratio_clamp)
    return RewardsAndGAE(
        *_rewards_and_gae(
            *(old_logprobs, ref_logprobs, values, scores, mask, float(kl_coef), kl_estimator),
            *(bool(kl_in_reward), clamp, float(gamma), float(gae_lambda)),
            *(bootstrap, cu_seqlens, impl),
        )
    )


# ---- registration -------------------------------------------------------------------------------


def _selftest_inputs(
    device: torch.device, dtype: torch.dtype, generator: torch.Generator
) -> tuple[list[Tensor], Tensor]:
    floats = [torch.randn(5, 300, generator=generator).to(device, dtype) for _ in range(4)]
    return floats, (torch.rand(5, 300, generator=generator) < 0.8).to(device)


def _selftest_gae(
    device: torch.device, dtype: torch.dtype, generator: torch.Generator
) -> dispatch.SelftestRun:
    (rewards, values, _, _), mask = _selftest_inputs(device, dtype, generator)
    return lambda impl: gae(rewards, values, mask, gamma=0.99, gae_lambda=0.95, impl=impl)


def _selftest_rewards_and_gae(
    device: torch.device, dtype: torch.dtype, generator: torch.Generator
) -> dispatch.SelftestRun:
    (old, ref, values, scores), mask = _selftest_inputs(device, dtype, generator)
    return lambda impl: rewards_and_gae(
        *(old, ref, values, scores[:, 0], mask),
        kl_coef=0.05,
        kl_estimator="k3",
        gamma=0.99,
        gae_lambda=0.95,
        impl=impl,
    )


for _op, _native, _reference, _case in (
    ("gae", _gae_native, reference.gae, _selftest_gae),
    (
        "rewards_and_gae",
        _rewards_and_gae_native,
        reference.rewards_and_gae,
        _selftest_rewards_and_gae,
    ),
):
    dispatch.register(_op, "reference", _reference)
    dispatch.register(_op, "cpu", _native, native.on_cpu(_op), dtypes=FAST_DTYPES)
    dispatch.register(_op, "cuda", _native, native.on_cuda(_op), dtypes=FAST_DTYPES)
    dispatch.register_selftest(_op, _case)
