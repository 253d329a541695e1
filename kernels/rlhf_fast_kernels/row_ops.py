"""C++ ops bound to their arguments, one after the other.

`prepare` of an op and `bind` of `PagedAttention` and `RopeAndStore` return calls without arguments.
Those of C++ are `_core.BoundOp`s, and their rows do not read each other: row n of what an op writes
comes from row n of what it reads. So a thread may take some rows through a whole sequence of them.
Nothing is waited for between two ops, and what belongs to a row, its keys and values above all,
stays in the caches of one core. The numbers are those of the calls one by one, except that
`linear_small` adds in another order if a thread has few rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rlhf_fast_kernels import native

Call = Callable[[], object]


def prepare_gather(table: Tensor, ids: Tensor, out: Tensor) -> Call:
    """out = table[ids] as a call without arguments, for tensors that stay where they are.

    Args:
        table: `[V, H]`, adjacent elements of a row.
        ids: `[N]` int64, within the table when the call is made.
        out: `[N, H]`, dtype of table, adjacent elements of a row.
    """
    if table.device.type == "cpu" and native.missing("BoundOp") is None:
        width = table.itemsize
        bound: Call = native.core().gather_rows(
            *(len(ids), table.shape[1] * width, table.data_ptr(), table.stride(0) * width),
            *(ids.data_ptr(), out.data_ptr(), out.stride(0) * width),
        )
        return bound
    return partial(torch.index_select, table, 0, ids, out=out)


def are_bound(calls: Sequence[Call]) -> bool:
    """Whether all of them are C++ ops."""
    if native.missing("BoundOp") is not None:
        return False
    bound = native.core().BoundOp
    return all(isinstance(call, bound) for call in calls)


def on_sequences(calls: Sequence[Call], last: Sequence[Call], bounds: Tensor, tokens: int) -> Call:
    """One call for ops on the tokens of packed sequences, then on one row of each sequence.

    A thread takes whole sequences through all of them, some 64 tokens at a time.

    Args:
        calls: `are_bound`, over `tokens` rows; attention with `cu_queries`. Each may read what
            those before it wrote for the same sequence.
        last: likewise, over one row a sequence.
        bounds: `[S + 1]` int32 on the CPU, sequence s has the rows bounds[s] to bounds[s + 1] - 1;
            the caller keeps it alive.
        tokens: rows of `calls`.

    Raises:
        ValueError: ops of other numbers of rows.
    """
    call: Call = native.core().SequenceOps(
        *(list(calls), list(last), bounds.data_ptr(), tokens, len(bounds) - 1),
        native.thread_count(),
    )
    return call


class Steps:
    """Calls to be made one after the other, again and again.

    Args:
        calls: without arguments. If all are C++ ops, they must have the same number of rows, each
            may read what those before it wrote for the same row, and none what they wrote for
            another (pages aside: rows write pages that no other row reads).

    Attributes:
        rows: that `run` can do fewer of; None: the calls do what they do.

    Raises:
        ValueError: C++ ops of different numbers of rows.
    """

    def __init__(self, calls: Sequence[Call]) -> None:
        self._calls = list(calls)
        self._bound: Any = None
        self.rows: int | None = None
        if are_bound(calls):
            self._bound = native.core().BoundOps(self._calls, native.thread_count())
            self.rows = self._bound.rows

    def run(self, rows: int, times: int = 1) -> int:
        """The first `rows` rows through all calls, `times` times.

        Returns:
            How often it was. In C++ a time in which `record_tokens` ended a row is the last, so
            that its place can be given to another.
        """
        if self._bound is not None:
            done: int = self._bound(rows, times)
            return done
        for _ in range(times):
            for call in self._calls:
                call()
        return times
