"""What a call of the page allocator costs, batches as int64 tensors.

python -m bench.kernels.kv_pages_calls [--sequences 256] [--calls 20000] [--impl cpu]
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence

import torch

from rlhf_fast_kernels import PageAllocator

PAGE_SIZE = 16
LENGTH = 100
RUNS = 5


def microseconds(call: Callable[[], object], calls: int) -> float:
    """Per call; the fastest of RUNS runs."""
    best = float("inf")
    for _ in range(RUNS):
        start = time.perf_counter()
        for _ in range(calls):
            call()
        best = min(best, time.perf_counter() - start)
    return best / calls * 1e6


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="calls of the page allocator")
    parser.add_argument("--sequences", type=int, default=256)
    parser.add_argument("--calls", type=int, default=20000)
    parser.add_argument("--impl", choices=("cpu", "reference"))
    options = parser.parse_args(arguments)
    count = options.sequences
    pages = PageAllocator(16 * count, PAGE_SIZE, impl=options.impl)
    handles = torch.tensor([pages.create() for _ in range(count)])
    lengths = torch.full((count,), LENGTH)
    longer = lengths + PAGE_SIZE
    pages.extend(handles, lengths)
    first, first_length, starts = handles[:1], lengths[:1], lengths - 1
    table = torch.empty(count, 16, dtype=torch.int32)
    slots, ones = torch.empty(count, dtype=torch.int64), torch.ones(count, dtype=torch.int64)

    def grow_and_shrink() -> None:
        pages.extend(handles, longer)
        pages.truncate(handles, lengths)

    cases: dict[str, Callable[[], object]] = {
        "extend, 1 sequence, no new page": lambda: pages.extend(first, first_length),
        f"extend, {count} sequences, no new page": lambda: pages.extend(handles, lengths),
        f"extend, {count} sequences, a page each, and truncate": grow_and_shrink,
        f"fill_table, {count} sequences": lambda: pages.fill_table(handles, table),
        f"fill_slots, {count} x 1 token": lambda: pages.fill_slots(handles, starts, ones, slots),
    }
    for name, call in cases.items():
        print(f"{microseconds(call, options.calls):8.2f} us  {name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
