"""Holding out preference rows so that no prompt is on both sides."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

from rlhf_fast.data import PreferenceExample
from rlhf_fast.errors import DataError


class Split(NamedTuple):
    """Training and held-out examples without a common prompt."""

    train: list[PreferenceExample]
    held_out: list[PreferenceExample]


def split_by_prompt(examples: Sequence[PreferenceExample], fraction: float, seed: int) -> Split:
    """Hold out whole prompts until they make up `fraction` of the rows.

    Prompts go in the order of a hash of (seed, prompt), so that the split does not depend on the
    order of the rows.

    Raises:
        DataError: RF2070 if there is only one prompt.
    """
    rows: dict[bytes, int] = {}
    keys = [_prompt_key(example, seed) for example in examples]
    for key in keys:
        rows[key] = rows.get(key, 0) + 1
    if fraction == 0:
        return Split(list(examples), [])
    if len(rows) < 2:
        raise DataError(
            "RF2070",
            f"all {len(examples)} rows have the same prompt: none can be held out",
            where="data.train",
            expected="at least two prompts, so that held-out accuracy is about new ones",
            remedy="set data.eval to held-out rows, or eval_fraction=0 to do without",
        )
    chosen: set[bytes] = set()
    taken = 0
    for key in sorted(rows)[:-1]:
        if taken >= fraction * len(examples):
            break
        chosen.add(key)
        taken += rows[key]
    return Split(
        [e for e, key in zip(examples, keys, strict=True) if key not in chosen],
        [e for e, key in zip(examples, keys, strict=True) if key in chosen],
    )


def _prompt_key(example: PreferenceExample, seed: int) -> bytes:
    text = f"{seed}:{','.join(map(str, example.prompt_ids.tolist()))}"
    return hashlib.sha256(text.encode()).digest()
