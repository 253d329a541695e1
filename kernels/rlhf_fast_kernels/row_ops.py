"""C++ ops bound to their arguments, one after the other in one call.

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


def in_sequence(calls: Sequence[Call]) -> Call:
    """One call for all of them, in this order.

    Args:
        calls: without arguments. If all are C++ ops, they must have the same number of rows, each
            may read what those before it wrote for the same row, and none what they wrote for
            another (page tables and pages aside: rows write pages that no other row reads).

    Raises:
        ValueError: C++ ops of different numbers of rows.
    """
    if calls and native.missing("BoundOp") is None:
        core = native.core()
        if all(isinstance(call, core.BoundOp) for call in calls):
            bound: Call = core.BoundOps(list(calls), native.thread_count())
            return bound

    def run() -> None:
        for call in calls:
            call()

    return run
