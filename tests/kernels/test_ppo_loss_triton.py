"""What the tests of ppo_loss for every implementation leave open about its Triton kernels."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.kernels.ppo_cases import (
    FULL,
    LEAVES,
    TRITON,
    assert_same,
    bf16_digit,
    doubles,
    draw,
    run,
)

pytestmark = pytest.mark.skipif(not TRITON, reason="Triton's interpreter is not in use")


def test_more_tiles_than_the_second_launch_reads_at_once() -> None:
    tensors = draw((65 * 1024 + 5,))
    got = run(tensors, impl="triton", **FULL)
    assert_same(got, run(doubles(tensors), impl="reference", **FULL), 2e-6)
    again = run(tensors, impl="triton", **FULL)
    assert torch.equal(got[0].loss, again[0].loss)
    assert all(torch.equal(x, again[1][name]) for name, x in got[1].items())


def test_fp16_inputs() -> None:
    tensors = draw((900,), dtype=torch.float16)
    got = run(tensors, 10, impl="triton", **FULL)
    assert all(got[1][name].dtype == torch.float16 for name in LEAVES)
    assert_same(got, run(doubles(tensors), 10, impl="reference", **FULL), 2**-10)


def test_mixed_dtypes() -> None:
    tensors = draw((900,))
    tensors["values"] = tensors["values"].bfloat16()
    tensors["old_logprobs"] = tensors["old_logprobs"].half()
    got = run(tensors, impl="triton", **FULL)
    assert_same(got, run(doubles(tensors), impl="reference", **FULL), bf16_digit("triton"))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("number", [0, 7])
def test_normalizer_is_read_where_it_lies(number: int, dtype: torch.dtype) -> None:
    tensors = draw((300,))
    got = run(tensors, torch.tensor(number, dtype=dtype), impl="triton", **FULL)
    want: Any = run(doubles(tensors), number, impl="reference", **FULL)
    assert_same(got, want, 2e-6 * 300 / 7)
    assert number > 0 or float(got[0].loss) == 0.0
