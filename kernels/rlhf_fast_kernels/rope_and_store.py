"""Norm and rotation of queries and keys; keys and values into the pages of the cache.

For every token n and head, with R the width of the tables (at most D):

    x  <- weight * round(x / sqrt(mean(x^2) + eps))                 where a norm is given (Qwen3)
    x  <- x cos + rotate_half(x) sin      of the first R entries    where tables are given
    rotate_half(x) = (-x[R/2:R], x[:R/2]),  cos, sin = row positions[n] of the tables

as transformers computes it (the layout of halves, `cos = cat(freqs, freqs).cos()`), in fp32 and
rounded to the dtype once after the norm and once after the rotation. q changes in place; k goes,
with v as it is, to page `slots[n] // page_size`, slot `slots[n] % page_size`.
"""

from __future__ import annotations

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

OP = "rope_and_store"
# (q, k, v, key_pages, value_pages, q_norm, k_norm)
Run = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None], None]


class Call(NamedTuple):
    """The checked arguments; the first seven stand for those of every layer."""

    q: Tensor
    k: Tensor
    v: Tensor
    key_pages: Tensor
    value_pages: Tensor
    q_norm: Tensor | None
    k_norm: Tensor | None
    slots: Tensor
    positions: Tensor | None
    cos: Tensor | None
    sin: Tensor | None
    norm_eps: float


# ---- launchers ----------------------------------------------------------------------------------


def _prepare_reference(call: Call) -> Run:
    def run(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        key_pages: Tensor,
        value_pages: Tensor,
        q_norm: Tensor | None,
        k_norm: Tensor | None,
    ) -> None:
        reference.rope_and_store(
            *(q, k, v, key_pages, value_pages, call.slots),
            positions=call.positions,
            cos=call.cos,
            sin=call.sin,
            q_norm=q_norm,
            k_norm=k_norm,
            norm_eps=call.norm_eps,
        )

    return run


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _prepare_cpu(call: Call) -> Run:
    tokens, heads, width = call.q.shape
    _, page_size, kv_heads, _ = call.key_pages.shape
    tables = (call.cos, call.sin)
    store = native.core().RopeAndStore(
        native.DTYPE_CODES[call.q.dtype],
        (tokens, heads, kv_heads, width, 0 if call.cos is None else call.cos.shape[1], page_size),
        (*map(strides_of, call[:5]), *(0 if x is None else x.stride(0) for x in tables)),
        (call.slots.data_ptr(), *map(_address, (call.positions, *tables))),
        call.norm_eps,
    )
    return _OnCpu(store, native.thread_count())


class _OnCpu:
    """`_core.RopeAndStore` for tensors."""

    __slots__ = ("_store", "_threads")

    def __init__(self, store: Any, threads: int) -> None:
        self._store, self._threads = store, threads

    def __call__(self, *tensors: Tensor | None) -> None:
        self._store(*map(_address, tensors), self._threads)

    def bind(self, *tensors: Tensor | None) -> Callable[[], None]:
        """The call without arguments."""
        bound: Callable[[], None] = self._store.bind(*map(_address, tensors), self._threads)
        return bound


def _prepare_triton(call: Call) -> Run:
    kernels = triton_support.kernels(OP)
    run: Run = kernels.prepare(call)
    return run


# ---- arguments ----------------------------------------------------------------------------------


def _check_tensors(call: Call) -> None:
    q, k = call.q, call.k
    check_heads(OP, "q", q, q)
    for name, x in (("k", k), ("v", call.v)):
        check_heads(OP, name, x, q)
        if len(x) != len(q) or x.shape != k.shape:
            found = f"q {list(q.shape)}, k {list(k.shape)}, v {list(call.v.shape)}"
            raise ValueError(f"{OP}: {found}; expected as many tokens, and k like v")
    for name, x in (("key_pages", call.key_pages), ("value_pages", call.value_pages)):
        check_pages(OP, name, x, q)
        if x.shape[2] != k.shape[1] or x.shape != call.key_pages.shape:
            found = f"{list(x.shape)}, k {list(k.shape)}"
            raise ValueError(f"{OP}: {name} is {found}; expected as many heads, and equal pages")
    check_index(OP, "slots", call.slots, torch.int64, (len(q),), q)
    for name, weight in (("q_norm", call.q_norm), ("k_norm", call.k_norm)):
        if weight is not None:
            check_index(OP, name, weight, q.dtype, (q.shape[-1],), q)


def _check_tables(call: Call) -> None:
    given = [x is not None for x in (call.positions, call.cos, call.sin)]
    if any(given) and not all(given):
        raise ValueError(f"{OP}: expected positions, cos and sin together, or none of them")
    if call.positions is None or call.cos is None or call.sin is None:
        return
    check_index(OP, "positions", call.positions, torch.int64, (len(call.q),), call.q)
    check_dims(OP, "cos", call.cos, "[P, R]", 2)
    wide = torch.float64 if call.q.dtype == torch.float64 else torch.float32
    for name, x in (("cos", call.cos), ("sin", call.sin)):
        check_index(OP, name, x, wide, tuple(call.cos.shape), call.q)
    width = call.cos.shape[1]
    if width % 2 != 0 or not 2 <= width <= call.q.shape[-1]:
        expected = f"[P, R] with R even and at most {call.q.shape[-1]}"
        raise ValueError(f"{OP}: cos is {list(call.cos.shape)}; expected {expected}")


