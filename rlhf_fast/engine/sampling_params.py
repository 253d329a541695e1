"""What sampling parameters are legal; the draws themselves are `rlhf_fast_kernels.sample`."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any

from rlhf_fast.errors import GenerationError
from rlhf_fast.types import SamplingParams


def is_int64(value: Any) -> bool:
    """Whether it is a whole number of the 64 bits in which seeds and settings are kept.

    A float among them would round the seeds of every row that starts beside it.
    """
    return isinstance(value, Integral) and -(2**63) <= int(value) < 2**63


def validate_sampling(sampling: SamplingParams, vocab_size: int | None = None) -> None:
    """Check the parameters; every violation is in the one message.

    `top_k` above the vocabulary is legal and keeps everything; `top_p` 0 keeps the best token.

    Raises:
        GenerationError: RF4001.
    """
    numbers = {
        "temperature": (sampling.temperature, math.inf),
        "top_p": (sampling.top_p, 1.0),
        "min_p": (sampling.min_p, 1.0),
    }
    faults = [
        f"{name}={value!r}: finite and in [0, {'inf)' if high == math.inf else '1]'}"
        for name, (value, high) in numbers.items()
        if not (isinstance(value, Real) and math.isfinite(value) and 0.0 <= value <= high)
    ]
    if not (is_int64(sampling.max_new_tokens) and sampling.max_new_tokens >= 1):
        faults.append(f"max_new_tokens={sampling.max_new_tokens!r}: an integer, at least 1")
    if not (is_int64(sampling.top_k) and sampling.top_k >= 0):
        faults.append(f"top_k={sampling.top_k!r}: an integer of 64 bits, 0 (off) or more")
    limit = math.inf if vocab_size is None else vocab_size
    ids, texts = sampling.stop_token_ids, sampling.stop_strings
    if not isinstance(ids, tuple):
        faults.append(f"stop_token_ids={ids!r}: a tuple of ids")
    elif strangers := [i for i in ids if not (is_int64(i) and 0 <= i < limit)]:
        faults.append(f"stop_token_ids={strangers}: ids in [0, {limit})")
    # One text alone would be read as a stop string for each of its letters.
    if not (isinstance(texts, tuple) and all(isinstance(text, str) for text in texts)):
        faults.append(f"stop_strings={texts!r}: a tuple of texts")
    elif not all(texts):
        faults.append("stop_strings: an empty string would stop every response")
    if faults:
        raise GenerationError(
            "RF4001",
            f"{len(faults)} invalid sampling parameter{'s' if len(faults) > 1 else ''}",
            where="SamplingParams",
            expected="; ".join(faults),
            remedy="correct the values named above",
        )
