"""Rows of the vocabulary: looked up and gathered as one embedding is, with its gradient."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor

from rlhf_fast.distributed import vocabulary_shards
from rlhf_fast.distributed.vocabulary_shards import (
    as_rows,
    full_rows,
    parallel_lookup,
    rows_of,
    why_not_parallel,
)
from rlhf_fast.distributed.world import World
from tests.distributed.ranks import on_ranks

# Five rows over four ranks: 2, 2, 1 and none.
_TOTAL, _WIDTH, _PADDING = 5, 3, 1


def _weights(world: World, dtype: torch.dtype) -> tuple[nn.Parameter, torch.Tensor]:
    full = torch.randn(_TOTAL, _WIDTH, generator=torch.Generator().manual_seed(0)).to(dtype)
    size = -(-_TOTAL // world.shards)
    parts = [*full.split(size), *[full[:0]] * world.shards][: world.shards]
    local = parts[world.shard_rank].clone()
    weight = as_rows(local, world.shard_mesh, full.shape)
    return nn.Parameter(weight), full.requires_grad_()


def _ids(rank: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(rank)
    return torch.randint(0, _TOTAL, (2, 3 * rank), generator=draw)


def _looked_up(world: World, dtype: torch.dtype, padding: int | None) -> None:
    weight, full = _weights(world, dtype)
    found = parallel_lookup(weight, _ids(world.rank), padding)
    assert found.dtype == dtype
    assert torch.equal(found, F.embedding(_ids(world.rank), full, padding))
    found.float().square().sum().backward()
    for rank in range(world.size):
        F.embedding(_ids(rank), full, padding).float().square().sum().backward()
    assert isinstance(weight.grad, DTensor)
    whole = weight.grad.full_tensor()
    assert full.grad is not None
    torch.testing.assert_close(
        whole, full.grad, rtol=1e-2 if dtype == torch.bfloat16 else 1e-6, atol=0
    )


def _gathered(world: World) -> None:
    weight, full = _weights(world, torch.float32)
    read = full_rows(weight)
    assert torch.equal(read, full)
    (read * (world.rank + 1)).square().sum().backward()
    assert isinstance(weight.grad, DTensor)
    expected = 2 * full.detach() * sum((rank + 1) ** 2 for rank in range(world.size))
    torch.testing.assert_close(weight.grad.full_tensor(), expected)


def _everything(world: World) -> tuple[int, int]:
    weight, _ = _weights(world, torch.float32)
    rows = rows_of(weight)
    assert rows is not None
    assert rows.stop - rows.start == len(weight.to_local())  # type: ignore[operator]
    _gathered(world)
    for pieces in (1 << 20, 1):
        vocabulary_shards.PIECE_BYTES = pieces
        for dtype in (torch.float32, torch.bfloat16):
            _looked_up(world, dtype, None)
        _looked_up(world, torch.float32, _PADDING)
    with pytest.raises(RuntimeError):
        parallel_lookup(weight, torch.tensor([_TOTAL]))
    return rows.start, rows.stop


def test_rows_over_four_ranks() -> None:
    assert on_ranks(4, _everything) == [(0, 2), (2, 4), (4, 5), (5, 5)]


def test_what_is_no_plain_look_up_is_gathered() -> None:
    assert why_not_parallel(nn.Embedding(3, 2, padding_idx=0)) is None
    assert "renormalises" in str(why_not_parallel(nn.Embedding(3, 2, max_norm=1.0)))
    assert "often" in str(why_not_parallel(nn.Embedding(3, 2, scale_grad_by_freq=True)))

    class Scaled(nn.Embedding):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(input)

    assert "Scaled" in str(why_not_parallel(Scaled(3, 2)))
    assert rows_of(torch.zeros(3, 2)) is None
    plain = torch.zeros(3, 2)
    assert full_rows(plain) is plain
