"""What the ops on the exact KL share: how rows of logits become distributions, and their sums."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from rlhf_fast_kernels.logit_settings import dense_temperature


class KLRowSettings(NamedTuple):
    """How logits x become p = softmax(z), and the reference's logits q = softmax(z').

    Attributes:
        temperature: one a row, fp32, or None. Both sides are divided by it.
        scale: the temperature of all rows where `temperature` is None.
        softcap: z = softcap * tanh(x / softcap) before the temperature; None: z = x.
        ref_softcap: the same of the reference's logits.
        vocab_start: id of column 0.
        vocab_size: ids of the whole vocabulary. Columns from there on are not read and have
            gradient 0. None: the last column is the last id.
    """

    temperature: Tensor | None
    scale: float
    softcap: float | None
    ref_softcap: float | None
    vocab_start: int = 0
    vocab_size: int | None = None

    def ready(self) -> KLRowSettings:
        """With temperatures as kernels read them: fp32, side by side."""
        return self._replace(temperature=dense_temperature(self.temperature))

    def columns(self, width: int) -> int:
        """How many of `width` columns belong to the vocabulary."""
        end = self.vocab_start + width if self.vocab_size is None else self.vocab_size
        return min(width, max(0, end - self.vocab_start))


class KLRowStats(NamedTuple):
    """Sums over each row's vocabulary, in nats.

    Attributes:
        kl: fp32, KL(p || q). Of a shard: of the two distributions over the shard's columns alone,
            each normalised there; `merge_kl_shards` makes the whole of these.
        lse: fp64, log sum exp z.
        ref_lse: fp64, the same of the reference. In fp32 their difference, about which the
            log-ratios are centred, would have an error of 1e-6.
    """

    kl: Tensor
    lse: Tensor
    ref_lse: Tensor
