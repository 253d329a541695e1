"""Triton kernels of `packed_attention`: the forward, and three of the backward.

A program serves a tile of tokens of one segment and one head and walks over the tiles it shares
weights with: `_forward` and `_grad_of_queries` take a tile of queries and its keys, `_grad_of_keys`
a tile of keys and its queries, head after head of the group. So every sum has one writer and one
order. The grid has a program for each tile of the longest segment; those past a segment's end do
nothing.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlhf_fast_kernels.triton_kernels._packed_tiles import _place, _put, _sees, _tile
from rlhf_fast_kernels.triton_support import AotCase, interpreting, launch

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


# ---- kernels ------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["window", "blocks"])
def _forward(
    q,
    q_token_stride,
    q_head_stride,
    k,
    k_token_stride,
    k_head_stride,
    v,
    v_token_stride,
    v_head_stride,
    out,
    out_token_stride,
    out_head_stride,
    lse,
    cu_seqlens,
    scale,
    window,
    heads,
    head_dim,
    blocks,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    WIDTH: tl.constexpr,
    WINDOWED: tl.constexpr,
    UPCAST: tl.constexpr,
):
    head, number, begin, length = _place(cu_seqlens, heads, blocks)
    block = blocks - 1 - number  # the last tile sees most
    if block * ROWS >= length:
        return
    row = block * ROWS + tl.arange(0, ROWS)
    there = row < length
    q += head.to(tl.int64) * q_head_stride
    k += (head // GROUP).to(tl.int64) * k_head_stride
    v += (head // GROUP).to(tl.int64) * v_head_stride
    x = _tile(q, q_token_stride, begin, row, there, head_dim, WIDTH, UPCAST)
    best = tl.full((ROWS,), float("-inf"), tl.float32)
    mass = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, WIDTH), tl.float32)
    start = 0
    stop = tl.minimum((block + 1) * ROWS, length)
    if WINDOWED:
        start = tl.maximum(block * ROWS + 1 - window, 0) // KEYS * KEYS
    for first in range(start, stop, KEYS):
        t = first + tl.arange(0, KEYS)
        keys = _tile(k, k_token_stride, begin, t, t < length, head_dim, WIDTH, UPCAST)
        score = tl.dot(x, tl.trans(keys), input_precision="ieee") * (scale * LOG2E)
        seen = _sees(row[:, None], t[None, :], length, window, WINDOWED)
        score = tl.where(seen, score, float("-inf"))
        now = tl.maximum(best, tl.max(score, 1))
        pivot = tl.where(now == float("-inf"), 0.0, now)
        factor = tl.exp2(best - pivot)
        weight = tl.exp2(score - pivot[:, None])
        mass = mass * factor + tl.sum(weight, 1)
        values = _tile(v, v_token_stride, begin, t, t < length, head_dim, WIDTH, UPCAST)
        acc = tl.dot(weight.to(values.dtype), values, acc * factor[:, None], input_precision="ieee")
        best = now
    out += head.to(tl.int64) * out_head_stride
    _put(out, out_token_stride, begin, row, there, head_dim, acc / mass[:, None], WIDTH)
    tl.store(lse + (begin + row) * heads + head, (best + tl.log2(mass)) * LN2, mask=there)


@triton.jit
def _delta(
    out,
    out_token_stride,
    out_head_stride,
    grad_out,
    grad_out_token_stride,
    grad_out_head_stride,
    delta,
    tokens,
    heads,
    head_dim,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """out . grad_out of ROWS tokens of one head."""
    program = tl.program_id(0)
    head = program % heads
    row = program // heads * ROWS + tl.arange(0, ROWS).to(tl.int64)
    there = row < tokens
    out += head.to(tl.int64) * out_head_stride
    grad_out += head.to(tl.int64) * grad_out_head_stride
    x = _tile(out, out_token_stride, 0, row, there, head_dim, WIDTH, True)
    y = _tile(grad_out, grad_out_token_stride, 0, row, there, head_dim, WIDTH, True)
    tl.store(delta + row * heads + head, tl.sum(x * y, 1), mask=there)


@triton.jit(do_not_specialize=["window", "blocks"])
def _grad_of_queries(
    q,
    q_token_stride,
    q_head_stride,
    k,
    k_token_stride,
    k_head_stride,
    v,
    v_token_stride,
    v_head_stride,
    grad_out,
    grad_out_token_stride,
    grad_out_head_stride,
    grad_q,
    grad_q_token_stride,
    grad_q_head_stride,
    lse,
    delta,
    cu_seqlens,
    scale,
    window,
    heads,
    head_dim,
    blocks,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    WIDTH: tl.constexpr,
    WINDOWED: tl.constexpr,
    UPCAST: tl.constexpr,
):
    head, number, begin, length = _place(cu_seqlens, heads, blocks)
    block = blocks - 1 - number
    if block * ROWS >= length:
        return
    row = block * ROWS + tl.arange(0, ROWS)
    there = row < length
    q += head.to(tl.int64) * q_head_stride
    grad_out += head.to(tl.int64) * grad_out_head_stride
    k += (head // GROUP).to(tl.int64) * k_head_stride
    v += (head // GROUP).to(tl.int64) * v_head_stride
    x = _tile(q, q_token_stride, begin, row, there, head_dim, WIDTH, UPCAST)
    above = _tile(grad_out, grad_out_token_stride, begin, row, there, head_dim, WIDTH, UPCAST)
    mass = tl.load(lse + (begin + row) * heads + head, mask=there, other=0.0) * LOG2E
    mean = tl.load(delta + (begin + row) * heads + head, mask=there, other=0.0)
    acc = tl.zeros((ROWS, WIDTH), tl.float32)
    start = 0
    stop = tl.minimum((block + 1) * ROWS, length)
    if WINDOWED:
        start = tl.maximum(block * ROWS + 1 - window, 0) // KEYS * KEYS
    for first in range(start, stop, KEYS):
        t = first + tl.arange(0, KEYS)
        keys = _tile(k, k_token_stride, begin, t, t < length, head_dim, WIDTH, UPCAST)
        values = _tile(v, v_token_stride, begin, t, t < length, head_dim, WIDTH, UPCAST)
        score = tl.dot(x, tl.trans(keys), input_precision="ieee") * (scale * LOG2E)
        below = tl.dot(above, tl.trans(values), input_precision="ieee")
        seen = _sees(row[:, None], t[None, :], length, window, WINDOWED)
        weight = tl.exp2(tl.where(seen, score - mass[:, None], float("-inf")))
        slope = weight * (below - mean[:, None])
        acc = tl.dot(slope.to(keys.dtype), keys, acc, input_precision="ieee")
    grad_q += head.to(tl.int64) * grad_q_head_stride
    _put(grad_q, grad_q_token_stride, begin, row, there, head_dim, acc * scale, WIDTH)


@triton.jit(do_not_specialize=["window", "blocks"])
def _grad_of_keys(
    q,
    q_token_stride,
    q_head_stride,
    k,
    k_token_stride,
    k_head_stride,
    v,
    v_token_stride,
    v_head_stride,
    grad_out,
    grad_out_token_stride,
    grad_out_head_stride,
    grad_k,
    grad_k_token_stride,
    grad_k_head_stride,
    grad_v,
    grad_v_token_stride,
    grad_v_head_stride,
    lse,
    delta,
    cu_seqlens,
    scale,
    window,
    kv_heads,
    head_dim,
    blocks,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    WIDTH: tl.constexpr,
    WINDOWED: tl.constexpr,
    UPCAST: tl.constexpr,
):
    kv_head, block, begin, length = _place(cu_seqlens, kv_heads, blocks)
    if block * KEYS >= length:
        return
    t = block * KEYS + tl.arange(0, KEYS)
    there = t < length
    k += kv_head.to(tl.int64) * k_head_stride
    v += kv_head.to(tl.int64) * v_head_stride
    keys = _tile(k, k_token_stride, begin, t, there, head_dim, WIDTH, UPCAST)
    values = _tile(v, v_token_stride, begin, t, there, head_dim, WIDTH, UPCAST)
    acc_k = tl.zeros((KEYS, WIDTH), tl.float32)
    acc_v = tl.zeros((KEYS, WIDTH), tl.float32)
    stop = length
    if WINDOWED:
        stop = tl.minimum(length, (block + 1) * KEYS - 1 + window)
    for member in range(GROUP):
        head = (kv_head * GROUP + member).to(tl.int64)
        for first in range(block * KEYS // ROWS * ROWS, stop, ROWS):
            row = first + tl.arange(0, ROWS)
            real = row < length
            x = _tile(
                q + head * q_head_stride,
                *(q_token_stride, begin, row, real, head_dim, WIDTH, UPCAST),
            )
            above = _tile(
                grad_out + head * grad_out_head_stride,
                *(grad_out_token_stride, begin, row, real, head_dim, WIDTH, UPCAST),
            )
            at = (begin + row) * (kv_heads * GROUP) + head
            mass = tl.load(lse + at, mask=real, other=0.0) * LOG2E
            mean = tl.load(delta + at, mask=real, other=0.0)
            score = tl.dot(keys, tl.trans(x), input_precision="ieee") * (scale * LOG2E)
            seen = _sees(row[None, :], t[:, None], length, window, WINDOWED)
            weight = tl.exp2(tl.where(seen, score - mass[None, :], float("-inf")))
            acc_v = tl.dot(weight.to(above.dtype), above, acc_v, input_precision="ieee")
            below = tl.dot(values, tl.trans(above), input_precision="ieee")
            slope = weight * (below - mean[None, :])
            acc_k = tl.dot(slope.to(x.dtype), x, acc_k, input_precision="ieee")
    grad_k += kv_head.to(tl.int64) * grad_k_head_stride
    grad_v += kv_head.to(tl.int64) * grad_v_head_stride
    _put(grad_k, grad_k_token_stride, begin, t, there, head_dim, acc_k * scale, WIDTH)
    _put(grad_v, grad_v_token_stride, begin, t, there, head_dim, acc_v, WIDTH)


# ---- launches -----------------------------------------------------------------------------------


class Tiles(NamedTuple):
    """Tile of a program's own tokens, of those it walks over, and how it is launched."""

    own: int
    others: int
    warps: int
    stages: int


