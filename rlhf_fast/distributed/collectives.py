"""Gather and reduce-scatter of rows, by whichever name this PyTorch has for them.

PyTorch 2.13 renamed both and warns about the older names, which are the only ones before.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor

ALL_GATHER: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
REDUCE_SCATTER: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def all_gather_rows(out: Tensor, rows: Tensor, group: dist.ProcessGroup) -> None:
    """Fill `out` [ranks * n, ...] with the rows [n, ...] of all ranks of the group in order."""
    ALL_GATHER(out, rows, group=group)


def reduce_scatter_rows(out: Tensor, rows: Tensor, group: dist.ProcessGroup) -> None:
    """Fill `out` [n, ...] with this rank's run of the sum over ranks of `rows` [ranks * n, ...]."""
    REDUCE_SCATTER(out, rows, group=group)
