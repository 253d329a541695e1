"""PPO-ptx: the cross-entropy of texts from pretraining, added to the policy's loss.

Ouyang et al. 2022, "Training language models to follow instructions with human feedback", eq. 2.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from rlhf_fast.protocols import PolicyModel
from rlhf_fast.types import PackedSequences


@dataclass(frozen=True)
class PretrainingBatch:
    """One optimizer step's texts.

    Args:
        tokens: that are predicted, on all ranks.
        microbatches: this rank's forwards, as many as any other rank has, of so many tokens at most
            (more if one text has): (sequences, targets [N] with IGNORE_INDEX).
    """

    tokens: int
    microbatches: Callable[[int], list[tuple[PackedSequences, Tensor]]]

    def backward(self, actor: PolicyModel, *, budget: int, coef: float) -> float:
        """Add the gradient of coef times the mean cross-entropy; returns this rank's part of it.

        Args:
            actor: gets the gradient.
            budget: tokens of one forward.
            coef: weight in the loss.

        Returns:
            Nats per token; the sum over ranks is the mean.
        """
        total = 0.0
        for sequences, targets in self.microbatches(budget):
            logprobs, _ = actor.logprobs(sequences, targets)
            loss = -logprobs.sum() / max(1, self.tokens)
            (coef * loss).backward()
            total += float(loss.detach())
        return total


class PretrainingSource(Protocol):
    """Batches for the PPO-ptx term."""

    def next_batch(self) -> PretrainingBatch:
        """The texts of the next optimizer step, the same on every rank."""
        ...
