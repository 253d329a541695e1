"""The page allocator in plain Python: the specification, and what runs where nothing is compiled.

The same methods as the compiled class: batches are addresses of contiguous int64 arrays and their
number of elements. Holders are counted by looking at all sequences, so a call is not O(1) a page.
"""

from __future__ import annotations

import ctypes
from typing import Any, NoReturn

RESERVED_PAGES = 1
MAX_PAGES = 2**31 - 1
MAX_LENGTH = 2**40


def _read(address: int, count: int) -> list[int]:
    return list((ctypes.c_int64 * count).from_address(address)) if count else []


def _write(kind: Any, address: int, numbers: list[int]) -> None:
    if numbers:
        (kind * len(numbers)).from_address(address)[:] = numbers


def _refuse(op: str, what: str) -> NoReturn:
    raise ValueError(f"PageAllocator.{op}: {what}")


class _Sequence:
    def __init__(self, pages: list[int], length: int) -> None:
        self.pages = pages
        self.length = length


class PageAllocator:
    """`rlhf_fast_kernels._core.PageAllocator` in Python."""

    def __init__(self, num_pages: int, page_size: int) -> None:
        if not RESERVED_PAGES < num_pages <= MAX_PAGES:
            _refuse(
                "__init__",
                f"num_pages is {num_pages}, expected 2 or more (page 0 is reserved) and below 2^31",
            )
        if not 1 <= page_size <= MAX_LENGTH:
            _refuse("__init__", f"page_size is {page_size}, expected 1 or more tokens")
        self._num_pages = num_pages
        self._page_size = page_size
        self._free = list(range(num_pages - 1, RESERVED_PAGES - 1, -1))
        self._freed: list[int] = []
        self._sequences: dict[int, _Sequence] = {}
        self._unused_handles: list[int] = []
        self._copies: list[int] = []

    # ---- one sequence ---------------------------------------------------------------------------

    def create(self) -> int:
        handle = self._unused_handles.pop() if self._unused_handles else len(self._sequences)
        self._sequences[handle] = _Sequence([], 0)
        return handle

    def release(self, handle: int) -> None:
        self._cut(self._get("release", handle), 0)
        del self._sequences[handle]
        self._unused_handles.append(handle)

    def fork(self, handle: int, count: int) -> list[int]:
        parent = self._get("fork", handle)
        if count < 0:
            _refuse("fork", f"count is {count}, expected 0 or more")
        children = [self.create() for _ in range(count)]
        for child in children:
            self._sequences[child] = _Sequence(list(parent.pages), parent.length)
        return children

    def length(self, handle: int) -> int:
        return self._get("length", handle).length

    def pages(self, handle: int) -> list[int]:
        return list(self._get("pages", handle).pages)

    # ---- batches --------------------------------------------------------------------------------

    def pages_needed(self, handles: int, lengths: int, count: int) -> int:
        return self._count_needed(self._batch("pages_needed", handles, lengths, count, grow=True))

    def extend(self, handles: int, lengths: int, count: int) -> int:
        batch = self._batch("extend", handles, lengths, count, grow=True)
        self._copies = []
        missing = self._count_needed(batch) - len(self._free)
        if missing > 0:
            return missing
        for sequence, length in batch:
            if self._writes_into(sequence, length, self._holders()):
                at = sequence.length // self._page_size
                shared, own = sequence.pages[at], self._free.pop()
                self._copies += [shared, own]
                sequence.pages[at] = own
            while len(sequence.pages) < self._pages_for(length):
                sequence.pages.append(self._free.pop())
            sequence.length = length
        return -(len(self._copies) // 2)

    def copies(self, out: int) -> None:
        _write(ctypes.c_int32, out, self._copies)

    def truncate(self, handles: int, lengths: int, count: int) -> None:
        for sequence, length in self._batch("truncate", handles, lengths, count, grow=False):
            self._cut(sequence, length)

    def fill_table(self, handles: int, count: int, out: int, columns: int, row_stride: int) -> None:
        rows = [(h, self._get("fill_table", h).pages) for h in _read(handles, count)]
        for handle, pages in rows:
            if len(pages) > columns:
                _refuse(
                    "fill_table",
                    f"handle {handle} holds {len(pages)} pages, out has {columns} columns",
                )
        for row, (_, pages) in enumerate(rows):
            _write(ctypes.c_int32, out + 4 * row * row_stride, pages)

    def fill_slots(
        self, handles: int, starts: int, counts: int, count: int, out: int, capacity: int
    ) -> int:
        slots: list[int] = []
        firsts, numbers = _read(starts, count), _read(counts, count)
        for handle, first, number in zip(_read(handles, count), firsts, numbers, strict=True):
            sequence = self._get("fill_slots", handle)
            if first < 0 or number < 0 or first + number > sequence.length:
                _refuse(
                    "fill_slots",
                    f"{number} tokens from {first} of handle {handle}, which has {sequence.length}",
                )
            for token in range(first, first + number):
                page = sequence.pages[token // self._page_size]
                slots.append(page * self._page_size + token % self._page_size)
            if len(slots) > capacity:
                _refuse("fill_slots", f"out has only {capacity} elements")
        _write(ctypes.c_int64, out, slots)
        return len(slots)

    # ---- the pool -------------------------------------------------------------------------------

    def take_freed(self) -> list[int]:
        free = set(self._free)
        taken = [page for page in dict.fromkeys(self._freed) if page in free]
        self._freed = []
        return taken

    def free_pages(self) -> int:
        return len(self._free)

    def used_pages(self) -> int:
        return self._num_pages - RESERVED_PAGES - len(self._free)

    def live_handles(self) -> int:
        return len(self._sequences)

    def check(self) -> str:
        held = set(self._holders())
        free = set(self._free)
        if len(free) != len(self._free):
            return "a page is free twice"
        if held & free:
            return f"page {min(held & free)} is free and held"
        if held | free != set(range(RESERVED_PAGES, self._num_pages)):
            return "a page is neither free nor held, or does not exist"
        for handle, sequence in self._sequences.items():
            if len(sequence.pages) != self._pages_for(sequence.length):
                return f"handle {handle} holds a number of pages that does not fit its length"
        return ""

    # ---- inside ---------------------------------------------------------------------------------

    def _get(self, op: str, handle: int) -> _Sequence:
        if handle not in self._sequences:
            _refuse(op, f"unknown handle {handle} (never created, or released)")
        return self._sequences[handle]

    def _pages_for(self, length: int) -> int:
        return -(-length // self._page_size)

    def _holders(self) -> dict[int, int]:
        held: dict[int, int] = {}
        for sequence in self._sequences.values():
            for page in sequence.pages:
                held[page] = held.get(page, 0) + 1
        return held

    def _writes_into(self, sequence: _Sequence, length: int, holders: dict[int, int]) -> bool:
        """Whether writing behind the length touches a page that others hold too."""
        if length == sequence.length or sequence.length % self._page_size == 0:
            return False
        return holders[sequence.pages[sequence.length // self._page_size]] > 1

    def _count_needed(self, batch: list[tuple[_Sequence, int]]) -> int:
        needed, holders = 0, self._holders()
        for sequence, length in batch:
            needed += max(0, self._pages_for(length) - len(sequence.pages))
            if self._writes_into(sequence, length, holders):
                holders[sequence.pages[sequence.length // self._page_size]] -= 1
                needed += 1
        return needed

    def _cut(self, sequence: _Sequence, length: int) -> None:
        while len(sequence.pages) > self._pages_for(length):
            page = sequence.pages.pop()
            if page not in self._holders():
                self._free.append(page)
                self._freed.append(page)
        sequence.length = length

    def _batch(
        self, op: str, handles: int, lengths: int, count: int, *, grow: bool
    ) -> list[tuple[_Sequence, int]]:
        batch, seen = [], set()
        for handle, length in zip(_read(handles, count), _read(lengths, count), strict=True):
            sequence = self._get(op, handle)
            if handle in seen:
                _refuse(op, f"handle {handle} is given twice")
            seen.add(handle)
            fits = length >= sequence.length if grow else length <= sequence.length
            if not (0 <= length <= MAX_LENGTH and fits):
                expected = (
                    "no less and at most 2^40 (truncate shrinks)"
                    if grow
                    else "0 up to that (extend grows)"
                )
                _refuse(
                    op,
                    f"length {length} for handle {handle} of length {sequence.length}, "
                    f"expected {expected}",
                )
            batch.append((sequence, length))
        return batch
