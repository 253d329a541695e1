"""What ranks exchange of their gradients: the sums, in what pieces, and how many bytes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from bench.distributed.traffic import Traffic
from rlhf_fast.distributed import gradients
from rlhf_fast.distributed.gradients import RankGradients
from rlhf_fast.distributed.sharding import shard_module
from rlhf_fast.distributed.world import World
from rlhf_fast.optim import GuardedOptimizer
from tests.distributed.ranks import on_ranks
from tests.distributed.sharded_training import OPTIM, policy_loss
from tests.models.tiny import build

MICROBATCHES = 3
# Elements, dtype, and the ranks that have a gradient.
WHOLE = (
    (6, torch.float32, {0, 1, 2}),
    (1, torch.float32, {1}),
    (4, torch.bfloat16, {0, 2}),
    (3, torch.float32, set()),
    (11, torch.float32, {0, 1, 2}),
    (2, torch.float32, {2}),
    (5, torch.bfloat16, {0, 1}),
)


def _summed(world: World, bucket: int) -> tuple[list[list[float] | None], int]:
    gradients.BUCKET = bucket
    parameters = []
    for index, (size, dtype, ranks) in enumerate(WHOLE):
        parameter = nn.Parameter(torch.zeros(size, dtype=dtype))
        if world.rank in ranks:
            parameter.grad = torch.arange(size).to(dtype) + 10 * world.rank + index
        parameters.append(parameter)
    traffic = Traffic()
    with traffic.counting():
        RankGradients(world).gather(parameters, parameters)
    assert all(p.grad is None or p.grad.dtype == p.dtype for p in parameters)
    return [None if p.grad is None else p.grad.tolist() for p in parameters], sum(
        traffic.take()[1].values()
    )


@pytest.mark.parametrize(
    ("bucket", "reductions"), [(gradients.BUCKET, 2), (10, 4), (7, 6), (1, len(WHOLE))]
)
def test_gradients_of_whole_parameters_are_summed_in_buckets(bucket: int, reductions: int) -> None:
    expected = [
        [float(len(ranks) * (i + index) + 10 * sum(ranks)) for i in range(size)] if ranks else None
        for index, (size, _, ranks) in enumerate(WHOLE)
    ]
    assert on_ranks(3, _summed, bucket) == [(expected, reductions)] * 3


def _exchanged(world: World) -> dict[str, Any]:
    """Bytes that this rank receives for a step of several microbatches, and what it holds."""
    module = build(num_key_value_heads=4)
    shard_module(module, world, dtype="float32")
    optimizer = GuardedOptimizer(module, OPTIM, 10, ranks=RankGradients.of(world))
    parameters = list(module.parameters())
    cut = [p.to_local().numel() for p in parameters if isinstance(p, DTensor)]
    whole = [p.numel() for p in parameters if not isinstance(p, DTensor)]
    traffic = Traffic()
    with traffic.counting():
        traffic.phase = "microbatches"
        for _ in range(MICROBATCHES):
            # The tokens of a shard are those of that shard in every replica.
            policy_loss(module, world.shard_rank).backward()
        traffic.phase = "step"
        assert optimizer.step().applied
    return {**traffic.take()[0], "cut": sum(cut), "whole": sum(whole) + len(whole)}


def test_replicas_are_summed_once_in_an_optimizer_step() -> None:
    """As the table of docs/distributed.md says: 2 (r - 1) / r * 4 P / n, and 2 (k - 1) / k * 4."""
    alone, copies = on_ranks(2, _exchanged), on_ranks(4, _exchanged, replicas=2)
    for found in alone:
        # Vectors, and the norm in fp64.
        assert found["step"] == 4 * found["whole"] + 8
    for rank, found in enumerate(copies):
        assert found["microbatches"] == alone[rank % 2]["microbatches"] > 0
        assert found["cut"] == alone[rank % 2]["cut"] > 1000
        assert found["step"] == 4 * found["cut"] + 1.5 * (4 * found["whole"] + 8)
