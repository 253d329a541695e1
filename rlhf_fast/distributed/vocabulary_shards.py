"""Token embedding and head cut by rows over the shard axis: a rank holds a run of the vocabulary.

Both are DTensor parameters `Shard(0)` on the shard axis that FSDP does not manage. Looking tokens
up moves ids and hidden rows, never the [V, H] weight: every rank looks up its own rows for the
tokens of all, and each gets back the sum, in which all but one term are exact zeros. Gradients of
a shard are complete over the shard axis by construction, from whichever of the two readings.

What reads the weight in another way (an embedding that computes more than a look-up, a head that is
called as a module) reads all rows, gathered for the moment; their gradients go back as a
reduce-scatter.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from rlhf_fast.distributed.collectives import all_gather_rows, reduce_scatter_rows

# Hidden rows of all ranks that exist at once in a look-up.
PIECE_BYTES = 256 << 20


@dataclass(frozen=True)
class VocabularyRows:
    """The run of rows of a [V, H] weight that this rank holds.

    Args:
        group: the ranks that hold the weight between them.
        ranks, rank: how many they are, and which this one is.
        total: V.
        run: rows of every rank but the last ones, ceil(V / ranks).
        start, stop: this rank's rows; start == stop if none is left for it.
    """

    group: dist.ProcessGroup
    ranks: int
    rank: int
    total: int
    run: int
    start: int
    stop: int

    @classmethod
    def on(cls, mesh: DeviceMesh, total: int) -> VocabularyRows:
        """The rows of this rank if `total` are cut over a mesh of one axis."""
        ranks, rank = mesh.size(), mesh.get_local_rank()
        run = -(-total // ranks)
        start, stop = min(rank * run, total), min((rank + 1) * run, total)
        return cls(mesh.get_group(), ranks, rank, total, run, start, stop)


def rows_of(weight: Tensor) -> VocabularyRows | None:
    """The rows of a weight that `shard_rows` made; None of any other tensor."""
    if not isinstance(weight, DTensor) or weight.device_mesh.ndim != 1:
        return None
    return VocabularyRows.on(weight.device_mesh, weight.shape[0])


def as_rows(local: Tensor, mesh: DeviceMesh, shape: torch.Size) -> DTensor:
    """The [V, H] DTensor of which `local` is this rank's rows; no copy, no communication."""
    return DTensor.from_local(
        local, mesh, [Shard(0)], run_check=False, shape=shape, stride=(shape[1], 1)
    )


def full_rows(weight: Tensor) -> Tensor:
    """[V, H]: all rows of a sharded weight, by one all-gather; gradients are reduce-scattered.

    Every rank of the shard axis has to call it. A weight that is not sharded is returned as it is.
    """
    rows = rows_of(weight)
    if rows is None:
        return weight
    assert isinstance(weight, DTensor)
    full: Tensor = _GatherRows.apply(weight.to_local(), rows)
    return full


