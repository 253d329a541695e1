"""The KL coefficient: fixed, or Ziegler's proportional controller."""

from __future__ import annotations

import math

from rlhf_fast.config import KLConfig


class KLController:
    """Holds the KL coefficient and moves it towards a target KL.

    Ziegler et al. 2019, section 2.2: e = clip(KL / target - 1, -0.2, 0.2),
    coef <- coef * (1 + e * n / horizon), with KL the mean over sequences of the summed per-token
    log-ratio, in nats, and n the number of episodes of the batch. A target of other trainers that
    feed a per-token mean KL is not transferable.
    """

    def __init__(self, config: KLConfig) -> None:
        self.coef = config.coef
        self._adaptive = config.adaptive
        self._target = config.target
        self._horizon = config.horizon

    def update(self, kl_per_sequence: float, episodes: int) -> None:
        """Move the coefficient after a batch of `episodes` with this mean KL per sequence.

        NaN leaves it as it is: it would be NaN for the rest of the run.
        """
        if self._adaptive and not math.isnan(kl_per_sequence):
            error = min(max(kl_per_sequence / self._target - 1.0, -0.2), 0.2)
            self.coef *= 1.0 + error * episodes / self._horizon

    def state_dict(self) -> dict[str, float]:
        """What a checkpoint must hold."""
        return {"coef": self.coef}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Continue from a checkpoint."""
        self.coef = float(state["coef"])
