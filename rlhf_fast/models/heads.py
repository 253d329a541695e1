"""Scalar heads of classifiers: reward models and critics."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

from rlhf_fast.errors import ModelError

CALIBRATION_KEY = "rlhf_fast_calibration"


@dataclass(frozen=True)
class Calibration:
    """calibrated score = gain * raw + bias."""

    gain: float = 1.0
    bias: float = 0.0

    def apply(self, raw: Tensor) -> Tensor:
        """The calibrated scores, shape kept; the identity returns `raw` itself."""
        return raw if self == Calibration() else raw * self.gain + self.bias


def set_calibration(module: nn.Module, gain: float, bias: float) -> None:
    """Store a calibration in the module's config, so that it is saved in config.json.

    `RewardModel` and `Critic` apply it wherever they score. Plain transformers ignores the key and
    returns the raw score.
    """
    if not (math.isfinite(gain) and math.isfinite(bias)):
        raise ModelError(
            "RF3003",
            f"calibration is not finite: gain {gain}, bias {bias}",
            remedy="look at the scores it was fitted on; do they vary?",
        )
    setattr(module.config, CALIBRATION_KEY, {"gain": float(gain), "bias": float(bias)})


def get_calibration(module: nn.Module) -> Calibration:
    """The calibration stored in the module's config; the identity if there is none."""
    stored = getattr(module.config, CALIBRATION_KEY, None)
    return Calibration(**stored) if stored else Calibration()


def require_classifier(config_class: type, where: str) -> None:
    """Refuse an architecture of which transformers has no sequence classifier (Granite, Cohere).

    Args:
        config_class: of the model's config.
        where: what was to be one.

    Raises:
        ModelError: RF3028.
    """
    if config_class not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        kind = getattr(config_class, "model_type", "") or config_class.__name__
        raise ModelError(
            "RF3028",
            f"transformers has no sequence classifier of architecture {kind}",
            where=where,
            expected="one: reward models, critics and their exports are sequence classifiers",
            remedy="PPO: algorithm.estimator=rloo or grpo, or lora.rank, with reward.function; "
            "reward model: lora.rank without lora.merge_on_export; or another base model",
        )


def scalar_head(module: nn.Module) -> nn.Linear:
    """The last linear layer of a sequence classifier with one label."""
    head = getattr(module, "score", None)
    if not isinstance(head, nn.Linear) or head.out_features != 1:
        found = f"{type(module).__name__} with {getattr(module.config, 'num_labels', '?')} labels"
        raise ModelError(
            "RF3004",
            "the model has no scalar head",
            where=found,
            expected="a sequence classifier whose `score` layer maps hidden states to one number",
            remedy="load it with load_sequence_classifier(path, init_head=True)",
        )
    return head


class ValueHead(nn.Module):
    """A scalar head of its own, for hidden states of a trunk that another module owns.

    It is called `score` and has no bias, as in the classifiers of transformers. It begins at zero,
    so that an untrained critic is the constant baseline 0.
    """

    def __init__(self, width: int, device: torch.device) -> None:
        super().__init__()
        self.score = nn.Linear(width, 1, bias=False, device=device)
        nn.init.zeros_(self.score.weight)

    def forward(self, hidden: Tensor) -> Tensor:
        """[n] float32 for hidden rows [n, H]; in fp32 even under autocast, as `scalar_outputs`."""
        with torch.autocast(hidden.device.type, enabled=False):
            value: Tensor = self.score(hidden.to(self.score.weight.dtype)).squeeze(-1).float()
        return value


def scalar_outputs(module: nn.Module, hidden: Tensor) -> Tensor:
    """[n] float32 calibrated outputs of the scalar head for hidden rows [n, H].

    The head runs in fp32 even under autocast: bf16 would round a score of 4 to steps of 1/64.
    """
    head = scalar_head(module)
    with torch.autocast(hidden.device.type, enabled=False):
        raw = head(hidden.to(head.weight.dtype)).squeeze(-1).float()
    return get_calibration(module).apply(raw)
