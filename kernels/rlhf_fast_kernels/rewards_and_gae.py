"""Per-token KL, reward placement, generalised advantage estimation, moments for the whitening.

With t+1 the next token whose mask is true (masked steps in between carry value and advantage):

    d_t      = old_logprob_t - ref_logprob_t, clamped to +-log_ratio_clamp if given
    kl_t     = d_t | d_t^2 / 2 | exp(-d_t) - 1 + d_t          k1 | k2 | k3, Schulman 2020
             | as given: KL over the whole vocabulary         exact
    reward_t = -kl_coef kl_t + clip(score, +-reward_clip)     at the last true token, or per token
    delta_t  = reward_t + gamma V_{t+1} - V_t
    A_t      = delta_t + gamma gae_lambda A_{t+1}             Schulman et al. 2016, eq. 16
    return_t = A_t + V_t
    moments  = count, mean and sum of squared deviations of the A_t of each sequence

V after the last true token is `bootstrap` (0 by default: the sequence ended), A after it is 0.
Every output is exactly 0 where the mask is false, and what masked slots hold, NaN included, changes
nothing. All of it is one launch; `whiten(advantages, mask, stats=moments)` is the second.

No gradient flows through these ops: advantages and returns are targets. Outputs are detached.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_fast_kernels import dispatch, native, reference, triton_support
from rlhf_fast_kernels.gae_arguments import (
    check_bound,
    check_discount,
    check_floats,
    check_kl,
    check_layout,
    check_scores,
    check_segments,
)
from rlhf_fast_kernels.gae_launchers import (
    gae_native,
    gae_triton,
    rewards_and_gae_native,
    rewards_and_gae_triton,
)
from rlhf_fast_kernels.reference import moments_dtype, output_dtype
from rlhf_fast_kernels.registry import opaque_op

FAST_DTYPES = tuple(native.DTYPE_CODES)


class RewardsAndGAE(NamedTuple):
    """What `rewards_and_gae` returns.

    The first four are `[S, R]` or `[N]`, fp32, exactly 0 where masked.

    Attributes:
        rewards: per token, KL penalty and score included.
        kl: per token in nats, unscaled.
        advantages: GAE, not whitened.
        returns: advantages + values, the critic's target.
        moments: `[S, 3]` or `[K, 3]` fp64: count, mean and sum of squared deviations of each
            sequence's advantages, for `whiten(stats=)` and `merge_moments`.
    """

    rewards: Tensor
    kl: Tensor
    advantages: Tensor
    returns: Tensor
    moments: Tensor


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
    check_segments("gae", cu_seqlens, values.numel())
    floats = [x for x in (rewards, values, bootstrap) if x is not None]
    advantages, returns = dispatch.choose("gae", impl, *floats).function(
        rewards, values, mask, gamma, gae_lambda, bootstrap, cu_seqlens
    )
    return advantages, returns


def _run_rewards_and_gae(
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
    impl: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    check_segments("rewards_and_gae", cu_seqlens, values.numel())
    tensors = (values, old_logprobs, ref_logprobs, kl, scores, bootstrap)
    floats = [x for x in tensors if x is not None]
    rewards, kl_out, advantages, returns, moments = dispatch.choose(
        "rewards_and_gae", impl, *floats
    ).function(
        *(old_logprobs, ref_logprobs, kl, values, scores, mask),
        *(kl_coef, kl_estimator, kl_in_reward, log_ratio_clamp, reward_clip),
        *(gamma, gae_lambda, bootstrap, cu_seqlens),
    )
    return rewards, kl_out, advantages, returns, moments


def _fake_outputs(values: Tensor, count: int, *arguments: object) -> tuple[Tensor, ...]:
    dtype = output_dtype(*(x for x in arguments if isinstance(x, Tensor)))
    return tuple(torch.empty(values.shape, dtype=dtype, device=values.device) for _ in range(count))


def _fake_rewards_and_gae(*arguments: object) -> tuple[Tensor, ...]:
    values, cu_seqlens = arguments[3], arguments[14]
    assert isinstance(values, Tensor)
    rows = cu_seqlens.shape[0] - 1 if isinstance(cu_seqlens, Tensor) else values.shape[0]
    moments = torch.empty((rows, 3), dtype=moments_dtype(values), device=values.device)
    return *_fake_outputs(values, 4, *arguments), moments


_gae = opaque_op("gae", _run_gae, lambda *args: _fake_outputs(args[1], 2, *args))
_rewards_and_gae = opaque_op("rewards_and_gae", _run_rewards_and_gae, _fake_rewards_and_gae)


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
        gamma: discount per token, in [0, 1].
        gae_lambda: weight of the multi-step estimates, in [0, 1].
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
    check_layout("gae", values, mask, bootstrap, cu_seqlens)
    check_floats("gae", "rewards", rewards, values.shape, values)
    discount = check_discount("gae", gamma, gae_lambda)
    advantages, returns = _gae(rewards, values, mask, *discount, bootstrap, cu_seqlens, impl)
    return advantages, returns


def rewards_and_gae(
    old_logprobs: Tensor,
    ref_logprobs: Tensor | None,
    values: Tensor,
    scores: Tensor,
    mask: Tensor | None,
    *,
    kl: Tensor | None = None,
    kl_coef: float,
    kl_estimator: str = "k1",
    kl_in_reward: bool = True,
    log_ratio_clamp: float | None = None,
    reward_clip: float | None = None,
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
        ref_logprobs: the same under the reference; None: the KL is `kl`, or 0 without that.
        values: the critic's, same shape.
        scores: one per sequence (`[S]` or `[K]`), added at the last token whose mask is true, or
            one per token (shape of `values`), added where the mask is true.
        mask, gamma, gae_lambda, bootstrap, cu_seqlens, impl: as in `gae`.
        kl: the divergence per token, as `linear_kl` gives it, instead of an estimate; goes with
            `kl_estimator="exact"`, without `ref_logprobs` and without a clamp.
        kl_coef: weight of the penalty in the rewards.
        kl_estimator: `"k1"`, `"k2"`, `"k3"`, or `"exact"`.
        kl_in_reward: False leaves the KL out of the rewards; it is returned all the same.
        log_ratio_clamp: bound of |old - ref| before the estimator; None: none.
        reward_clip: bound of |score|, applied before the KL penalty is added; None: none.

    Returns:
        `RewardsAndGAE(rewards, kl, advantages, returns, moments)`.

    Raises:
        ValueError, TypeError, RuntimeError: as in `gae`; also an unknown `kl_estimator`, `kl`
            without `"exact"` or beside `ref_logprobs`, a bound that is not positive.
    """
    op = "rewards_and_gae"
    rows = check_layout(op, values, mask, bootstrap, cu_seqlens)
    check_floats(op, "old_logprobs", old_logprobs, values.shape, values)
    check_scores(op, scores, rows, values)
    check_kl(op, ref_logprobs, kl, kl_estimator, log_ratio_clamp, values)
    clamp = check_bound(op, "log_ratio_clamp", log_ratio_clamp)
    clip = check_bound(op, "reward_clip", reward_clip)
    return RewardsAndGAE(
        *_rewards_and_gae(
            *(old_logprobs, ref_logprobs, kl, values, scores, mask, float(kl_coef), kl_estimator),
            *(bool(kl_in_reward), clamp, clip, *check_discount(op, gamma, gae_lambda)),
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
    run = partial(rewards_and_gae, kl_coef=0.05, kl_estimator="k3", gamma=0.99, gae_lambda=0.95)
    return lambda impl: run(old, ref, values, scores[:, 0], mask, reward_clip=1.0, impl=impl)


dispatch.register("gae", "reference", torch.no_grad()(reference.gae))
dispatch.register("rewards_and_gae", "reference", torch.no_grad()(reference.rewards_and_gae))
for _op, _native, _triton, _case in (
    ("gae", gae_native, gae_triton, _selftest_gae),
    (
        "rewards_and_gae",
        rewards_and_gae_native,
        rewards_and_gae_triton,
        _selftest_rewards_and_gae,
    ),
):
    dispatch.register(_op, "cpu", _native, native.on_cpu(_op), dtypes=FAST_DTYPES)
    dispatch.register(_op, "cuda", _native, native.on_cuda(_op), dtypes=FAST_DTYPES)
    triton_support.register(_op, _triton)
    dispatch.register_selftest(_op, _case)
