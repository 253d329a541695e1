"""How generation sees parameters that are sharded over ranks.

    tp         a rank's shard of a projection IS its slice of a tensor-parallel layer: generation
               reads the very bytes that training updates, and moves none of them
    gather     one buffer holds the whole model on every rank, filled by all-gathers a block at a
               time, for the length of a rollout
    layerwise  one block is gathered at a time, for every forward; slow, and the last resort

Each is a twin of the trained module (`twin_of`) whose parameters are slices or gathered weights.
The engine generates from the twin and does not know the difference, but for the few sums of
`TensorParallel`. In `gather` every rank has prompts and a number of steps of its own; in the other
two the ranks of a shard group generate the same samples in step (`lockstep`).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor, nn

from rlhf_fast.engine.tensor_parallel import TensorParallel
from rlhf_fast.errors import GenerationError


class Weights(Protocol):
    """Parameters as the fused forward reads them; `AliasedWeights` is one."""

    def check(self) -> None:
        """Raise RF4031 if the parameters are not where they were."""
        ...

    def concatenated(self, parameters: Sequence[Tensor]) -> Tensor | None:
        """A view over parameters that lie side by side; None if they do not."""
        ...

    def buffer(self, dtype: torch.dtype) -> Tensor:
        """The flat buffer of this type."""
        ...

    @property
    def changes(self) -> int:
        """In-place writes to the parameters so far."""
        ...


class WeightView(Protocol):
    """What `HybridEngine` generates from when parameters are sharded.

    Attributes:
        module: the twin.
        weights: its parameters, for the fused path.
        name, reason: which view, and why that one.
        parallel: what the ranks exchange in a forward; None: nothing.
        lockstep: whether all ranks of a shard group have to generate the same samples.
        nbytes: held beside the shards now.
    """

    @property
    def module(self) -> nn.Module: ...
    @property
    def weights(self) -> Weights: ...
    @property
    def name(self) -> str: ...
    @property
    def reason(self) -> str: ...
    @property
    def parallel(self) -> TensorParallel | None: ...
    @property
    def lockstep(self) -> bool: ...
    @property
    def nbytes(self) -> int: ...

    def reading(self) -> AbstractContextManager[None]:
        """A context in which the twin's parameters have the values that training last wrote.

        All ranks of a shard group enter it together.
        """
        ...

    def agreed(self, number: int) -> int:
        """The least of the ranks' numbers in lockstep, else the number itself."""
        ...


def require_path(view: WeightView | None, path: str) -> None:
    """Refuse a path that would misread a view.

    Slices are summed by the fused forward alone, and ranks take steps together in our runner alone.

    Raises:
        GenerationError: RF4037.
    """
    if view is None:
        return
    sliced = view.parallel is not None and path != "fused"
    if sliced or (view.lockstep and path == "transformers"):
        raise GenerationError(
            "RF4037",
            f"engine.path={path} cannot generate from the weight view {view.name}",
            where="engine.path, distributed.weights",
            remedy="use distributed.weights=gather, or engine.path=auto",
        )
