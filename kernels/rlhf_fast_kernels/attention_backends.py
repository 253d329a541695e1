"""Attention over pages by what is installed: flash-attn, PyTorch's varlen, or `paged_attention`.

    decode    one query a sequence over its pages: flash-attn (pages of a multiple of 256 tokens),
              varlen of PyTorch where an implementation with a block table is active, else ours
    prefill   sequences without a cached prefix: flash-attn or PyTorch's varlen on the keys just
              computed; with a cached prefix always ours

`choose_attention` decides once and says why. A library is used only if its functions take the
arguments that are given here; it is looked for, and imported, when it is asked for.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from rlhf_fast_kernels import dispatch
from rlhf_fast_kernels.paged_attention import OP, PagedAttention

NAMES = ("flash_attn", "torch_varlen", "rlhf_fast")
# (q, key_pages, value_pages, out)
Decode = Callable[[Tensor, Tensor, Tensor, Tensor], object]
_HALF = (torch.bfloat16, torch.float16)
_WIDEST = 256


class Decoding(NamedTuple):
    """What decoding reads beside q and the pages; see `paged_attention`."""

    page_table: Tensor
    context_lengths: Tensor
    scale: float
    window: int | None
    max_context: int


class Prefill(NamedTuple):
    """Sequences without a cached prefix, packed.

    Args:
        slots: `[N]` int64, where key and value of each token lie: page * page size + offset.
        cu_queries: `[S + 1]` int32 bounds.
        max_query: tokens of the longest.
        scale, window: see `paged_attention`.
    """

    slots: Tensor
    cu_queries: Tensor
    max_query: int
    scale: float
    window: int | None


class Backend(Protocol):
    """One library."""

    name: str

    def decoding(
        self, q: Tensor, key_pages: Tensor, value_pages: Tensor, out: Tensor, call: Decoding
    ) -> Decode:
        """A call for tensors of these shapes; q, pages and out of each layer are its arguments."""
        ...


class PrefillBackend(Protocol):
    """A library for packed sequences."""

    name: str

    def prefill(self, q: Tensor, k: Tensor, v: Tensor, call: Prefill) -> Tensor:
        """[N, Hq, D] from q, and rotated k and v [N, Hkv, D]."""
        ...


class AttentionChoice(NamedTuple):
    """What runs. `prefill` None: `paged_attention`, as for every cached prefix."""

    decode: Backend
    prefill: PrefillBackend | None
    reason: str


class OurAttention:
    """`paged_attention`."""

    name = "rlhf_fast"

    def decoding(
        self, q: Tensor, key_pages: Tensor, value_pages: Tensor, out: Tensor, call: Decoding
    ) -> Decode:
        """See `Backend`."""
        return PagedAttention(
            *(q, key_pages, value_pages, call.page_table, call.context_lengths),
            scale=call.scale,
            window=call.window,
            out=out,
            max_context=call.max_context,
            max_query=1,
            validate=False,
        )


class FlashAttention:
    """flash-attn: `flash_attn_with_kvcache` and `flash_attn_varlen_func` of a module."""

    name = "flash_attn"

    def __init__(self, module: Any) -> None:
        self._module = module

    def decoding(
        self, q: Tensor, key_pages: Tensor, value_pages: Tensor, out: Tensor, call: Decoding
    ) -> Decode:
        """See `Backend`."""
        attend, window = self._module.flash_attn_with_kvcache, _window(call.window)
        table = _columns(call, key_pages)

        def run(q: Tensor, key_pages: Tensor, value_pages: Tensor, out: Tensor) -> None:
            result = attend(
                q[:, None],
                key_pages,
                value_pages,
                cache_seqlens=call.context_lengths,
                block_table=table,
                softmax_scale=call.scale,
                causal=True,
                window_size=window,
            )
            out.copy_(result[:, 0])

        return run

    def prefill(self, q: Tensor, k: Tensor, v: Tensor, call: Prefill) -> Tensor:
        """See `PrefillBackend`."""
        result: Tensor = self._module.flash_attn_varlen_func(
            q,
            k,
            v,
            cu_seqlens_q=call.cu_queries,
            cu_seqlens_k=call.cu_queries,
            max_seqlen_q=call.max_query,
            max_seqlen_k=call.max_query,
            softmax_scale=call.scale,
            causal=True,
            window_size=_window(call.window),
        )
        return result


class TorchVarlen:
    """`varlen_attn` and `varlen_attn_out` of `torch.nn.attention.varlen`."""

    name = "torch_varlen"

    def __init__(self, module: Any) -> None:
        self._module = module

    def decoding(
        self, q: Tensor, key_pages: Tensor, value_pages: Tensor, out: Tensor, call: Decoding
    ) -> Decode:
        """See `Backend`."""
        bounds = torch.arange(len(q) + 1, dtype=torch.int32, device=q.device)
        table, window = _columns(call, key_pages), _window(call.window)

        def run(q: Tensor, key_pages: Tensor, value_pages: Tensor, out: Tensor) -> None:
            self._module.varlen_attn_out(
                *(out, q, key_pages, value_pages, bounds, None, 1, call.max_context),
                scale=call.scale,
                window_size=window,
                enable_gqa=True,
                seqused_k=call.context_lengths,
                block_table=table,
            )

        return run

    def prefill(self, q: Tensor, k: Tensor, v: Tensor, call: Prefill) -> Tensor:
        """See `PrefillBackend`."""
        bounds, most = call.cu_queries, call.max_query
        result: Tensor = self._module.varlen_attn(
            *(q, k, v, bounds, bounds, most, most),
            scale=call.scale,
            window_size=_window(call.window),
            enable_gqa=True,
        )
        return result


def _window(window: int | None) -> tuple[int, int]:
    """(tokens to the left, to the right), both libraries' way; ours counts the token itself."""
    return (-1 if window is None else window - 1, 0)


