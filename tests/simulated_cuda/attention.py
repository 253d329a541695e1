"""PyTorch's varlen attention and flash-attn, in plain PyTorch behind their own signatures."""

from __future__ import annotations

import importlib.machinery
import itertools
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from tests.simulated_cuda.launches import as_kernel

FLASH_PAGES = 256  # flash-attn's pages are multiples of it


Settings = tuple[float, bool, int, int]  # scale, causal, window to the left and to the right


def _weights(q: Tensor, k: Tensor, settings: Settings) -> Tensor:
    """[Hq, Lq, Lk] of heads [L, Hq, D]; causal towards the last query."""
    scale, causal, left, right = settings
    at = torch.arange(len(q), device=q.device)[:, None] + len(k) - len(q)
    of = torch.arange(len(k), device=q.device)
    seen = (of <= at) if causal else torch.ones(1, len(k), dtype=torch.bool, device=q.device)
    seen = seen & ((of >= at - left) | (left < 0)) & ((of <= at + right) | (right < 0))
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    return scores.masked_fill(~seen, float("-inf")).softmax(-1).nan_to_num(0.0)


def _wide(q: Tensor, *shared: Tensor) -> list[Tensor]:
    """fp32, with the heads of keys and values repeated for the queries' that share them."""
    repeats = q.shape[1] // shared[0].shape[1]
    heads = [x.float().repeat_interleave(repeats, 1, output_size=q.shape[1]) for x in shared]
    return [q.float(), *heads]


def _sequence(q: Tensor, k: Tensor, v: Tensor, settings: Settings) -> Tensor:
    """[Lq, Hq, D] from keys and values [Lk, Hkv, D]."""
    if not len(q) or not len(k):
        return torch.zeros_like(q)
    wide_q, wide_k, wide_v = _wide(q, k, v)
    weights = _weights(wide_q, wide_k, settings)
    return torch.einsum("hqk,khd->qhd", weights, wide_v).to(q.dtype)


def _sequence_gradients(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, settings: Settings
) -> tuple[Tensor, Tensor, Tensor]:
    """Of q, k and v, in fp32; see the backward of FlashAttention."""
    wide_q, wide_k, wide_v = _wide(q, k, v)
    weights, grad = _weights(wide_q, wide_k, settings), grad.float()
    of_weights = torch.einsum("qhd,khd->hqk", grad, wide_v)
    of_scores = weights * (of_weights - (weights * of_weights).sum(-1, keepdim=True)) * settings[0]
    of_q = torch.einsum("hqk,khd->qhd", of_scores, wide_k)
    of_k = torch.einsum("hqk,qhd->khd", of_scores, wide_q)
    of_v = torch.einsum("hqk,qhd->khd", weights, grad)
    folded = [x.unflatten(1, (k.shape[1], -1)).sum(2) for x in (of_k, of_v)]
    return of_q, folded[0], folded[1]


def _check(q: Tensor, k: Tensor, v: Tensor, *indices: Tensor | None) -> None:
    assert q.dtype in (torch.bfloat16, torch.float16), "FlashAttention takes fp16 and bf16"
    assert q.is_cuda
    assert q.dtype == k.dtype == v.dtype
    assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
    for index in indices:
        assert index is None or (index.is_cuda and index.dtype == torch.int32)


