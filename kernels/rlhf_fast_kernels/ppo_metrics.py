"""What `ppo_loss` reports, and the means that a training step logs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_fast_kernels.ppo_arguments import Inputs
from rlhf_fast_kernels.reference import PPO_SUM_NAMES

EXTREMA_NAMES = ("ratio_max", "negative_ratio_min")
_POLICY_SUMS = (
    "tokens",
    "policy_loss",
    "approx_kl_k1",
    "approx_kl_k2",
    "approx_kl_k3",
    "ratio",
    "ratio_squared",
    "clip_low",
    "clip_high",
    "clip_dual",
)
_VALUE_SUMS = (
    "value_tokens",
    "value_loss",
    "value_clip",
    "returns",
    "returns_squared",
    "residual",
    "residual_squared",
)


class PPOLossOutput(NamedTuple):
    """What `ppo_loss` returns.

    Attributes:
        loss: [] fp32, differentiable, already divided by the normalizer.
        metrics: [] fp32 each, sums over the masked tokens (undivided), to be added over
            microbatches and ranks and then given to `finalize_metrics`. Only the parts that were
            computed: `tokens`, `policy_loss`, `approx_kl_k1`, `approx_kl_k2`, `approx_kl_k3`,
            `ratio`, `ratio_squared`, `clip_low`, `clip_high`, `clip_dual`; `kl` with
            `ref_logprobs` or `kl`; `entropy` with `entropy`; `value_tokens`, `value_loss`,
            `value_clip`, `returns`, `returns_squared`, `residual`, `residual_squared` with
            `values`.
        extrema: [] fp32 each, to be combined by maximum: `ratio_max` and `negative_ratio_min`;
            -inf where no token was counted. Empty without the policy part.
    """

    loss: Tensor
    metrics: dict[str, Tensor]
    extrema: dict[str, Tensor]


def as_output(loss: Tensor, sums: Tensor, extrema: Tensor, inputs: Inputs) -> PPOLossOutput:
    policy = inputs.logprobs is not None
    kl = inputs.ref_logprobs is not None or inputs.kl is not None
    parts = (
        (policy, _POLICY_SUMS),
        (kl, ("kl",)),
        (inputs.entropy is not None, ("entropy",)),
        (inputs.values is not None, _VALUE_SUMS),
    )
    by_name = dict(zip(PPO_SUM_NAMES, sums.unbind(), strict=True))
    metrics = {name: by_name[name] for present, names in parts if present for name in names}
    peaks = dict(zip(EXTREMA_NAMES, extrema.unbind(), strict=True)) if policy else {}
    return PPOLossOutput(loss, metrics, peaks)


def finalize_metrics(
    sums: Mapping[str, Tensor | float],
    extrema: Mapping[str, Tensor | float] | None = None,
) -> dict[str, float]:
    """Means of the sums of `PPOLossOutput.metrics`, after adding them over a step.

    Args:
        sums: metrics added over microbatches and ranks.
        extrema: `PPOLossOutput.extrema` combined by maximum over the same.

    Returns:
        Per-token means `policy_loss`, `approx_kl_k1`, `approx_kl_k2` (TRL's approxkl),
        `approx_kl_k3`, `ratio`, `ratio_variance`, `clip_fraction` (`_low`, `_high`, `_dual`), `kl`,
        `entropy`, `value_loss`, `value_clip_fraction`, `returns`, `returns_variance`,
        `explained_variance` (1 - var(R - v) / var(R); NaN for constant returns), the counts
        `tokens` and `value_tokens`, and `ratio_max`, `ratio_min`. Parts that were not summed are
        absent, and means over no token are 0.
    """
    names = [*sums, *(extrema or {})]
    numbers = [*sums.values(), *(extrema or {}).values()]
    # One transfer for all of them: each float() of a device tensor would wait for the device.
    packed = torch.stack([torch.as_tensor(x).detach().double().reshape(()) for x in numbers])
    raw = dict(zip(names, packed.tolist(), strict=True))
    result: dict[str, float] = {}
    if "tokens" in raw:
        result |= _policy_means(raw)
    if "value_tokens" in raw:
        result |= _value_means(raw)
    if "ratio_max" in raw:
        result |= {"ratio_max": raw["ratio_max"], "ratio_min": -raw["negative_ratio_min"]}
    return result


def _policy_means(raw: Mapping[str, float]) -> dict[str, float]:
    tokens = raw["tokens"]
    over = max(tokens, 1.0)
    same = ("policy_loss", "approx_kl_k1", "approx_kl_k2", "approx_kl_k3", "ratio", "kl", "entropy")
    means = {name: raw[name] / over for name in same if name in raw}
    low, high = raw["clip_low"] / over, raw["clip_high"] / over
    return means | {
        "tokens": tokens,
        "ratio_variance": max(raw["ratio_squared"] / over - means["ratio"] ** 2, 0.0),
        "clip_fraction": low + high,
        "clip_fraction_low": low,
        "clip_fraction_high": high,
        "clip_fraction_dual": raw["clip_dual"] / over,
    }


def _value_means(raw: Mapping[str, float]) -> dict[str, float]:
    tokens = raw["value_tokens"]
    over = max(tokens, 1.0)
    returns, residual = raw["returns"] / over, raw["residual"] / over
    spread = max(raw["returns_squared"] / over - returns**2, 0.0)
    left = max(raw["residual_squared"] / over - residual**2, 0.0)
    return {
        "value_tokens": tokens,
        "value_loss": raw["value_loss"] / over,
        "value_clip_fraction": raw["value_clip"] / over,
        "returns": returns,
        "returns_variance": spread,
        "explained_variance": 1.0 - left / spread if spread > 0 else float("nan"),
    }
