"""Key-value memory in pages: storage of all layers, and who holds which page.

Layout: [layers, 2, pages, page size, heads, head dim] seen by every kernel as keys and values
[pages, page size, heads, head dim] of a layer. Page 0 belongs to nobody: rows that pad a batch to
its bucket write there. Which sequence holds which page is `PageAllocator`'s business.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf_fast_kernels import native
from rlhf_fast_kernels.kv_pages import PageAllocator


@dataclass(frozen=True)
class CacheShape:
    """What a token costs.

    Args:
        layers: attention layers.
        heads: key/value heads.
        head_dim: width of a head.
        dtype: of keys and values.
    """

    layers: int
    heads: int
    head_dim: int
    dtype: torch.dtype

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's keys and values in all layers."""
        return 2 * self.layers * self.heads * self.head_dim * self.dtype.itemsize


def default_page_size(device_type: str) -> int:
    """Tokens of a page.

    Kernels of flash-attn want pages of a multiple of 256 tokens. On a CPU pages of 16 were much
    slower than those of 64 where the cache lies in memory: page-table misses.
    """
    return 64 if device_type == "cpu" else 256


def pages_wanted(rows: int, longest: int, page_size: int) -> int:
    """Pages with which `rows` samples of `longest` tokens decode side by side.

    Each row in whole pages, and a prompt whose samples did not all get a row.
    """
    return (rows + 1) * -(-longest // page_size)


class PagedCache:
    """Pages of all layers.

    Args:
        shape: what a token costs.
        pages: pages that sequences can hold; page 0 comes on top of them.
        page_size: tokens of a page.
        device: where they live.
        poison: overwrite freed pages with NaN, so that a stale read shows.
    """

    def __init__(
        self,
        shape: CacheShape,
        pages: int,
        page_size: int,
        device: torch.device,
        *,
        poison: bool = False,
    ) -> None:
        self.shape = shape
        self.page_size = page_size
        self.pages = pages
        self._poison = poison
        # Head-major within a page: a head's keys of a page lie in one piece.
        size = (shape.layers, 2, pages + 1, shape.heads, page_size, shape.head_dim)
        self._storage = torch.empty(size, dtype=shape.dtype, device=device)
        native.advise_huge_pages(self._storage)
        if poison:
            self._storage.fill_(math.nan)
        # Rows that pad a batch read page 0 only through a context of 0 tokens, but what is written
        # there must stay finite for kernels that load before they mask.
        self._storage[:, :, 0] = 0
        self._views = [
            (layer[0].transpose(1, 2), layer[1].transpose(1, 2)) for layer in self._storage
        ]
        self.allocator = PageAllocator(pages + 1, page_size)

    @property
    def storage(self) -> Tensor:
        """Keys and values of all layers."""
        return self._storage

    @property
    def nbytes(self) -> int:
        """Bytes of all pages."""
        return self._storage.numel() * self._storage.itemsize

    @property
    def use(self) -> float:
        """Part of the pages that is held, 0 to 1."""
        return self.allocator.used_pages / self.pages

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """(keys, values) of a layer, [pages, page size, heads, head dim] each."""
        return self._views[index]

    def copy_pages(self, pairs: Tensor) -> None:
        """Copy whole pages [C, 2] (source, destination): shared ones are about to be written."""
        source, target = pairs.to(self._storage.device, torch.int64).unbind(1)
        self._storage[:, :, target] = self._storage[:, :, source]

    def sweep(self) -> None:
        """In debug mode, poison what was freed since the last call."""
        freed = self.allocator.take_freed()
        if self._poison and len(freed):
            index = torch.as_tensor(freed, dtype=torch.int64, device=self._storage.device)
            self._storage[:, :, index] = math.nan