def _check_values(call: Call) -> None:
    pages, page_size = call.key_pages.shape[:2]
    check_range(OP, "slots", call.slots, -1, pages * page_size - 1)
    if call.positions is not None and call.cos is not None:
        check_range(OP, "positions", call.positions, 0, len(call.cos) - 1)


# ---- the public functions -----------------------------------------------------------------------


class RopeAndStore:
    """`rope_and_store` made ready for many layers.

    `store(q, k, v, key_pages, value_pages, q_norm, k_norm)`: tensors of the shapes, strides, dtypes
    and device of those given here, norms given or not as here; nothing is checked again. The
    values of slots and positions are read at each call. With `validate=False` they are never looked
    at.
    """

    __slots__ = ("_call", "_run")

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        key_pages: Tensor,
        value_pages: Tensor,
        slots: Tensor,
        *,
        positions: Tensor | None = None,
        cos: Tensor | None = None,
        sin: Tensor | None = None,
        q_norm: Tensor | None = None,
        k_norm: Tensor | None = None,
        norm_eps: float = 1e-6,
        validate: bool = True,
        impl: str | None = None,
    ) -> None:
        """Arguments as for `rope_and_store`."""
        layer = (q, k, v, key_pages, value_pages, q_norm, k_norm)
        self._call = Call(*layer, slots, positions, cos, sin, norm_eps)
        refuse_wrappers(OP, **{k: x for k, x in self._call._asdict().items() if k != "norm_eps"})
        _check_tensors(self._call)
        _check_tables(self._call)
        if not norm_eps >= 0:
            raise ValueError(f"{OP}: norm_eps is {norm_eps}; expected at least 0")
        chosen = dispatch.choose(OP, impl, q, k, v, key_pages, value_pages)
        if validate and reads_values(q):
            _check_values(self._call)
        self._run: Run = chosen.function(self._call)

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        key_pages: Tensor,
        value_pages: Tensor,
        q_norm: Tensor | None = None,
        k_norm: Tensor | None = None,
    ) -> None:
        """Changes q, key_pages and value_pages."""
        if q.shape[0] > 0:
            self._run(q, k, v, key_pages, value_pages, q_norm, k_norm)

    def bind(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        key_pages: Tensor,
        value_pages: Tensor,
        q_norm: Tensor | None = None,
        k_norm: Tensor | None = None,
    ) -> Callable[[], object]:
        """The call without arguments, for tensors that stay where they are and are kept alive."""
        bind = self._run.bind if isinstance(self._run, _OnCpu) else partial(partial, self)
        return bind(q, k, v, key_pages, value_pages, q_norm, k_norm)


def rope_and_store(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    slots: Tensor,
    *,
    positions: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    norm_eps: float = 1e-6,
    impl: str | None = None,
) -> None:
    """Norm, rotate, store; q changes in place. No gradient.

    Args:
        q: `[N, Hq, D]`, D at most 256; fp32 and bf16 everywhere, fp16 also on a GPU (others run in
            the reference). Any strides of tokens and heads.
        k, v: `[N, Hkv, D]` likewise; they stay as they are.
        key_pages, value_pages: `[pages, page_size, Hkv, D]` in q's dtype, any strides of the first
            three dims.
        slots: `[N]` int64, page * page_size + slot in it; -1 stores nothing. No slot twice.
        positions: `[N]` int64, row of the tables; with cos and sin, or none of the three.
        cos, sin: `[P, R]` fp32 (fp64 for fp64), R even and at most D. None: no rotation.
        q_norm, k_norm: `[D]` in q's dtype, weights of an RMS norm over each head.
        norm_eps: added to the mean square.
        impl: implementation by name, see `rlhf_fast_kernels.dispatch`.

    Raises:
        ValueError, TypeError: shape, dtype, device or value of an argument. Slots and positions out
            of range are found on the CPU alone (and with RLHF_FAST_CHECK=1).
    """
    store = RopeAndStore(
        *(q, k, v, key_pages, value_pages, slots),
        positions=positions,
        cos=cos,
        sin=sin,
        q_norm=q_norm,
        k_norm=k_norm,
        norm_eps=norm_eps,
        impl=impl,
    )
    store(q, k, v, key_pages, value_pages, q_norm, k_norm)


def _selftest(
    device: torch.device, dtype: torch.dtype, generator: torch.Generator
) -> dispatch.SelftestRun:
    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    q, k, v = normal(9, 4, 64), normal(9, 2, 64), normal(9, 2, 64)
    angles = torch.randn(32, 64, generator=generator).to(device)
    slots = torch.randperm(32, generator=generator)[:9].to(device)
    positions = torch.arange(9).to(device)
    norms = normal(64), normal(64)

    def run(impl: str) -> tuple[Tensor, ...]:
        rotated, keys, values = q.clone(), torch.zeros_like(q).new_zeros(8, 4, 2, 64), None
        values = torch.zeros_like(keys)
        rope_and_store(
            *(rotated, k, v, keys, values, slots),
            positions=positions,
            cos=angles.cos(),
            sin=angles.sin(),
            q_norm=norms[0] if dtype == torch.float32 else None,
            k_norm=norms[1] if dtype == torch.float32 else None,
            impl=impl,
        )
        return rotated, keys, values

    return run


dispatch.register(OP, "reference", _prepare_reference)
dispatch.register(
    OP,
    "cpu",
    _prepare_cpu,
    native.on_cpu("RopeAndStore", "BoundOp"),
    dtypes=tuple(native.DTYPE_CODES),
)
triton_support.register(OP, _prepare_triton, preference=4)
dispatch.register_selftest(OP, _selftest)