def parallel_lookup(weight: DTensor, ids: Tensor, padding: int | None = None) -> Tensor:
    """Rows of a sharded embedding by vocabulary-parallel look-up.

    Every rank of the shard axis has to call it, with as many ids as it likes.

    Args:
        weight: [V, H] in rows.
        ids: int64 of any shape, in [0, V).
        padding: an id whose row gets no gradient.

    Returns:
        [*ids.shape, H] in the type of the weight; gradients reach the shards of all ranks.

    Raises:
        RuntimeError: an id outside [0, V).
    """
    rows = rows_of(weight)
    assert rows is not None
    torch._assert_async(((ids >= 0) & (ids < rows.total)).all())
    found: Tensor = _Lookup.apply(weight.to_local(), ids.reshape(-1), rows, padding)
    return found.view(*ids.shape, weight.shape[1])


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local: Tensor, rows: VocabularyRows) -> Tensor:
        ctx.rows = rows
        out = local.new_empty(rows.ranks * rows.run, local.shape[1])
        all_gather_rows(out, _padded(local, rows.run), rows.group)
        return out[: rows.total]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        rows: VocabularyRows = ctx.rows
        own = grad.new_empty(rows.run, grad.shape[1])
        reduce_scatter_rows(own, _padded(grad, rows.ranks * rows.run).contiguous(), rows.group)
        return own[: rows.stop - rows.start], None


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, local: Tensor, ids: Tensor, rows: VocabularyRows, padding: int | None
    ) -> Tensor:
        every = _ids_of_all(ids, rows)
        longest, width = every.shape[1], local.shape[1]
        out = local.new_empty(longest, width)
        for a, b in _pieces(longest, rows.ranks * width * local.itemsize):
            wanted = every[:, a:b].reshape(-1)
            inside = (wanted >= rows.start) & (wanted < rows.stop)
            if len(local):
                part = local.index_select(0, torch.where(inside, wanted - rows.start, 0))
                part.masked_fill_(~inside[:, None], 0)
            else:
                part = local.new_zeros(len(wanted), width)
            reduce_scatter_rows(out[a:b], part, rows.group)
        ctx.rows, ctx.padding, ctx.count = rows, padding, len(ids)
        ctx.save_for_backward(every)
        return out[: len(ids)]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        rows: VocabularyRows = ctx.rows
        (every,) = ctx.saved_tensors
        held, (longest, width) = rows.stop - rows.start, (every.shape[1], grad.shape[1])
        grad = _padded(grad, longest).contiguous()
        total = grad.new_zeros(held, width)
        for a, b in _pieces(longest, rows.ranks * width * grad.itemsize):
            parts = grad.new_empty(rows.ranks * (b - a), width)
            all_gather_rows(parts, grad[a:b], rows.group)
            wanted = every[:, a:b].reshape(-1)
            inside = (wanted >= rows.start) & (wanted < rows.stop)
            if ctx.padding is not None:
                inside &= wanted != ctx.padding
            # Tokens of other ranks fall into a row of their own, which is left out.
            index = torch.where(inside, wanted - rows.start, held)
            total += torch.ops.aten.embedding_dense_backward(parts, index, held + 1, held, False)[
                :held
            ]
        return total, None, None, None


def _ids_of_all(ids: Tensor, rows: VocabularyRows) -> Tensor:
    """[ranks, longest] int64: the ids of every rank, with id 0 in the padding."""
    count = torch.tensor([len(ids)], device=ids.device)
    counts = count.new_empty(rows.ranks)
    all_gather_rows(counts, count, rows.group)
    longest = int(counts.max())
    every = ids.new_empty(rows.ranks * longest)
    all_gather_rows(every, _padded(ids, longest).contiguous(), rows.group)
    return every.view(rows.ranks, longest)


def _padded(tensor: Tensor, rows: int) -> Tensor:
    missing = rows - len(tensor)
    return F.pad(tensor, (0, 0) * (tensor.dim() - 1) + (0, missing)) if missing else tensor


def _pieces(rows: int, row_bytes: int) -> list[tuple[int, int]]:
    size = max(1, PIECE_BYTES // row_bytes)
    return [(a, min(a + size, rows)) for a in range(0, rows, size)]


class ParallelLookup:
    """The forward of an `nn.Embedding` whose weight is in rows."""

    def __init__(self, module: nn.Embedding) -> None:
        self._module = module

    def __call__(self, ids: Tensor) -> Tensor:
        """As `nn.Embedding.forward`."""
        weight: Any = self._module.weight
        return parallel_lookup(weight, ids, self._module.padding_idx)


class FullRead:
    """The forward of a module whose weight is in rows: its own, on all rows gathered."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the module's own forward."""
        parameters: dict[str, Any] = self._module._parameters
        held = parameters["weight"]
        parameters["weight"] = full_rows(held)
        try:
            return type(self._module).forward(self._module, *args, **kwargs)
        finally:
            parameters["weight"] = held


def why_not_parallel(embedding: nn.Module) -> str | None:
    """None if an embedding is looked up vocabulary-parallel, otherwise why it is gathered."""
    if type(embedding).forward is not nn.Embedding.forward:
        return f"the token embedding is a {type(embedding).__name__}"
    if getattr(embedding, "max_norm", None) is not None:
        return "the token embedding renormalises its rows"
    if getattr(embedding, "scale_grad_by_freq", False):
        return "the token embedding scales gradients by how often a token occurs"
    return None


def read_by_rows(module: Any, *, lookup: bool) -> None:
    """Give a module whose weight is in rows the forward that reads it so."""
    module.forward = ParallelLookup(module) if lookup else FullRead(module)


def is_read_by_rows(module: nn.Module) -> bool:
    """Whether the only thing replaced in a module is that it reads a weight in rows."""
    return isinstance(vars(module).get("forward"), ParallelLookup | FullRead)
