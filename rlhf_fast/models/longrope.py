"""Rotary tables of LongRoPE that follow each sequence and not the longest of the batch.

LongRoPE (Ding et al. 2024; Phi-3) turns positions with one of two sets of frequencies: those for
long sequences if a sequence is longer than the model was trained for, else the short ones.
transformers asks the longest sequence of a batch and turns all of them alike, so that the hidden
states of a short sequence would depend on its company. Here every sequence gets the tables that it
gets alone, in one forward.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def tables_by_sequence(module: nn.Module, lengths: Tensor, *, packed: bool) -> Iterator[None]:
    """Give each sequence its own tables until the block is left; other models stay as they are.

    Args:
        module: a Hugging Face model.
        lengths: [K] tokens of each sequence, on the host.
        packed: the forward reads one row of all sequences, one after the other; else K rows, padded
            on the right.
    """
    changed: list[Any] = []
    try:
        for part in module.modules():
            limit = _short_up_to(part)
            if limit is None or "forward" in vars(part):
                continue
            long = lengths > limit
            if bool(long.any()) and not bool(long.all()):
                # One flag for each row of the tables: [1, N, 1] or [K, 1, 1].
                flags = long.repeat_interleave(lengths)[None, :, None]
                rows = flags if packed else long[:, None, None]
                vars(part)["forward"] = functools.partial(_tables, part, limit, rows)
                changed.append(part)
        yield
    finally:
        for part in changed:
            vars(part).pop("forward", None)


def _short_up_to(part: Any) -> int | None:
    """Tokens of the longest sequence with the short frequencies; None if it is no LongRoPE."""
    if getattr(part, "rope_type", None) != "longrope":
        return None
    limit: int = part.config.rope_parameters["original_max_position_embeddings"]
    return limit


def _tables(
    part: Any, limit: int, long: Tensor, x: Tensor, position_ids: Tensor, **kwargs: Any
) -> tuple[Tensor, Tensor]:
    """cos and sin of both sets of frequencies, chosen row by row."""
    forward = type(part).forward
    # Positions of short sequences are below the limit; the others' are not read here.
    short = forward(part, x, position_ids.clamp(max=limit - 1), **kwargs)
    stretched = forward(part, x, position_ids, **kwargs)
    long = long.to(x.device)
    cos, sin = (torch.where(long, b, a) for a, b in zip(short, stretched, strict=True))
    return cos, sin
