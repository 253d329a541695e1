"""Triton kernels of `decode_state`: a lane a row."""

import triton
import triton.language as tl

from rlhf_fast_kernels.decode_fields import (
    BROKEN,
    CONTEXT,
    LIMIT,
    LIVE,
    SAMPLE,
    STEP,
    TOKEN,
)
from rlhf_fast_kernels.triton_support import AotCase

BLOCK = 32

_SAMPLE = tl.constexpr(SAMPLE)
_TOKEN = tl.constexpr(TOKEN)
_CONTEXT = tl.constexpr(CONTEXT)
_STEP = tl.constexpr(STEP)
_LIMIT = tl.constexpr(LIMIT)
_LIVE = tl.constexpr(LIVE)
_BROKEN = tl.constexpr(BROKEN)


@triton.jit
def place_tokens_kernel(
    state,
    field_stride,
    rows,
    page_table,
    table_stride,
    page_size,
    ids,
    positions,
    slots,
    contexts,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = row < rows
    live = tl.load(state + _LIVE * field_stride + row, mask=inside, other=0)
    context = tl.load(state + _CONTEXT * field_stride + row, mask=inside, other=1) + live
    tl.store(state + _CONTEXT * field_stride + row, context, mask=inside)
    position = context - 1
    page = tl.load(page_table + row * table_stride + position // page_size, mask=inside, other=0)
    slot = page.to(tl.int64) * page_size + position % page_size
    token = tl.load(state + _TOKEN * field_stride + row, mask=inside, other=0)
    tl.store(positions + row, position, mask=inside)
    tl.store(slots + row, tl.where(live > 0, slot, -1), mask=inside)
    tl.store(contexts + row, context.to(tl.int32), mask=inside)
    tl.store(ids + row, tl.maximum(token, 0), mask=inside)


@triton.jit
def record_tokens_kernel(
    state,
    field_stride,
    rows,
    stops,
    stop_width,
    tokens,
    logprobs,
    raw_logprobs,
    columns,
    out_tokens,
    out_logprobs,
    out_raw_logprobs,
    out_lengths,
    out_ended,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = row < rows
    token = tl.load(tokens + row, mask=inside, other=0)
    tl.store(state + _TOKEN * field_stride + row, token, mask=inside)
    live = inside & (tl.load(state + _LIVE * field_stride + row, mask=inside, other=0) > 0)
    sample = tl.load(state + _SAMPLE * field_stride + row, mask=live, other=0)
    step = tl.load(state + _STEP * field_stride + row, mask=live, other=0)
    limit = tl.load(state + _LIMIT * field_stride + row, mask=live, other=0)
    at = sample * columns + step
    tl.store(out_tokens + at, token, mask=live)
    tl.store(out_logprobs + at, tl.load(logprobs + row, mask=live, other=0.0), mask=live)
    tl.store(out_raw_logprobs + at, tl.load(raw_logprobs + row, mask=live, other=0.0), mask=live)
    step += 1
    tl.store(state + _STEP * field_stride + row, step, mask=live)
    tl.store(out_lengths + sample, step, mask=live)
    hits = tl.zeros([BLOCK], dtype=tl.int32)
    for i in range(stop_width):
        stop = tl.load(stops + row * stop_width + i, mask=inside, other=-2)
        hits += (stop == token).to(tl.int32)
    usable = token >= 0
    ended = (hits > 0) & usable
    tl.store(out_ended + sample, tl.full([BLOCK], 1, tl.uint8), mask=live & ended)
    tl.store(
        state + _BROKEN * field_stride + row, tl.full([BLOCK], 1, tl.int64), mask=live & ~usable
    )
    on = (~ended & usable & (step < limit)).to(tl.int64)
    tl.store(state + _LIVE * field_stride + row, on, mask=live)


_STATE = {"state": "*i64", "field_stride": "i64", "rows": "i32"}

AOT_CASES = (
    AotCase(
        place_tokens_kernel,
        _STATE
        | {"page_table": "*i32", "table_stride": "i64", "page_size": "i32", "ids": "*i64"}
        | {"positions": "*i64", "slots": "*i64", "contexts": "*i32"},
        {"BLOCK": BLOCK},
        num_warps=1,
    ),
    AotCase(
        record_tokens_kernel,
        _STATE
        | {"stops": "*i64", "stop_width": "i32", "tokens": "*i64"}
        | {"logprobs": "*fp32", "raw_logprobs": "*fp32", "columns": "i32", "out_tokens": "*i64"}
        | {"out_logprobs": "*fp32", "out_raw_logprobs": "*fp32", "out_lengths": "*i64"}
        | {"out_ended": "*u8"},
        {"BLOCK": BLOCK},
        num_warps=1,
    ),
)