def tiles_of(width: int, itemsize: int, backward: bool) -> Tiles:
    """By what the registers and the shared memory of sm_80 hold."""
    if itemsize > 2:  # no tensor cores: the product of a tile is unrolled into registers
        return Tiles(16, 16, 4 if width <= 64 else 8, 2) if backward else Tiles(32, 16, 8, 1)
    if backward:
        return Tiles(64, 32, 4, 2) if width <= 64 else Tiles(32, 32, 8 if width > 128 else 4, 1)
    return Tiles(64, 64 if width <= 64 else 32, 4 if width <= 64 else 8, 2)


def width_of(head_dim: int) -> int:
    return max(16, triton.next_power_of_2(head_dim))


def _strided(*tensors: Tensor) -> tuple[Any, ...]:
    return tuple(part for x in tensors for part in (x, x.stride(0), x.stride(1)))


def _constants(q: Tensor, k: Tensor, window: int | None, tiles: Tiles) -> dict[str, Any]:
    return {
        "GROUP": q.shape[1] // k.shape[1],
        "WIDTH": width_of(q.shape[2]),
        "WINDOWED": window is not None,
        "UPCAST": interpreting(),
        "num_warps": tiles.warps,
        "num_stages": tiles.stages,
    }


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    scale: float,
    window: int | None,
    longest: int,
    out: Tensor,
    lse: Tensor,
) -> None:
    """Fills out and lse."""
    tiles = tiles_of(width_of(q.shape[2]), q.element_size(), False)
    _, heads, head_dim = q.shape
    blocks = triton.cdiv(longest, tiles.own)
    programs = (len(cu_seqlens) - 1) * heads * blocks
    if programs == 0:
        return
    launch(
        *(_forward, programs, q.device, *_strided(q, k, v, out), lse, cu_seqlens),
        *(scale, window or 0, heads, head_dim, blocks),
        ROWS=tiles.own,
        KEYS=tiles.others,
        **_constants(q, k, window, tiles),
    )


