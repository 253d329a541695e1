"""Gain and bias that put a reward model's scores in place."""

from __future__ import annotations

import math

from torch import Tensor

from rlhf_fast.errors import NumericalError


def calibration_of(scores: Tensor, *, unit_gain: bool) -> tuple[float, float]:
    """(gain, bias) that put the mean of `scores` at 0 and, with `unit_gain`, their std at 1.

    The bias alone is the rule of Stiennon et al. 2020 and Ouyang et al. 2022, gain and bias that of
    Ziegler et al. 2019; preferences fix neither, as only differences enter their loss.

    Args:
        scores: [K] raw scores of the demonstrations.
        unit_gain: also scale.

    Raises:
        NumericalError: RF6030 for scores that are not finite, or do not vary under `unit_gain`.
    """
    mean = float(scores.double().mean())
    std = float(scores.double().std(unbiased=False)) if unit_gain else 1.0
    if not math.isfinite(mean) or not math.isfinite(std) or std == 0.0:
        raise NumericalError(
            "RF6030",
            f"the reward model cannot be calibrated: its scores have mean {mean} and std {std}",
            where="demonstrations" if unit_gain else "scores after training",
            expected="finite scores that vary",
            remedy="look at loss/train; lower optim.lr, or give more demonstrations",
        )
    gain = 1.0 / std
    return gain, -gain * mean
