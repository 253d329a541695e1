"""Whole copies of a model on all ranks: what the first one loaded, bit for bit."""

import torch
from torch import nn

from rlhf_fast.distributed.world import World
from rlhf_fast.stages.placing import same_weights
from tests.distributed.ranks import on_ranks

TYPES = (
    *(torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.complex64),
    *(torch.bool, torch.uint8, torch.int16, torch.uint32, torch.int64),
)


def _copies(world: World) -> list[bool]:
    def module(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        made = nn.Linear(3, 2)
        made.weight = nn.Parameter(torch.randn(3, 2).t())  # not contiguous
        for index, dtype in enumerate(TYPES):
            made.register_buffer(f"of_{index}", torch.randint(0, 2, (3, 2)).to(dtype).t())
        made.register_buffer("none", torch.zeros(0))
        made.register_buffer("one", torch.tensor(seed))
        return made

    ours, first = module(world.rank), module(0)
    same_weights(world, ours)
    pairs = zip(ours.state_dict().values(), first.state_dict().values(), strict=True)
    return [torch.equal(a.contiguous().cdouble(), b.contiguous().cdouble()) for a, b in pairs]


def test_every_type_of_weight_and_buffer_travels() -> None:
    for found in on_ranks(2, _copies, replicas=2):
        assert all(found)
        assert len(found) == len(TYPES) + 4
