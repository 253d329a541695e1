"""Triton kernels of `paged_attention`: one for decoding and prefilling, and the merge of splits.

A program of `_attend` serves ROWS rows of one sequence and one key-value head; a row is a (query,
query head) pair, so the heads of a group share the keys that they read and fill the tile of a
matrix product. Decoding has few rows, so the keys are split too: in pieces of SPLIT tokens at
absolute positions, whose sums `_merge` adds in order. Splits are a function of the row alone, and
so are its bits.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlhf_fast_kernels.triton_support import AotCase, interpreting, launch

SPLIT = 256
LOG2E = 1.4426950408889634


# ---- kernels ------------------------------------------------------------------------------------


@triton.jit
def _queries(cu_queries, s):
    """(first row of q, number of queries) of a sequence."""
    if cu_queries is None:
        begin = s
        count = 1
    else:
        begin = tl.load(cu_queries + s)
        count = tl.load(cu_queries + s + 1) - begin
    return begin.to(tl.int64), count


@triton.jit
def _capped(x, softcap):
    """softcap * tanh(x / softcap)."""
    return softcap * (2.0 / (1.0 + tl.exp2(x * (-2.0 * 1.4426950408889634) / softcap)) - 1.0)


@triton.jit(do_not_specialize=["window", "row_blocks", "splits"])
def _attend(
    q,
    q_token_stride,
    q_head_stride,
    keys,
    key_page_stride,
    key_token_stride,
    key_head_stride,
    values,
    value_page_stride,
    value_token_stride,
    value_head_stride,
    page_table,
    table_stride,
    context_lengths,
    cu_queries,
    out,
    out_token_stride,
    out_head_stride,
    sums,
    stats,
    scale,
    softcap,
    window,
    kv_heads,
    head_dim,
    row_blocks,
    splits,
    GROUP: tl.constexpr,
    PAGE: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    WIDTH: tl.constexpr,
    SPLIT: tl.constexpr,
    CAPPED: tl.constexpr,
    WINDOWED: tl.constexpr,
    UPCAST: tl.constexpr,
):
    program = tl.program_id(0)
    split = program % splits
    head = program // splits % kv_heads
    block = program // splits // kv_heads % row_blocks
    s = program // splits // kv_heads // row_blocks
    begin, queries = _queries(cu_queries, s)
    before = tl.load(context_lengths + s) - queries  # position of the first query
    row = block * ROWS + tl.arange(0, ROWS)
    there = row < queries * GROUP
    query = row // GROUP
    query_head = (head * GROUP + row % GROUP).to(tl.int64)  # times a stride: beyond 2^31
    high = tl.where(there, before + query + 1, 0)  # the row sees keys below it
    low = tl.zeros_like(high)
    start = 0
    stop = tl.max(high, 0)
    if WINDOWED:
        low = tl.maximum(high - window, 0)
        start = tl.maximum(before + block * ROWS // GROUP + 1 - window, 0)
    lowest = start
    start = start // KEYS * KEYS
    if SPLIT > 0:
        piece = lowest // SPLIT + split
        start = tl.maximum(start, piece * SPLIT)
        stop = tl.minimum(stop, (piece + 1) * SPLIT)

    d = tl.arange(0, WIDTH)
    inside = d < head_dim
    q += (begin + query)[:, None] * q_token_stride + query_head[:, None] * q_head_stride
    x = tl.load(q + d[None, :], mask=there[:, None] & inside[None, :], other=0.0)
    if UPCAST:
        x = x.to(tl.float32)
    keys += head.to(tl.int64) * key_head_stride
    values += head.to(tl.int64) * value_head_stride
    page_table += s.to(tl.int64) * table_stride
    best = tl.full((ROWS,), float("-inf"), tl.float32)
    mass = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, WIDTH), tl.float32)
    for first in range(start, stop, KEYS):
        t = first + tl.arange(0, KEYS)
        live = (t >= lowest) & (t < stop)
        page = tl.load(page_table + t // PAGE, mask=live, other=0).to(tl.int64)
        slot = (t % PAGE).to(tl.int64)
        k = tl.load(
            keys + (page * key_page_stride + slot * key_token_stride)[None, :] + d[:, None],
            mask=live[None, :] & inside[:, None],
            other=0.0,
        )
        if UPCAST:
            k = k.to(tl.float32)
        score = tl.dot(x, k, input_precision="ieee") * scale
        if CAPPED:
            score = _capped(score, softcap)
        seen = (t[None, :] < high[:, None]) & (t[None, :] >= low[:, None])
        score = tl.where(seen, score * 1.4426950408889634, float("-inf"))
        now = tl.maximum(best, tl.max(score, 1))
        pivot = tl.where(now == float("-inf"), 0.0, now)
        factor = tl.exp2(best - pivot)
        weight = tl.exp2(score - pivot[:, None])
        mass = mass * factor + tl.sum(weight, 1)
        v = tl.load(
            values + (page * value_page_stride + slot * value_token_stride)[:, None] + d[None, :],
            mask=live[:, None] & inside[None, :],
            other=0.0,
        )
        if UPCAST:
            v = v.to(tl.float32)
        acc = tl.dot(weight.to(v.dtype), v, acc * factor[:, None], input_precision="ieee")
        best = now

    if SPLIT > 0:
        at = ((begin + query) * (kv_heads * GROUP) + query_head) * splits + split
        tl.store(stats + at * 2, best, mask=there)
        tl.store(stats + at * 2 + 1, mass, mask=there)
        some = there & (mass != 0.0)  # also NaN
        tl.store(sums + at[:, None] * WIDTH + d[None, :], acc, mask=some[:, None])
    else:
        result = tl.where((high > 0)[:, None], acc / mass[:, None], 0.0)
        out += (begin + query)[:, None] * out_token_stride + query_head[:, None] * out_head_stride
        tl.store(out + d[None, :], result, mask=there[:, None] & inside[None, :])


@triton.jit(do_not_specialize=["window", "splits"])
def _merge(
    out,
    out_token_stride,
    out_head_stride,
    context_lengths,
    sums,
    stats,
    window,
    heads,
    head_dim,
    splits,
    WIDTH: tl.constexpr,
    SPLIT: tl.constexpr,
    WINDOWED: tl.constexpr,
):
    """One query head of one decoding sequence: the sums of its splits, in order."""
    program = tl.program_id(0).to(tl.int64)
    s = program // heads
    context = tl.load(context_lengths + s)
    lowest = 0
    if WINDOWED:
        lowest = tl.maximum(context - window, 0)
    used = tl.where(context > 0, (context - 1) // SPLIT - lowest // SPLIT + 1, 0)
    stats += program * splits * 2
    sums += program * splits * WIDTH
    d = tl.arange(0, WIDTH)
    best = tl.full((), float("-inf"), tl.float32)
    mass = tl.zeros((), tl.float32)
    acc = tl.zeros((WIDTH,), tl.float32)
    for k in range(used):
        top = tl.load(stats + 2 * k)
        now = tl.maximum(best, top)
        pivot = tl.where(now == float("-inf"), 0.0, now)
        factor, own = tl.exp2(best - pivot), tl.exp2(top - pivot)
        mass = mass * factor + tl.load(stats + 2 * k + 1) * own
        acc = acc * factor + tl.load(sums + k * WIDTH + d) * own
        best = now
    result = tl.where(used > 0, acc / mass, 0.0)
    out += s * out_token_stride + program % heads * out_head_stride
    tl.store(out + d, result, mask=d < head_dim)


# ---- launches -----------------------------------------------------------------------------------


class Tiles(NamedTuple):
    """Settings of `_attend`."""

    rows: int
    keys: int
    warps: int
    stages: int


def tiles_of(group: int, width: int, itemsize: int, decoding: bool) -> Tiles:
    """Block sizes by what the registers and the shared memory of sm_80 hold."""
    rows = max(16, min(64, triton.next_power_of_2(group))) if decoding else 64
    if itemsize > 2:  # no tensor cores: the product of a tile is unrolled into registers
        if width > 128:
            return Tiles(16, 16, 8, 1)
        return Tiles(rows, 16, 4, 2) if decoding else Tiles(32, 32, 8, 2)
    if decoding:
        return Tiles(rows, 64 if width <= 128 else 32, 4, 2)
    return Tiles(rows, 64 if width <= 64 else 32, 4 if width <= 64 else 8, 2)


def width_of(head_dim: int) -> int:
    return max(16, triton.next_power_of_2(head_dim))


def prepare(call: Any) -> Callable[[Tensor, Tensor, Tensor, Tensor], None]:
    """Launch settings and scratch of a checked `rlhf_fast_kernels.paged_attention.Call`."""
    tokens, heads, head_dim = call.q.shape
    _, page_size, kv_heads, _ = call.key_pages.shape
    device, group, width = call.q.device, heads // kv_heads, width_of(head_dim)
    decoding = call.cu_queries is None
    tiles = tiles_of(group, width, call.q.element_size(), decoding)
    row_blocks = triton.cdiv(max(1, call.max_query) * group, tiles.rows)
    splits, sums, stats = 1, None, None
    if decoding:
        splits = max(1, triton.cdiv(call.max_context, SPLIT))
        if call.window is not None:
            splits = min(splits, triton.cdiv(call.window, SPLIT) + 1)
        sums = torch.empty((tokens, heads, splits, width), dtype=torch.float32, device=device)
        stats = torch.empty((tokens, heads, splits, 2), dtype=torch.float32, device=device)
    pages = (*call.key_pages.stride()[:3], *call.value_pages.stride()[:3])
    table = (call.page_table, call.page_table.stride(0), call.context_lengths, call.cu_queries)
    window, capped = call.window or 0, call.softcap is not None
    numbers = (call.scale, call.softcap or 1.0, window, kv_heads, head_dim, row_blocks, splits)
    programs = len(call.context_lengths) * kv_heads * row_blocks * splits
    constants = {
        "GROUP": group,
        "PAGE": page_size,
        "ROWS": tiles.rows,
        "KEYS": tiles.keys,
        "WIDTH": width,
        "SPLIT": SPLIT if decoding else 0,
        "CAPPED": capped,
        "WINDOWED": window > 0,
        "UPCAST": interpreting(),
        "num_warps": tiles.warps,
        "num_stages": tiles.stages,
    }

    def run(q: Tensor, key_pages: Tensor, value_pages: Tensor, out: Tensor) -> None:
        inputs = (q, *q.stride()[:2], key_pages, *pages[:3], value_pages, *pages[3:], *table)
        outputs = (out, *out.stride()[:2], sums, stats)
        launch(_attend, programs, device, *inputs, *outputs, *numbers, **constants)
        if decoding:
            arguments = (*outputs[:3], call.context_lengths, sums, stats)
            launch(
                *(_merge, tokens * heads, device, *arguments, window, heads, head_dim, splits),
                WIDTH=width,
                SPLIT=SPLIT,
                WINDOWED=window > 0,
                num_warps=1,
            )

    return run


# ---- ahead of time ------------------------------------------------------------------------------

_STRIDES = [
    f"{name}_stride"
    for name in (
        *("q_token", "q_head", "key_page", "key_token", "key_head"),
        *("value_page", "value_token", "value_head", "table", "out_token", "out_head"),
    )
]
_ARGUMENTS = {
    **dict.fromkeys(_STRIDES, "i64"),
    "page_table": "*i32",
    "context_lengths": "*i32",
    "scale": "fp32",
    "softcap": "fp32",
    **dict.fromkeys(("window", "kv_heads", "head_dim", "row_blocks", "splits"), "i32"),
}
_ALIGNED = ("q", "keys", "values", "out", "sums", *_STRIDES[:8], "out_token_stride")


def _case(dtype: str, group: int, width: int, decoding: bool, extras: bool) -> AotCase:
    tiles = tiles_of(group, width, 4 if dtype == "fp32" else 2, decoding)
    tensors = dict.fromkeys(("q", "keys", "values", "out"), f"*{dtype}")
    absent: tuple[str, ...] = ("sums", "stats")
    if decoding:
        tensors |= {"sums": "*fp32", "stats": "*fp32"}
        absent = ("cu_queries",)
    else:
        tensors["cu_queries"] = "*i32"
    constants = {
        **dict.fromkeys(absent),
        "GROUP": group,
        "PAGE": 64,
        "ROWS": tiles.rows,
        "KEYS": tiles.keys,
        "WIDTH": width,
        "SPLIT": SPLIT if decoding else 0,
        "CAPPED": extras,
        "WINDOWED": extras,
        "UPCAST": False,
    }
    return AotCase(
        *(_attend, {**tensors, **_ARGUMENTS}, constants),
        num_warps=tiles.warps,
        num_stages=tiles.stages,
        multiples_of_16=tuple(n for n in (*_ALIGNED, "head_dim") if n not in absent),
    )


AOT_CASES = (
    *(
        _case(dtype, group, width, decoding, extras)
        for dtype, group, width, extras in (
            ("bf16", 4, 64, False),
            ("bf16", 1, 128, False),
            ("bf16", 2, 256, True),
            ("fp32", 4, 128, True),
        )
        for decoding in (True, False)
    ),
    AotCase(
        _merge,
        {
            "out": "*bf16",
            "out_token_stride": "i64",
            "out_head_stride": "i64",
            "context_lengths": "*i32",
            "sums": "*fp32",
            "stats": "*fp32",
            **dict.fromkeys(("window", "heads", "head_dim", "splits"), "i32"),
        },
        {"WIDTH": 256, "SPLIT": SPLIT, "WINDOWED": True},
        num_warps=1,
    ),
)
