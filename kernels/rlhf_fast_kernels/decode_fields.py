"""The tensors of a decoding step: the integer state of the rows, what goes in, what comes out."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

# Rows of the state [FIELDS, capacity] int64; csrc/cpu/decode_state.h has the same.
SAMPLE, TOKEN, CONTEXT, STEP, LIMIT, SEED, TOP_K, LIVE, BROKEN = range(9)
FIELDS = 9
NO_STOP = -2  # pads stop ids; no token has it, and an unusable row's is -1


class Places(NamedTuple):
    """Where a step's tokens go, [n] each.

    Attributes:
        ids: int64, what the forward embeds.
        positions: int64, of that token in its sequence.
        slots: int64, where its keys and values go; -1: nowhere, the row has ended.
        contexts: int32, tokens that it sees, itself included.
    """

    ids: Tensor
    positions: Tensor
    slots: Tensor
    contexts: Tensor


class Drawn(NamedTuple):
    """What the sampler drew, [n] each: int64, float32, float32."""

    tokens: Tensor
    logprobs: Tensor
    raw_logprobs: Tensor


class Record(NamedTuple):
    """The completions of S samples of at most R tokens.

    Attributes:
        tokens: [S, R] int64.
        logprobs, raw_logprobs: [S, R] float32.
        lengths: [S] int64.
        ended: [S] bool.
    """

    tokens: Tensor
    logprobs: Tensor
    raw_logprobs: Tensor
    lengths: Tensor
    ended: Tensor
