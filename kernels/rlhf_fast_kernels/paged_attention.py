"""Attention of packed queries over a key-value cache in pages.

Sequence s holds `context_lengths[s]` tokens, token t in page `page_table[s, t // page_size]`, slot
`t % page_size`. Its queries are the last tokens of it: query i of n sits at position
p = context - n + i and sees the keys

    max(0, p - window + 1) <= t <= p        (window None: from 0)

    score_t = scale q . k_t                 softcap c: score_t = c tanh(scale q . k_t / c)
    out     = sum_t softmax(score)_t v_t

Query head h reads key-value head h // (Hq / Hkv). A query at a negative position (context 0: a
padding row of a CUDA graph) gives exactly 0. Table entries of blocks that no query sees, and slots
that no query sees, are not looked at: ids may be garbage there, keys and values NaN.

The same bits whatever sequences stand beside, on the CPU also for any number of threads and whether
a token is decoded or prefilled: keys are taken in blocks at absolute positions, and every row sums
in the same order.

An engine calls this for every layer of a step with the same table, so the checks and the launch
settings are made once, in `PagedAttention`, and a call of that takes a few microseconds.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf_fast_kernels import dispatch, native, reference, triton_support
from rlhf_fast_kernels.checked_mode import reads_values
from rlhf_fast_kernels.page_arguments import (
    check_dims,
    check_heads,
    check_index,
    check_pages,
    check_range,
    strides_of,
)
from rlhf_fast_kernels.registry import refuse_wrappers

OP = "paged_attention"
# (q, key_pages, value_pages, out)
Run = Callable[[Tensor, Tensor, Tensor, Tensor], None]


class Call(NamedTuple):
    """The checked arguments; q, the pages and out stand for those of every layer."""

    q: Tensor
    key_pages: Tensor
    value_pages: Tensor
    out: Tensor
    page_table: Tensor
    context_lengths: Tensor
    cu_queries: Tensor | None
    scale: float
    softcap: float | None
    window: int | None
    max_context: int
    max_query: int


# ---- launchers ----------------------------------------------------------------------------------


def _prepare_reference(call: Call) -> Run:
    def run(q: Tensor, key_pages: Tensor, value_pages: Tensor, out: Tensor) -> None:
        indices = (call.page_table, call.context_lengths, call.cu_queries)
        settings = {"scale": call.scale, "softcap": call.softcap, "window": call.window}
        result = reference.paged_attention(q, key_pages, value_pages, *indices, **settings)  # type: ignore[arg-type]
        if call.cu_queries is not None:
            written = int(call.cu_queries[-1])
            out[:written] = result[:written]
        else:
            out.copy_(result)

    return run


def _prepare_cpu(call: Call) -> Run:
    _, heads, width = call.q.shape
    _, page_size, kv_heads, _ = call.key_pages.shape
    attend = native.core().PagedAttention(
        native.DTYPE_CODES[call.q.dtype],
        (len(call.context_lengths), heads, kv_heads, width, page_size),
        (*map(strides_of, call[:4]), call.page_table.stride(0)),
        (
            call.page_table.data_ptr(),
            call.context_lengths.data_ptr(),
            0 if call.cu_queries is None else call.cu_queries.data_ptr(),
        ),
        call.scale,
        call.softcap or 0.0,
        call.window or 0,
    )
    return _OnCpu(attend, native.thread_count())


class _OnCpu:
    """`_core.PagedAttention` for tensors."""

    __slots__ = ("_attend", "_threads")

    def __init__(self, attend: Any, threads: int) -> None:
        self._attend, self._threads = attend, threads

    def __call__(self, *tensors: Tensor) -> None:
        self._attend(*(x.data_ptr() for x in tensors), self._threads)

    def bind(self, *tensors: Tensor) -> Callable[[], None]:
        """The call without arguments."""
        bound: Callable[[], None] = self._attend.bind(
            *(x.data_ptr() for x in tensors), self._threads
        )
        return bound


def _prepare_triton(call: Call) -> Run:
    kernels = triton_support.kernels(OP)
    run: Run = kernels.prepare(call)
    return run


# ---- arguments ----------------------------------------------------------------------------------


def _check_tensors(
    q: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    page_table: Tensor,
    context_lengths: Tensor,
    cu_queries: Tensor | None,
) -> None:
    check_heads(OP, "q", q, q)
    check_pages(OP, "key_pages", key_pages, q)
    check_pages(OP, "value_pages", value_pages, q)
    if key_pages.shape != value_pages.shape:
        found = f"{list(value_pages.shape)}, key_pages {list(key_pages.shape)}"
        raise ValueError(f"{OP}: value_pages is {found}; expected the same shape")
    if q.shape[1] % key_pages.shape[2] != 0:
        found = f"{q.shape[1]} heads, key_pages {key_pages.shape[2]}"
        raise ValueError(f"{OP}: q has {found}; expected a multiple")
    check_dims(OP, "page_table", page_table, "[S, P]", 2)
    sequences = page_table.shape[0]
    check_index(OP, "page_table", page_table, torch.int32, tuple(page_table.shape), q)
    check_index(OP, "context_lengths", context_lengths, torch.int32, (sequences,), q)
    if cu_queries is not None:
        check_index(OP, "cu_queries", cu_queries, torch.int32, (sequences + 1,), q)
    elif len(q) != sequences:
        found = f"q is {list(q.shape)}, page_table {list(page_table.shape)}"
        raise ValueError(f"{OP}: {found}; without cu_queries expected one query a sequence")


def _check_settings(scale: float, softcap: float | None, window: int | None) -> None:
    if not math.isfinite(scale):
        raise ValueError(f"{OP}: scale is {scale}; expected a finite number")
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"{OP}: softcap is {softcap}; expected a positive number or None")
    if window is not None and window < 1:
        raise ValueError(f"{OP}: window is {window}; expected at least 1 or None")


def _check_values(call: Call) -> None:
    """Whether lengths, offsets and the table entries that are read lie in their range."""
    pages, page_size = call.key_pages.shape[:2]
    columns = call.page_table.shape[1]
    contexts = call.context_lengths.long()
    queries = torch.ones_like(contexts)
    if call.cu_queries is not None:
        queries = call.cu_queries.long().diff()
        ends = call.cu_queries[[0, -1]].tolist()
        if ends[0] != 0 or not 0 <= ends[1] <= len(call.q) or (queries < 0).any():
            expected = f"offsets that rise from 0 to at most {len(call.q)}"
            raise ValueError(f"{OP}: cu_queries is {call.cu_queries.tolist()}; expected {expected}")
        check_range(OP, "queries of a sequence (by cu_queries)", queries, 0, call.max_query)
    check_range(OP, "context_lengths", contexts, 0, min(columns * page_size, call.max_context))
    first = torch.zeros_like(contexts)
    if call.window is not None:
        first = (contexts - queries + 1 - call.window).clamp(min=0)
    block = torch.arange(columns, device=contexts.device) * page_size
    read = (block < contexts[:, None]) & (block + page_size > first[:, None])
    read &= (queries > 0)[:, None]
    check_range(OP, "page_table", call.page_table[read], 0, pages - 1)


def _collect(
    tensors: tuple[Tensor, Tensor, Tensor, Tensor | None],
    indices: tuple[Tensor, Tensor, Tensor | None],
    settings: tuple[float | None, float | None, int | None],
    sizes: tuple[int | None, int | None],
) -> Call:
    q, key_pages, value_pages, out = tensors
    _check_tensors(q, key_pages, value_pages, *indices)
    if out is None:
        # Only rows of a sequence are written: where offsets say which, the others are 0.
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        if indices[2] is not None:
            out.zero_()
    else:
        check_heads(OP, "out", out, q)
        if out.shape != q.shape:
            raise ValueError(f"{OP}: out is {list(out.shape)}; expected {list(q.shape)}, as q")
    scale = q.shape[-1] ** -0.5 if settings[0] is None else settings[0]
    _check_settings(scale, *settings[1:])
    longest = indices[0].shape[1] * key_pages.shape[1]
    context = longest if sizes[0] is None else min(sizes[0], longest)
    query = 1 if indices[2] is None else len(q) if sizes[1] is None else sizes[1]
    return Call(q, key_pages, value_pages, out, *indices, scale, *settings[1:], context, query)


# ---- the public functions -----------------------------------------------------------------------


class PagedAttention:
    """`paged_attention` made ready for many layers: `attend(q, key_pages, value_pages, out)`.

    The tensors of a call must have the shapes, strides, dtypes and device of those given here;
    nothing is checked again. The values of page_table, context_lengths and cu_queries are read at
    each call, so an object serves every step that has the same sizes. With `validate=False` they
    are never looked at.
    """

    __slots__ = ("_call", "_run")

    def __init__(
        self,
        q: Tensor,
        key_pages: Tensor,
        value_pages: Tensor,
        page_table: Tensor,
        context_lengths: Tensor,
        cu_queries: Tensor | None = None,
        *,
        scale: float | None = None,
        softcap: float | None = None,
        window: int | None = None,
        out: Tensor | None = None,
        max_context: int | None = None,
        max_query: int | None = None,
        validate: bool = True,
        impl: str | None = None,
    ) -> None:
        """Arguments as for `paged_attention`; `out` None stands for a contiguous tensor."""
        given = {"q": q, "key_pages": key_pages, "value_pages": value_pages, "out": out}
        indices = {"context_lengths": context_lengths, "cu_queries": cu_queries}
        refuse_wrappers(OP, **given, page_table=page_table, **indices)
        self._call = _collect(
            (q, key_pages, value_pages, out),
            (page_table, context_lengths, cu_queries),
            (scale, softcap, window),
            (max_context, max_query),
        )
        chosen = dispatch.choose(OP, impl, q, key_pages, value_pages)
        if validate and reads_values(q):
            _check_values(self._call)
        self._run: Run = chosen.function(self._call)

    def __call__(self, q: Tensor, key_pages: Tensor, value_pages: Tensor, out: Tensor) -> Tensor:
        """Writes to `out` and returns it."""
        if q.shape[0] > 0:
            self._run(q, key_pages, value_pages, out)
        return out

    def bind(
        self, q: Tensor, key_pages: Tensor, value_pages: Tensor, out: Tensor
    ) -> Callable[[], object]:
        """The call without arguments, for tensors that stay where they are and are kept alive."""
        if isinstance(self._run, _OnCpu):
            return self._run.bind(q, key_pages, value_pages, out)
        return partial(self, q, key_pages, value_pages, out)

    @property
    def out(self) -> Tensor:
        """The `out` that was given, or a new tensor like it."""
        return self._call.out


def paged_attention(
    q: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    page_table: Tensor,
    context_lengths: Tensor,
    cu_queries: Tensor | None = None,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    window: int | None = None,
    out: Tensor | None = None,
    max_context: int | None = None,
    max_query: int | None = None,
    impl: str | None = None,
) -> Tensor:
    """Causal attention of each sequence's last tokens over its pages. No gradient.

    Args:
        q: `[N, Hq, D]`, D at most 256; fp32 and bf16 everywhere, fp16 also on a GPU (others run in
            the reference). Any strides of tokens and heads, as of a view of a fused qkv product.
        key_pages, value_pages: `[pages, page_size, Hkv, D]` in q's dtype, any strides of the first
            three dims; Hq is a multiple of Hkv.
        page_table: `[S, P]` int32, page of each block of page_size tokens.
        context_lengths: `[S]` int32, tokens of each sequence, those of this call included.
        cu_queries: `[S + 1]` int32, sequence s asks with q[cu[s]:cu[s + 1]]. None: one query a
            sequence, N = S.
        scale: of the scores; default D ** -0.5.
        softcap: bound of the scores, as in Gemma 2.
        window: tokens that a query sees, itself included.
        out: `[N, Hq, D]` to write to, in q's dtype, its last dim contiguous. Rows of no sequence
            (beyond cu[S]) are left as they are; in a new tensor they are 0.
        max_context, max_query: bounds that the caller vouches for; they size a GPU's grid without
            waiting for the device. Default: what the shapes allow.
        impl: implementation by name, see `rlhf_fast_kernels.dispatch`.

    Returns:
        `[N, Hq, D]` in q's dtype; sums in fp32.

    Raises:
        ValueError, TypeError: shape, dtype, device or value of an argument. Lengths, offsets and
            pages out of range are found on the CPU alone (and with RLHF_FAST_CHECK=1).
    """
    attend = PagedAttention(
        q,
        key_pages,
        value_pages,
        page_table,
        context_lengths,
        cu_queries,
        scale=scale,
        softcap=softcap,
        window=window,
        out=out,
        max_context=max_context,
        max_query=max_query,
        impl=impl,
    )
    return attend(q, key_pages, value_pages, attend.out)


def _selftest(
    device: torch.device, dtype: torch.dtype, generator: torch.Generator
) -> dispatch.SelftestRun:
    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    keys, values, q = normal(24, 16, 2, 64), normal(24, 16, 2, 64), normal(40, 4, 64)
    if dtype != torch.float32:
        values /= 64  # a result that is rounded to the other neighbour stays within the tolerance
    table = torch.randperm(24, generator=generator).int().view(3, 8).to(device)
    contexts = torch.tensor([100, 5, 77], dtype=torch.int32).to(device)
    offsets = torch.tensor([0, 1, 5, 40], dtype=torch.int32).to(device)

    def run(impl: str) -> tuple[Tensor, ...]:
        decoded = paged_attention(q[:3], keys, values, table, contexts, impl=impl)
        filled = paged_attention(
            q, keys, values, table, contexts, offsets, softcap=20.0, window=50, impl=impl
        )
        return decoded, filled

    return run


dispatch.register(OP, "reference", _prepare_reference)
dispatch.register(
    OP,
    "cpu",
    _prepare_cpu,
    native.on_cpu("PagedAttention", "BoundOp"),
    dtypes=tuple(native.DTYPE_CODES),
)
triton_support.register(OP, _prepare_triton, preference=4)
dispatch.register_selftest(OP, _selftest)
