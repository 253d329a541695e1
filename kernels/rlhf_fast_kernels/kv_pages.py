"""Who holds which page of a paged KV cache.

A cache of `num_pages * page_size` slots holds token t of a sequence in slot
`pages[t // page_size] * page_size + t % page_size`. The allocator knows no contents: it hands out
page numbers, counts who holds them, and says what to copy.

    pages = PageAllocator(num_pages=4096, page_size=16)
    prompt = pages.create()
    pages.extend([prompt], [37])                  # 3 pages; then the prompt's keys are written
    samples = [prompt, *pages.fork(prompt, 7)]    # 8 sequences, 3 pages, nothing copied
    grown = pages.extend(samples, [38] * 8)       # each writes token 37: 7 copies of page 2
    if grown.missing:                             # nothing happened: preempt somebody, try again
        ...
    keys[grown.copies[:, 1]] = keys[grown.copies[:, 0]]     # before anything is written

Copy-on-write: writes begin at the length before `extend`. Where that lies inside a page that others
hold too, the sequence gets a page of its own; the last holder writes where it is. Pages are reused
last in, first out. Page 0 is never handed out: rows that pad a batch may write there.

C++ (`csrc/host/kv_pages.h`) where it is compiled, otherwise `reference/kv_pages.py`; both hand out
the same pages. One thread at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf_fast_kernels import native
from rlhf_fast_kernels.reference import kv_pages as reference

RESERVED_PAGE = 0

# One sequence, or int64 on the CPU, or anything that torch.as_tensor makes into that.
Integers = int | Sequence[int] | Tensor | Any


class Extension(NamedTuple):
    """What `PageAllocator.extend` did.

    Attributes:
        missing: pages that lacked; 0: done. Otherwise nothing has changed.
        copies: int32 `[C, 2]` on the CPU: (source page, destination page). Copy whole pages, all
            layers, before anything is written; no page is both source and destination.
    """

    missing: int
    copies: Tensor


_NO_COPIES = torch.empty(0, 2, dtype=torch.int32, device="cpu")
_NOTHING_TO_DO = Extension(0, _NO_COPIES)


class PageAllocator:
    """Refcounted pages of sequences, which are small integer handles.

    A batch (`handles`, `lengths`, `starts`, `counts`) is one int, a list, a NumPy array or a
    tensor; contiguous int64 tensors on the CPU are read where they lie and cost least. A released
    handle is handed out again by a later `create` or `fork`.

    Args:
        num_pages: pages of the cache, the reserved page 0 included; 2 or more.
        page_size: tokens a page.
        impl: "cpu" (C++) or "reference" (Python); None: C++ where it is compiled.

    Raises:
        ValueError: also by every method: an unknown or released handle, a handle twice in a batch,
            a length that is negative, shrinks in `extend` or grows in `truncate`. Nothing has
            changed then.
        RuntimeError: impl "cpu" and nothing compiled.
    """

    def __init__(self, num_pages: int, page_size: int, *, impl: str | None = None) -> None:
        if impl not in (None, "cpu", "reference"):
            raise ValueError(f"PageAllocator: no implementation {impl!r}; cpu or reference")
        lacking = native.missing("PageAllocator")
        if impl == "cpu" and lacking is not None:
            raise RuntimeError(f"PageAllocator: impl='cpu' cannot run: {lacking}")
        compiled = lacking is None and impl != "reference"
        self.impl = "cpu" if compiled else "reference"
        self.num_pages = num_pages
        self.page_size = page_size
        maker = native.core().PageAllocator if compiled else reference.PageAllocator
        self._core: Any = maker(num_pages, page_size)

    def __repr__(self) -> str:
        return (
            f"PageAllocator(num_pages={self.num_pages}, page_size={self.page_size}, "
            f"free_pages={self.free_pages}, live_handles={self.live_handles})"
        )

    # ---- one sequence ---------------------------------------------------------------------------

    def create(self) -> int:
        """A new sequence of length 0 without pages."""
        return self._core.create()

    def release(self, handle: int) -> None:
        """End a sequence; pages that nobody else holds become free."""
        self._core.release(handle)

    def fork(self, handle: int, count: int) -> list[int]:
        """`count` new sequences of the same length that share all pages of `handle`."""
        return self._core.fork(handle, count)

    def length(self, handle: int) -> int:
        """Tokens of a sequence."""
        return self._core.length(handle)

    def pages(self, handle: int) -> list[int]:
        """Pages of a sequence in the order of its tokens."""
        return self._core.pages(handle)

    # ---- batches --------------------------------------------------------------------------------

    def extend(self, handles: Integers, lengths: Integers) -> Extension:
        """Give each sequence room for `lengths` tokens in total, all of them or none.

        Each sequence then has that length: extend before the tokens are written, `truncate` when
        fewer came.
        """
        ids, sizes, count = _batch("extend", handles, lengths)
        missing = self._core.extend(ids.data_ptr(), sizes.data_ptr(), count)
        if missing == 0:
            return _NOTHING_TO_DO
        if missing > 0:
            return Extension(missing, _NO_COPIES)
        copies = torch.empty(-missing, 2, dtype=torch.int32, device="cpu")
        self._core.copies(copies.data_ptr())
        return Extension(0, copies)

    def pages_needed(self, handles: Integers, lengths: Integers) -> int:
        """Pages that `extend` would take, those for copies included."""
        ids, sizes, count = _batch("pages_needed", handles, lengths)
        return self._core.pages_needed(ids.data_ptr(), sizes.data_ptr(), count)

    def truncate(self, handles: Integers, lengths: Integers) -> None:
        """Shorten sequences to `lengths` tokens and drop the pages beyond."""
        ids, sizes, count = _batch("truncate", handles, lengths)
        self._core.truncate(ids.data_ptr(), sizes.data_ptr(), count)

    # ---- tables for the kernels -----------------------------------------------------------------

    def fill_table(self, handles: Integers, out: Tensor) -> None:
        """Write the pages of sequence i into the first elements of row i; the rest is left alone.

        Args:
            handles: S sequences; the same one may come twice.
            out: int32 on the CPU, S rows or more, of as many columns as the longest sequence has
                pages; elements of a row adjacent.
        """
        ids = _integers("fill_table", "handles", handles)
        if (
            out.dtype is not torch.int32
            or out.device.type != "cpu"
            or out.dim() != 2
            or out.shape[0] < ids.numel()
            or (out.shape[1] > 1 and out.stride(1) != 1)
        ):
            raise ValueError(
                f"PageAllocator.fill_table: out has shape {tuple(out.shape)}, strides "
                f"{out.stride()}, {out.dtype} on {out.device}; expected int32 on cpu with "
                f"{ids.numel()} rows or more, elements of a row adjacent"
            )
        self._core.fill_table(
            ids.data_ptr(), ids.numel(), out.data_ptr(), out.shape[1], out.stride(0)
        )

    def fill_slots(self, handles: Integers, starts: Integers, counts: Integers, out: Tensor) -> int:
        """Write the cache slots of tokens `starts .. starts + counts - 1` of each sequence.

        Args:
            handles, starts, counts: one number a sequence.
            out: contiguous int64 on the CPU, room for all counts; the sequences lie back to back.

        Returns:
            How many slots were written.
        """
        ids, firsts, count = _batch("fill_slots", handles, starts, "starts")
        numbers = _integers("fill_slots", "counts", counts)
        if numbers.numel() != count:
            raise ValueError(
                f"PageAllocator.fill_slots: {count} handles and {numbers.numel()} counts"
            )
        if out.dtype is not torch.int64 or out.device.type != "cpu" or not out.is_contiguous():
            raise ValueError(
                f"PageAllocator.fill_slots: out is {out.dtype} on {out.device} with strides "
                f"{out.stride()}, expected contiguous int64 on cpu"
            )
        return self._core.fill_slots(
            ids.data_ptr(),
            firsts.data_ptr(),
            numbers.data_ptr(),
            count,
            out.data_ptr(),
            out.numel(),
        )

    # ---- the pool -------------------------------------------------------------------------------

    @property
    def free_pages(self) -> int:
        """Pages that can be handed out."""
        return self._core.free_pages()

    @property
    def used_pages(self) -> int:
        """Pages that sequences hold; the reserved one does not count."""
        return self._core.used_pages()

    @property
    def live_handles(self) -> int:
        """Sequences created or forked and not released."""
        return self._core.live_handles()

    def take_freed(self) -> list[int]:
        """Pages freed since the last call that are free still, for a debug mode that poisons them.

        Call it before the next `extend`, or pages handed out again in between escape the poison.
        """
        return self._core.take_freed()

    def check(self) -> None:
        """Raise RuntimeError if an invariant is broken; O(pages), for tests and debugging.

        Refcounts equal holders, every page is either free once or held, page 0 is neither, and a
        sequence holds as many pages as its length needs.
        """
        broken = self._core.check()
        if broken:
            raise RuntimeError(f"PageAllocator.check: {broken}")


def _integers(op: str, name: str, numbers: Integers) -> Tensor:
    """As contiguous int64 on the CPU."""
    if type(numbers) is not Tensor:
        # A default device that somebody set is not where the allocator reads.
        device = numbers.device if isinstance(numbers, Tensor) else "cpu"
        numbers = torch.as_tensor(numbers, device=device)
        if numbers.numel() == 0:  # an empty list has no dtype of its own
            numbers = numbers.long()
    if numbers.dtype is torch.int64 and numbers.dim() < 2 and numbers.device.type == "cpu":
        return numbers.contiguous()
    raise ValueError(
        f"PageAllocator.{op}: {name} has shape {tuple(numbers.shape)}, {numbers.dtype} on "
        f"{numbers.device}, expected int64 [S] on cpu"
    )


def _batch(
    op: str, handles: Integers, lengths: Integers, name: str = "lengths"
) -> tuple[Tensor, Tensor, int]:
    ids = _integers(op, "handles", handles)
    sizes = _integers(op, name, lengths)
    count = ids.numel()
    if sizes.numel() != count:
        raise ValueError(f"PageAllocator.{op}: {count} handles and {sizes.numel()} {name}")
    return ids, sizes, count