def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    scale: float,
    window: int | None,
    longest: int,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    *grads: Tensor,
) -> None:
    """Fills the gradients of q, k and v."""
    tokens, heads, head_dim = q.shape
    tiles = tiles_of(width_of(head_dim), q.element_size(), True)
    segments, kv_heads = len(cu_seqlens) - 1, k.shape[1]
    blocks = triton.cdiv(longest, tiles.own)
    if segments * blocks == 0 or tokens == 0:
        return
    grad_q, grad_k, grad_v = grads
    delta = torch.empty(tokens, heads, dtype=torch.float32, device=q.device)
    rows = 16
    launch(
        *(_delta, triton.cdiv(tokens, rows) * heads, q.device, *_strided(out, grad_out), delta),
        *(tokens, heads, head_dim),
        ROWS=rows,
        WIDTH=width_of(head_dim),
        num_warps=4,
    )
    constants = _constants(q, k, window, tiles)
    statistics = (lse, delta, cu_seqlens, scale, window or 0)
    launch(
        *(_grad_of_queries, segments * heads * blocks, q.device),
        *(*_strided(q, k, v, grad_out, grad_q), *statistics, heads, head_dim, blocks),
        ROWS=tiles.own,
        KEYS=tiles.others,
        **constants,
    )
    launch(
        *(_grad_of_keys, segments * kv_heads * blocks, q.device),
        *(*_strided(q, k, v, grad_out, grad_k, grad_v), *statistics, kv_heads, head_dim, blocks),
        ROWS=tiles.others,
        KEYS=tiles.own,
        **constants,
    )


