"""Arguments of `ppo_loss`: the tensors of a call, its settings, and what makes them legal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlhf_fast_kernels.reference import KL_ESTIMATORS

OP = "ppo_loss"
PPO_KL_ESTIMATORS = (*KL_ESTIMATORS, "exact")
KL_GRADIENTS = ("k2", "own")


@dataclass(frozen=True)
class Settings:
    clip_eps_low: float
    clip_eps_high: float
    dual_clip: float | None
    entropy_coef: float
    kl_coef: float
    kl_estimator: str
    kl_gradient: str
    value_clip_eps: float | None
    value_coef: float
    log_ratio_clamp: float

    def native(self) -> tuple[Any, ...]:
        """In the same order with the two choices as numbers; None is left as it is."""
        fields = dict(vars(self))
        fields["kl_estimator"] = 1 + PPO_KL_ESTIMATORS.index(self.kl_estimator)
        fields["kl_gradient"] = self.kl_gradient == "own"
        return tuple(fields.values())


@dataclass(frozen=True)
class Inputs:
    """The tensors of one call; all of the same shape, any of them absent with its part."""

    logprobs: Tensor | None
    old_logprobs: Tensor | None
    advantages: Tensor | None
    entropy: Tensor | None
    ref_logprobs: Tensor | None
    weights: Tensor | None
    values: Tensor | None
    old_values: Tensor | None
    returns: Tensor | None
    kl: Tensor | None = None

    def present(self) -> dict[str, Tensor]:
        return {name: x for name, x in vars(self).items() if x is not None}


def validate_inputs(inputs: Inputs, mask: Tensor) -> None:
    policy = (inputs.logprobs, inputs.old_logprobs, inputs.advantages)
    if any(x is None for x in policy) and any(x is not None for x in policy):
        raise ValueError(f"{OP}: logprobs, old_logprobs and advantages go together")
    if (inputs.values is None) != (inputs.returns is None):
        raise ValueError(f"{OP}: values and returns go together")
    if inputs.logprobs is None and inputs.values is None:
        raise ValueError(f"{OP}: give the policy part (logprobs), the value part (values) or both")
    for name in ("entropy", "ref_logprobs", "weights", "kl"):
        if inputs.logprobs is None and getattr(inputs, name) is not None:
            raise ValueError(f"{OP}: {name} belongs to the policy part, but logprobs is absent")
    if mask.dtype != torch.bool:
        raise TypeError(f"{OP}: mask must be bool, got {mask.dtype}")
    for name, x in inputs.present().items():
        if x.shape != mask.shape:
            raise ValueError(
                f"{OP}: {name} has shape {tuple(x.shape)}, mask has {tuple(mask.shape)}"
            )
        if not x.is_floating_point():
            raise TypeError(f"{OP}: {name} must be floating point, got {x.dtype}")
        if x.device != mask.device:
            raise ValueError(f"{OP}: {name} is on {x.device}, mask on {mask.device}")


def validate_settings(settings: Settings, inputs: Inputs) -> None:
    """What goes together with what; the numbers themselves are looked at by `_validate_numbers`."""
    if (settings.kl_estimator == "exact") != (
        inputs.kl is not None
    ) and inputs.logprobs is not None:
        raise ValueError(f"{OP}: kl and kl_estimator='exact' go together")
    if inputs.kl is not None and inputs.ref_logprobs is not None:
        raise ValueError(f"{OP}: give kl (exact) or ref_logprobs (k1, k2, k3), not both")
    _validate_numbers(settings)
    clipping = settings.value_clip_eps is not None and inputs.values is not None
    if clipping and inputs.old_values is None:
        raise ValueError(f"{OP}: value clipping needs old_values (or value_clip_eps=None)")
    if inputs.logprobs is None:
        return
    if settings.kl_coef != 0 and inputs.ref_logprobs is None and inputs.kl is None:
        raise ValueError(f"{OP}: kl_coef is not 0 but ref_logprobs is absent")
    if settings.entropy_coef != 0 and inputs.entropy is None:
        raise ValueError(f"{OP}: entropy_coef is not 0 but entropy is absent")


def validate_normalizer(normalizer: float | Tensor) -> None:
    if isinstance(normalizer, Tensor):
        if normalizer.numel() != 1:
            raise ValueError(f"{OP}: a normalizer tensor must have one element")
    elif not 0 <= normalizer < float("inf"):
        raise ValueError(f"{OP}: normalizer must be finite and not negative, got {normalizer}")


def _validate_numbers(settings: Settings) -> None:
    if settings.kl_estimator not in PPO_KL_ESTIMATORS:
        raise ValueError(f"{OP}: kl_estimator must be one of {PPO_KL_ESTIMATORS}")
    if settings.kl_gradient not in KL_GRADIENTS:
        raise ValueError(f"{OP}: kl_gradient must be one of {KL_GRADIENTS}")
    if settings.clip_eps_low < 0 or settings.clip_eps_high < 0:
        raise ValueError(f"{OP}: clip_eps_low and clip_eps_high must not be negative")
    if settings.dual_clip is not None and settings.dual_clip <= 1:
        raise ValueError(f"{OP}: dual_clip must be above 1, got {settings.dual_clip}")
    if not 0 < settings.log_ratio_clamp <= 80:  # e^88 is the end of fp32
        raise ValueError(f"{OP}: log_ratio_clamp must lie in (0, 80]")
    if settings.value_clip_eps is not None and settings.value_clip_eps <= 0:
        raise ValueError(f"{OP}: value_clip_eps must be positive, or None for no clipping")
