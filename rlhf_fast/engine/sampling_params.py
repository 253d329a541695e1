"""What sampling parameters are legal; the draws themselves are `rlhf_fast_kernels.sample`."""

from __future__ import annotations

import math

from rlhf_fast.errors import GenerationError
from rlhf_fast.types import SamplingParams


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
        f"{name}={value}: finite and in [0, {'inf)' if high == math.inf else '1]'}"
        for name, (value, high) in numbers.items()
        if not (math.isfinite(value) and 0.0 <= value <= high)
    ]
    if sampling.max_new_tokens < 1:
        faults.append(f"max_new_tokens={sampling.max_new_tokens}: at least 1")
    if sampling.top_k < 0:
        faults.append(f"top_k={sampling.top_k}: 0 (off) or more")
    limit = math.inf if vocab_size is None else vocab_size
    strangers = [i for i in sampling.stop_token_ids if not 0 <= i < limit]
    if strangers:
        faults.append(f"stop_token_ids={strangers}: ids in [0, {limit})")
    if any(not text for text in sampling.stop_strings):
        faults.append("stop_strings: an empty string would stop every response")
    if faults:
        raise GenerationError(
            "RF4001",
            f"{len(faults)} invalid sampling parameter{'s' if len(faults) > 1 else ''}",
            where="SamplingParams",
            expected="; ".join(faults),
            remedy="correct the values named above",
        )