def _columns(call: Decoding, key_pages: Tensor) -> Tensor:
    """The part of the table that contexts reach: both libraries take the bound from its width.

    A view: the pages of a row change between two calls.
    """
    return call.page_table[:, : -(-call.max_context // key_pages.shape[1])]


def stored_keys(key_pages: Tensor, slots: Tensor) -> Tensor:
    """[N, Hkv, D] keys as they were stored, rotated."""
    size = key_pages.shape[1]
    return key_pages[slots // size, slots % size]


# ---- probes -------------------------------------------------------------------------------------

_FLASH_ARGUMENTS = {
    "flash_attn_with_kvcache": (
        *("q", "k_cache", "v_cache", "cache_seqlens", "block_table", "softmax_scale", "causal"),
        "window_size",
    ),
    "flash_attn_varlen_func": (
        *("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"),
        *("softmax_scale", "causal", "window_size"),
    ),
}
_PACKED = ("query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k")
_VARLEN_ARGUMENTS = {"varlen_attn": (*_PACKED, "scale", "window_size", "enable_gqa")}
_PAGED_ARGUMENTS = {
    "varlen_attn_out": (
        *("out", *_PACKED, "scale", "window_size", "enable_gqa", "seqused_k", "block_table"),
    )
}


def lacks(module: Any, wanted: Mapping[str, tuple[str, ...]]) -> str | None:
    """None if the functions of a module take these arguments, otherwise what is missing."""
    for name, arguments in wanted.items():
        function = getattr(module, name, None)
        if function is None:
            return f"has no {name}"
        try:
            known = inspect.signature(function).parameters
        except (TypeError, ValueError):
            return f"{name} does not say what it takes"
        missing = [argument for argument in arguments if argument not in known]
        if missing:
            return f"{name} takes no {', '.join(missing)}"
    return None


@cache
def _imported(name: str) -> Any:
    """A module, or why it cannot be had, as text."""
    try:
        if importlib.util.find_spec(name.partition(".")[0]) is None:
            return "is not installed"
        return importlib.import_module(name)
    except Exception as error:  # a wheel of another torch fails in many ways
        return f"cannot be imported: {error}"


def _active_flash() -> str | None:
    """The implementation of flash attention that somebody activated in PyTorch."""
    current = getattr(torch.nn.attention, "current_flash_attention_impl", None)
    if current is None:
        current = getattr(
            _imported("torch.nn.attention._registry"), "current_flash_attention_impl", None
        )
    return None if current is None else current()


# ---- choosing -----------------------------------------------------------------------------------


def choose_attention(
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    page_size: int,
    *,
    wish: str = "auto",
    flash: Any = None,
    varlen: Any = None,
    active: str | None = None,
) -> AttentionChoice:
    """What decodes and prefills with these sizes here.

    Args:
        device, dtype, head_dim, page_size: of queries and pages.
        wish: one of NAMES, or auto: the first of them that can decode. What a wish cannot prefill
            is ours.
        flash, varlen: modules in the place of `flash_attn` and `torch.nn.attention.varlen`.
        active: in the place of PyTorch's active implementation of flash attention.

    Raises:
        ValueError: the wish is no name, or it cannot decode here.
    """
    if wish not in ("auto", *NAMES):
        raise ValueError(f"no attention {wish!r}; choices are auto, {', '.join(NAMES)}")
    flash = _imported("flash_attn") if flash is None else flash
    varlen = _imported("torch.nn.attention.varlen") if varlen is None else varlen
    unfit = _unfit(device, dtype, head_dim)
    no_flash = unfit or _no_module(flash, _FLASH_ARGUMENTS)
    no_packed = unfit or _no_module(varlen, _VARLEN_ARGUMENTS)
    obstacles = {
        "flash_attn": no_flash or _no_pages_of(page_size),
        "torch_varlen": no_packed
        or _no_module(varlen, _PAGED_ARGUMENTS)
        or _no_block_table(_active_flash() if active is None else active),
        "rlhf_fast": None,
    }
    source = "asked for"
    forced = os.environ.get(dispatch.ENVIRONMENT, "")
    ops = dispatch.parse_environment(forced)
    if wish == "auto" and ops.get(OP, ops[""]) != "auto":
        wish, source = "rlhf_fast", f"{dispatch.ENVIRONMENT}={forced}"
    chosen = next(n for n in NAMES if obstacles[n] is None) if wish == "auto" else wish
    if obstacles[chosen] is not None:
        raise ValueError(f"attention {chosen} cannot run: {obstacles[chosen]}")
    backends: dict[str, Backend] = {
        "flash_attn": FlashAttention(flash),
        "torch_varlen": TorchVarlen(varlen),
        "rlhf_fast": OurAttention(),
    }
    decode = backends[chosen]
    prefill: PrefillBackend | None = None
    if no_flash is None and wish in ("auto", "flash_attn"):
        prefill = FlashAttention(flash)
    elif no_packed is None and wish in ("auto", "torch_varlen"):
        prefill = TorchVarlen(varlen)
    why = "; ".join(f"not {name}: {fault}" for name, fault in obstacles.items() if fault)
    return AttentionChoice(decode, prefill, source if wish != "auto" else why or "preferred")


def _unfit(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    if device.type != "cuda":
        return f"runs on CUDA devices, not on {device.type}"
    if dtype not in _HALF:
        return f"takes bf16 and fp16, not {str(dtype).removeprefix('torch.')}"
    if head_dim > _WIDEST or head_dim % 8 != 0:
        return f"takes heads of a multiple of 8 up to {_WIDEST}, not {head_dim}"
    return None


def _no_module(module: Any, wanted: Mapping[str, tuple[str, ...]]) -> str | None:
    return module if isinstance(module, str) else lacks(module, wanted)


def _no_pages_of(page_size: int) -> str | None:
    return None if page_size % 256 == 0 else f"wants pages of a multiple of 256, not {page_size}"


def _no_block_table(active: str | None) -> str | None:
    return None if active in ("FA3", "FA4") else "no implementation with a block table is active"