def _from_pages(pages: Tensor, table: Tensor, length: int) -> Tensor:
    assert length <= table.numel() * pages.shape[1]
    rows = table[: -(-length // pages.shape[1])].long()
    return pages[rows].flatten(0, 1)[:length]


@as_kernel
def _packed(
    out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor | None,
    settings: Settings,
    used: Tensor | None = None,
    table: Tensor | None = None,
) -> None:
    _check(q, k, v, cu_q, cu_k, used, table)
    bounds = cu_q.tolist()
    for b, (start, end) in enumerate(itertools.pairwise(bounds)):
        if table is None:
            assert cu_k is not None
            keys = slice(int(cu_k[b]), int(cu_k[b + 1]))
            rows = k[keys], v[keys]
        else:
            assert used is not None
            assert table.stride(-1) == 1
            rows = _from_pages(k, table[b], int(used[b])), _from_pages(v, table[b], int(used[b]))
        out[start:end] = _sequence(q[start:end], *rows, settings)


def _settings(
    q: Tensor, scale: float | None, causal: bool, left: int | None, right: int | None
) -> Settings:
    default = q.shape[-1] ** -0.5
    return scale or default, causal, *(-1 if x is None else x for x in (left, right))


# ---- PyTorch's ops -------------------------------------------------------------------------------


def _forward(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor | None, max_q: int, max_k: int,
    dropout_p: float, causal: bool, debug: bool, *, scale: float | None = None,
    window_size_left: int | None = None, window_size_right: int | None = None,
    seqused_k: Tensor | None = None, alibi_slopes: Tensor | None = None,
    block_table: Tensor | None = None, num_splits: int | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    out = torch.empty_like(q)
    settings = _settings(q, scale, causal, window_size_left, window_size_right)
    _packed(out, q, k, v, cu_q, cu_k, settings, seqused_k, block_table)
    lse, state = q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32), q.new_empty(2)
    return out, lse, state.long(), q.new_empty(0), q.new_empty(0)


def _forward_into(out: Tensor, q: Tensor, *rest: Any, **options: Any) -> Tensor:
    result = _forward(q, *rest, **options)
    out.copy_(result[0])
    return result[1]


@as_kernel
def _packed_backward(
    grads: tuple[Tensor, Tensor, Tensor],
    grad: Tensor,
    tensors: tuple[Tensor, Tensor, Tensor],
    cu_q: Tensor,
    cu_k: Tensor,
    settings: Settings,
) -> None:
    q, k, v = tensors
    _check(q, k, v, cu_q, cu_k)
    spans = zip(itertools.pairwise(cu_q.tolist()), itertools.pairwise(cu_k.tolist()), strict=True)
    for (first, last), (start, end) in spans:
        of, to = slice(first, last), slice(start, end)
        found = _sequence_gradients(grad[of], q[of], k[to], v[to], settings)
        for target, where, value in zip(grads, (of, to, to), found, strict=True):
            target[where] = value.to(target.dtype)


def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_q: Tensor,
    cu_k: Tensor, max_q: int, max_k: int, dropout_p: float, causal: bool, rng_state: Tensor,
    unused: Tensor, *, scale: float | None = None, window_size_left: int | None = None,
    window_size_right: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    grads = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    settings = _settings(q, scale, causal, window_size_left, window_size_right)
    _packed_backward(grads, grad, (q, k, v), cu_q, cu_k, settings)
    return grads


# ---- flash-attn ----------------------------------------------------------------------------------


def _flash_attn_varlen_func(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
    max_seqlen_q: int, max_seqlen_k: int, dropout_p: float = 0.0,
    softmax_scale: float | None = None, causal: bool = False,
    window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0,
    alibi_slopes: Tensor | None = None, deterministic: bool = False,
    return_attn_probs: bool = False, block_table: Tensor | None = None,
) -> Tensor:  # fmt: skip
    out = torch.empty_like(q)
    settings = _settings(q, softmax_scale, causal, *window_size)
    _packed(out, q, k, v, cu_seqlens_q, cu_seqlens_k, settings)
    return out


def _flash_attn_with_kvcache(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, k: Tensor | None = None, v: Tensor | None = None,
    rotary_cos: Tensor | None = None, rotary_sin: Tensor | None = None,
    cache_seqlens: Any = None, cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None, block_table: Any = None,
    softmax_scale: float | None = None, causal: bool = False,
    window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0,
    rotary_interleaved: bool = True, alibi_slopes: Tensor | None = None, num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Tensor:  # fmt: skip
    assert q.dim() == 4
    assert k_cache.shape[1] % FLASH_PAGES == 0
    assert block_table.shape[0] == len(q)
    out = torch.empty_like(q)
    bounds = torch.arange(len(q) + 1, dtype=torch.int32, device=q.device) * q.shape[1]
    settings = _settings(q, softmax_scale, causal, *window_size)
    flat = out.flatten(0, 1), q.flatten(0, 1), k_cache, v_cache
    _packed(*flat, bounds, None, settings, cache_seqlens, block_table)
    return out


_OPS = torch.library.Library("aten", "IMPL", "CUDA")


def flash_attn() -> ModuleType:
    """The package, for `sys.modules` of a test; other trainers import more of it than this."""
    package = ModuleType("flash_attn")
    package.__spec__ = importlib.machinery.ModuleSpec("flash_attn", None)
    package.flash_attn_varlen_func = _flash_attn_varlen_func  # type: ignore[attr-defined]
    package.flash_attn_with_kvcache = _flash_attn_with_kvcache  # type: ignore[attr-defined]
    return package


def install() -> None:
    """Put PyTorch's ops there."""
    _OPS.impl("_flash_attention_forward", _forward)
    _OPS.impl("_flash_attention_backward", _backward)
    _OPS.impl("_flash_attention_forward_no_dropout_inplace", _forward_into)
