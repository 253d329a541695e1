"""Who computes on a vocabulary head: this process, or the ranks that hold its rows between them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from rlhf_fast_kernels import LinearPPOLossOutput


class HeadOps(Protocol):
    """The ops from hidden states and a head to what a loss needs; `rlhf_fast_kernels` has them."""

    @property
    def linear_logprobs(self) -> Callable[..., tuple[Tensor, Tensor | None]]:
        """As `rlhf_fast_kernels.linear_logprobs`."""
        ...

    @property
    def linear_ppo_loss(self) -> Callable[..., LinearPPOLossOutput]:
        """As `rlhf_fast_kernels.linear_ppo_loss`."""
        ...

    @property
    def linear_kl(self) -> Callable[..., Tensor]:
        """As `rlhf_fast_kernels.linear_kl`."""
        ...


class HeadShards(HeadOps, Protocol):
    """The ranks that hold the rows of a head between them; their ops are collective.

    Each takes a rank's own hidden states and targets beside its rows of the weight, and returns
    what the op of one process with the whole weight would for that rank's tokens.
    """

    @property
    def vocab(self) -> int:
        """Rows of the whole weight."""
        ...

    def local(self, parameter: Tensor) -> Tensor:
        """This rank's rows of a weight or bias, cut or whole, with graph: gradients get there."""
        ...

    def likeliest(
        self,
        hidden: Tensor,
        weight: Tensor,
        *,
        bias: Tensor | None = None,
        compute_dtype: torch.dtype | None = None,
    ) -> Tensor:
        """[N] int64: the row of the weight with the largest logit, for each hidden state."""
        ...
