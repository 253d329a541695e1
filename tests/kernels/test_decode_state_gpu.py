"""place_tokens and record_tokens in Triton on a device: the specification's words, no host wait."""

from __future__ import annotations

import pytest
import torch

from rlhf_fast_kernels.decode_fields import FIELDS, LIMIT, LIVE, SAMPLE, Drawn, Places, Record
from rlhf_fast_kernels.decode_state import place_tokens, record_tokens
from tests.kernels.test_decode_state import empty_places, record_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def run(rows: int, impl: str, device: str) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(rows)
    state = torch.zeros(FIELDS, rows, dtype=torch.int64)
    state[SAMPLE] = torch.randperm(rows, generator=generator)
    state[LIMIT], state[LIVE] = 6, 1
    table = torch.randint(1, 99, (rows, 8), generator=generator).to(torch.int32).to(device)
    state, stops = state.to(device), torch.full((rows, 2), 3).to(device)
    places = Places(*(t.to(device) for t in empty_places(rows)))
    record = Record(*(t.to(device) for t in record_of(rows, 6)))
    tokens = torch.randint(-1, 9, (6, rows), generator=generator).to(device)
    drawn = Drawn(tokens[0].clone(), *(torch.rand(2, rows, generator=generator).to(device)))
    for step in range(6):
        place_tokens(state, table, 4, places, impl=impl)
        drawn.tokens.copy_(tokens[step])
        record_tokens(state, stops, drawn, record, impl=impl)
    return [t.cpu() for t in (state, *places, *record)]


@pytest.mark.parametrize("rows", [1, 33, 512])
def test_against_the_specification(rows):
    for got, want in zip(run(rows, "triton", "cuda"), run(rows, "reference", "cpu"), strict=True):
        assert torch.equal(got, want)


def test_the_host_does_not_wait():
    run(5, "triton", "cuda")  # compiled
    state = torch.ones(FIELDS, 5, dtype=torch.int64, device="cuda")
    state[SAMPLE] = torch.arange(5, device="cuda")
    table = torch.ones(5, 8, dtype=torch.int32, device="cuda")
    places = Places(*(t.cuda() for t in empty_places(5)))
    torch.cuda.set_sync_debug_mode("error")
    try:
        place_tokens(state, table, 4, places)
    finally:
        torch.cuda.set_sync_debug_mode("default")
