"""Triton kernel of `rope_and_store`: one program for each token and head of q or k.

Each lane holds both entries that a rotation mixes, so q can change in place without a barrier.
"""

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlhf_fast_kernels.triton_support import AotCase, launch

WARPS = 1


@triton.jit
def _part(source, norm, at, there, factor, NORMED: tl.constexpr):
    """Entries `at` of a head in fp32, rounded and weighed if there is a norm."""
    x = tl.load(source + at, mask=there, other=0.0).to(tl.float32)
    if NORMED:
        dtype = source.dtype.element_ty
        weight = tl.load(norm + at, mask=there, other=0.0).to(tl.float32)
        x = (weight * (x * factor).to(dtype).to(tl.float32)).to(dtype).to(tl.float32)
    return x


@triton.jit
def _move(
    source,
    target,
    norm,
    eps,
    cos,
    sin,
    head_dim,
    half,
    HALF: tl.constexpr,
    WIDTH: tl.constexpr,
    ROTATED: tl.constexpr,
):
    """One head by way of norm and rotation; `half` is 0 without a rotation."""
    d = tl.arange(0, WIDTH)
    factor = 1.0
    if norm is not None:
        x = tl.load(source + d, mask=d < head_dim, other=0.0).to(tl.float32)
        factor = 1.0 / tl.sqrt(tl.sum(x * x, 0) / head_dim + eps)
    rest = (d >= 2 * half) & (d < head_dim)
    kept = _part(source, norm, d, rest, factor, norm is not None)
    if ROTATED:
        i = tl.arange(0, HALF)
        there = i < half
        low = _part(source, norm, i, there, factor, norm is not None)
        high = _part(source, norm, i + half, there, factor, norm is not None)
        cos_low = tl.load(cos + i, mask=there, other=0.0)
        sin_low = tl.load(sin + i, mask=there, other=0.0)
        cos_high = tl.load(cos + i + half, mask=there, other=0.0)
        sin_high = tl.load(sin + i + half, mask=there, other=0.0)
        tl.store(target + i, low * cos_low - high * sin_low, mask=there)
        tl.store(target + i + half, high * cos_high + low * sin_high, mask=there)
    tl.store(target + d, kept, mask=rest)


@triton.jit
def _rope_and_store(
    q,
    q_token_stride,
    q_head_stride,
    k,
    k_token_stride,
    k_head_stride,
    v,
    v_token_stride,
    v_head_stride,
    keys,
    key_page_stride,
    key_token_stride,
    key_head_stride,
    values,
    value_page_stride,
    value_token_stride,
    value_head_stride,
    q_norm,
    k_norm,
    slots,
    positions,
    cos,
    cos_stride,
    sin,
    sin_stride,
    eps,
    query_heads,
    kv_heads,
    head_dim,
    half,
    PAGE: tl.constexpr,
    HALF: tl.constexpr,
    WIDTH: tl.constexpr,
    ROTATED: tl.constexpr,
):
    program = tl.program_id(0)
    heads = query_heads + kv_heads
    n = (program // heads).to(tl.int64)
    head = program % heads
    if ROTATED:
        position = tl.load(positions + n)
        cos += position * cos_stride
        sin += position * sin_stride
    if head < query_heads:
        if ROTATED or q_norm is not None:
            own = q + n * q_token_stride + head.to(tl.int64) * q_head_stride
            _move(own, own, q_norm, eps, cos, sin, head_dim, half, HALF, WIDTH, ROTATED)
    else:
        slot = tl.load(slots + n)
        if slot >= 0:
            h = (head - query_heads).to(tl.int64)
            page, place = slot // PAGE, slot % PAGE
            source = k + n * k_token_stride + h * k_head_stride
            target = keys + page * key_page_stride + place * key_token_stride
            target += h * key_head_stride
            _move(source, target, k_norm, eps, cos, sin, head_dim, half, HALF, WIDTH, ROTATED)
            d = tl.arange(0, WIDTH)
            value = tl.load(v + n * v_token_stride + h * v_head_stride + d, mask=d < head_dim)
            into = values + page * value_page_stride + place * value_token_stride
            tl.store(into + h * value_head_stride + d, value, mask=d < head_dim)


def prepare(call: Any) -> Callable[..., None]:
    """Launch settings of a checked `rlhf_fast_kernels.rope_and_store.Call`."""
    tokens, query_heads, head_dim = call.q.shape
    _, page_size, kv_heads, _ = call.key_pages.shape
    device: torch.device = call.q.device
    rotated = call.cos is not None
    half = call.cos.shape[1] // 2 if rotated else 0
    strides = [x.stride()[:-1] for x in call[:5]]
    cos = (call.cos, call.cos.stride(0) if rotated else 0)
    sin = (call.sin, call.sin.stride(0) if rotated else 0)
    numbers = (call.norm_eps, query_heads, kv_heads, head_dim, half)
    constants = {
        "PAGE": page_size,
        "HALF": triton.next_power_of_2(max(half, 1)),
        "ROTATED": rotated,
        "WIDTH": triton.next_power_of_2(head_dim),
        "num_warps": WARPS,
    }

    def run(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        key_pages: Tensor,
        value_pages: Tensor,
        q_norm: Tensor | None,
        k_norm: Tensor | None,
    ) -> None:
        layer: list[Any] = []
        for tensor, own in zip((q, k, v, key_pages, value_pages), strides, strict=True):
            layer += (tensor, *own)
        shared = (call.slots, call.positions, *cos, *sin, *numbers)
        programs = tokens * (query_heads + kv_heads)
        launch(_rope_and_store, programs, device, *layer, q_norm, k_norm, *shared, **constants)

    return run


# ---- ahead of time ------------------------------------------------------------------------------

_STRIDES = [
    *(f"{name}_{dim}_stride" for name in "qkv" for dim in ("token", "head")),
    *(f"{name}_{dim}_stride" for name in ("key", "value") for dim in ("page", "token", "head")),
]
_NUMBERS = {
    **dict.fromkeys((*_STRIDES, "cos_stride", "sin_stride"), "i64"),
    "slots": "*i64",
    "eps": "fp32",
    **dict.fromkeys(("query_heads", "kv_heads", "head_dim", "half"), "i32"),
}
_TABLES = {"positions": "*i64", "cos": "*fp32", "sin": "*fp32"}


def _case(dtype: str, width: int, normed: bool, rotated: bool) -> AotCase:
    tensors = dict.fromkeys(("q", "k", "v", "keys", "values"), f"*{dtype}")
    norms = dict.fromkeys(("q_norm", "k_norm"), f"*{dtype}")
    present = {**tensors, **(norms if normed else {}), **(_TABLES if rotated else {})}
    absent = [name for name in (*norms, *_TABLES) if name not in present]
    constants = {
        **dict.fromkeys(absent),
        "PAGE": 64,
        "HALF": width // 2,
        "WIDTH": width,
        "ROTATED": rotated,
    }
    return AotCase(
        *(_rope_and_store, {**present, **_NUMBERS}, constants),
        num_warps=WARPS,
        multiples_of_16=(*tensors, "head_dim"),
    )


AOT_CASES = (
    _case("bf16", 128, normed=True, rotated=True),
    _case("bf16", 256, normed=False, rotated=True),
    _case("fp32", 64, normed=False, rotated=True),
    _case("bf16", 64, normed=False, rotated=False),
)
