"""8-bit moments that one process has saved, as those of shards are: in fp32, without blocks."""

from __future__ import annotations

from collections.abc import Container, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rlhf_fast.adamw8bit import BLOCK, SCALES, widened
from rlhf_fast.distributed.stored import Chunk, Stored, StoredTensors
from rlhf_fast.errors import CheckpointError


def without_blocks(
    tensors: StoredTensors, state: Mapping[str, Any], names: Container[str]
) -> tuple[StoredTensors, dict[str, Any]]:
    """What `optimizer_state` returned, the moments of some parameters widened as they are read.

    Args:
        tensors: as saved; a matrix at a time is read whole and decoded.
        state: as saved.
        names: parameters whose moments are wanted in fp32; those that are so already stay.

    Raises:
        CheckpointError: codes without the scales of all their blocks (RF8005).
    """
    entries, parameters = dict(tensors.entries), dict(state["parameters"])
    for name, entry in parameters.items():
        if name not in names or "scale_m" not in entry["tensors"]:
            continue
        for moment, (scales, _) in SCALES.items():
            codes = entries.get(f"{name}/{moment}")
            blocks = entries.pop(f"{name}/{scales}", None)
            if codes is None or blocks is None or not _fit(codes, blocks):
                raise CheckpointError(
                    "RF8005",
                    f"{name}/{moment} lacks the scales of its blocks",
                    where="optimizer state",
                    expected="one scale for 256 codes",
                    remedy="resume from another checkpoint of the run",
                )
            read = partial(_read, moment, scales, codes, blocks)
            whole = Chunk((0,) * len(codes.shape), codes.shape, read)
            entries[f"{name}/{moment}"] = Stored(torch.float32, codes.shape, (whole,))
        left = [key for key in entry["tensors"] if key not in ("scale_m", "scale_v")]
        parameters[name] = {**entry, "tensors": left}
    return StoredTensors(entries), {**state, "parameters": parameters}


def _fit(codes: Stored, blocks: Stored) -> bool:
    count = -(-torch.Size(codes.shape).numel() // BLOCK)
    return codes.dtype == torch.uint8 and blocks.shape == (count,)


def _read(moment: str, scales: str, codes: Stored, blocks: Stored) -> Tensor:
    found: Tensor = widened({moment: codes.read(), scales: blocks.read()})[moment]
    return found
