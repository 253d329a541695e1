"""What the logit ops share: how logits become a distribution, and its sums."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


def dense_temperature(temperature: Tensor | None) -> Tensor | None:
    """fp32, side by side."""
    return None if temperature is None else temperature.to(torch.float32).contiguous()


class RowSettings(NamedTuple):
    """How logits x become a distribution p = softmax(z) over the vocabulary.

    Attributes:
        temperature: one a label, fp32, or None.
        scale: the temperature of all rows where `temperature` is None.
        softcap: z = softcap * tanh(x / softcap) before the temperature; None: z = x.
        ignore_index: rows with this label are not read; their results and gradients are 0.
        vocab_start: id of column 0.
        vocab_size: ids of the whole vocabulary. Columns from there on are not read and have
            gradient 0; a label at or beyond it gives NaN. None: the last column is the last id.
    """

    temperature: Tensor | None
    scale: float
    softcap: float | None
    ignore_index: int = -100
    vocab_start: int = 0
    vocab_size: int | None = None

    def ready(self) -> RowSettings:
        """With temperatures as kernels read them: fp32, side by side."""
        return self._replace(temperature=dense_temperature(self.temperature))

    def columns(self, width: int) -> int:
        """How many of `width` columns belong to the vocabulary."""
        return min(width, max(0, self.labels_end(width) - self.vocab_start))

    def labels_end(self, width: int) -> int:
        """Labels are legal below this."""
        return self.vocab_start + width if self.vocab_size is None else self.vocab_size


class RowStats(NamedTuple):
    """Sums over each row's vocabulary, in nats; all of labels' shape.

    Attributes:
        logprobs: fp32, log-probability of the label. Of a shard: the label's z (its logit after
            softcap and temperature), 0 where another shard holds the label.
        entropy: fp32, or None.
        lse: fp64, log sum exp z. fp32 would cost backward the digits that its own size takes.
    """

    logprobs: Tensor
    entropy: Tensor | None
    lse: Tensor
