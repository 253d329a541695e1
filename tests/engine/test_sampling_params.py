"""Which sampling parameters are legal."""

from __future__ import annotations

import math
from typing import Any

import pytest

from rlhf_fast.engine.sampling_params import validate_sampling
from rlhf_fast.errors import GenerationError
from rlhf_fast.types import SamplingParams


def test_validation_lists_every_violation() -> None:
    bad = SamplingParams(
        0, temperature=-1.0, top_k=-2, top_p=1.5, min_p=math.nan,
        stop_token_ids=(3, 99), stop_strings=("",),
    )  # fmt: skip
    with pytest.raises(GenerationError) as caught:
        validate_sampling(bad, vocab_size=50)
    assert caught.value.code == "RF4001"
    for word in (
        "max_new_tokens=0", "temperature=-1.0", "top_k=-2", "top_p=1.5", "min_p=nan",
        "[99]", "stop_strings",
    ):  # fmt: skip
        assert word in str(caught.value)
    validate_sampling(SamplingParams(1, temperature=0.0, top_p=0.0, top_k=10**9), 50)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_new_tokens", 4.0),
        ("temperature", "1"),
        ("top_k", 7.0),
        ("top_k", 2**63),
        ("top_p", None),
        ("stop_token_ids", [3]),
        ("stop_token_ids", (3.0,)),
        ("stop_strings", "END"),
        ("stop_strings", ["END"]),
        ("stop_strings", (b"END",)),
    ],
)
def test_values_of_another_type_are_refused(name: str, value: Any) -> None:
    """A float rounded the seeds beside it; a text alone stopped at each of its letters."""
    with pytest.raises(GenerationError, match=rf"RF4001[\s\S]*{name}="):
        validate_sampling(SamplingParams(**{"max_new_tokens": 4, name: value}), 50)
