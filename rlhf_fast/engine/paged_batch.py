"""What one forward of the runner reads: ragged queries over paged keys and values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from rlhf_fast.engine.paged_cache import CacheShape, PagedCache
from rlhf_fast.engine.tensor_parallel import TensorParallel

Call = Callable[[], object]


@dataclass(frozen=True)
class PagedBatch:
    """N query tokens of S sequences; decoding has one query a sequence.

    Args:
        ids: [N] int64 token ids.
        positions: [N] int64 position of each in its sequence.
        slots: [N] int64 place of its key and value: page * page size + offset; -1: not stored.
        page_table: [S, T] int32 pages of each sequence; entries beyond its context are never read.
        context_lengths: [S] int32 tokens of each sequence, these queries included; 0: padding row.
        cu_queries: [S+1] int32 bounds of each sequence's queries; None: one a sequence.
        rows: int64 positions among the N whose logits are wanted; None: all of them.
        max_query, max_context: bounds of the above that the host knows.
        cache: the pages.
        fresh: no sequence has keys from an earlier forward.
    """

    ids: Tensor
    positions: Tensor
    slots: Tensor
    page_table: Tensor
    context_lengths: Tensor
    cu_queries: Tensor | None
    rows: Tensor | None
    max_query: int
    max_context: int
    cache: PagedCache
    fresh: bool = False


class PagedForward(Protocol):
    """A model's forward over pages."""

    @property
    def cache_shape(self) -> CacheShape:
        """What a token costs in pages."""
        ...

    @property
    def parallel(self) -> TensorParallel | None:
        """Ranks with which the vocabulary is shared: logits are those of its own rows."""
        ...

    @property
    def addresses(self) -> tuple[int, ...]:
        """Where the weights lie that a decoding step reads, during a run."""
        ...

    def running(self, max_context: int) -> AbstractContextManager[None]:
        """Surrounds a run: weights are checked, no sequence grows beyond `max_context` tokens."""
        ...

    def paused(self) -> AbstractContextManager[None]:
        """Inside `running`, between two forwards: the module is for others what it was outside."""
        ...

    def decoding(self, batch: PagedBatch) -> tuple[Sequence[Call], Tensor] | None:
        """A decoding step as calls to be made in order, and the logits that they overwrite.

        They serve every step of this batch. None: only `logits` can tell.
        """
        ...

    def logits(self, batch: PagedBatch) -> Tensor:
        """[rows, V] logits of the rows asked for; keys and values of all tokens are stored."""
        ...