# ---- ahead of time ------------------------------------------------------------------------------

_OPERANDS = {
    _forward: ("q", "k", "v", "out"),
    _grad_of_queries: ("q", "k", "v", "grad_out", "grad_q"),
    _grad_of_keys: ("q", "k", "v", "grad_out", "grad_k", "grad_v"),
    _delta: ("out", "grad_out"),
}


def _case(kernel: Any, dtype: str, group: int, width: int, windowed: bool) -> AotCase:
    tiles = tiles_of(width, 4 if dtype == "fp32" else 2, kernel is not _forward)
    operands = _OPERANDS[kernel]
    strides = [f"{name}_{kind}_stride" for name in operands for kind in ("token", "head")]
    signature = dict.fromkeys(operands, f"*{dtype}") | dict.fromkeys(strides, "i64")
    signature |= {"head_dim": "i32", "kv_heads" if kernel is _grad_of_keys else "heads": "i32"}
    if kernel is _delta:
        constants = {"ROWS": 16, "WIDTH": width}
        signature |= {"delta": "*fp32", "tokens": "i32"}
        return AotCase(kernel, signature, constants)
    signature |= {"lse": "*fp32", "cu_seqlens": "*i32", "scale": "fp32", "window": "i32"}
    signature["blocks"] = "i32"
    if kernel is not _forward:
        signature["delta"] = "*fp32"
    own, others = tiles.own, tiles.others
    rows, keys = (others, own) if kernel is _grad_of_keys else (own, others)
    constants = {
        "GROUP": group,
        "ROWS": rows,
        "KEYS": keys,
        "WIDTH": width,
        "WINDOWED": windowed,
        "UPCAST": False,
    }
    return AotCase(
        *(kernel, signature, constants),
        num_warps=tiles.warps,
        num_stages=tiles.stages,
        # sm_80 spills 8 bytes here; wide heads in fp32 are nobody's training.
        hot=not (kernel is _grad_of_keys and dtype == "fp32" and windowed),
        multiples_of_16=(*operands, *strides, "head_dim"),
    )


_CASES = (
    ("bf16", 4, 64, False),
    ("bf16", 1, 128, False),
    ("bf16", 2, 256, True),
    ("fp32", 1, 64, False),
    ("fp32", 4, 128, True),
)

AOT_CASES = (
    *(_case(_forward, *case) for case in _CASES),
    *(_case(_grad_of_queries, *case) for case in _CASES),
    *(_case(_grad_of_keys, *case) for case in _CASES),
    _case(_delta, "bf16", 1, 256, False),
)
