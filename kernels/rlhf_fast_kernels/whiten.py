"""Moments over the true slots of a mask, and the normalisation that uses them.

    count = number of true slots     mean = sum x / count     m2 = sum (x - mean)^2
    y = (x - mean) / sqrt(m2 / count + eps)     (m2 / (count - 1) if unbiased)     (+ mean if kept)

In fp64 and a fixed order, so the result does not depend on the number of threads, and a mean that
is large against the spread costs no digits. Moments of disjoint sets (chunks, sequences, ranks)
merge: with N = sum n_i, mean = sum n_i mean_i / N, m2 = sum m2_i + n_i (mean_i - mean)^2
(Chan, Golub and LeVeque 1979, for many sets at once). `whiten` merges what it is given as `stats`
where it lies: on an accelerator the host never waits for the moments.

No gradient flows through these ops; outputs are detached.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_fast_kernels import dispatch, native, reference, triton_support
from rlhf_fast_kernels.gae_arguments import check_mask
from rlhf_fast_kernels.reference import output_dtype
from rlhf_fast_kernels.registry import opaque_op

FAST_DTYPES = tuple(native.DTYPE_CODES)


def _check_inputs(op: str, x: Tensor, mask: Tensor | None) -> None:
    if x.dim() not in (1, 2):
        raise ValueError(f"{op}: x has shape {tuple(x.shape)}, expected [S, R] or [N]")
    if not x.dtype.is_floating_point:
        raise TypeError(f"{op}: x must be floating point, got {x.dtype}")
    if mask is not None:
        check_mask(op, mask, x, "x")


# ---- C++ and CUDA C++ ---------------------------------------------------------------------------


def _as_rows(x: Tensor) -> tuple[int, int]:
    return (1, x.shape[0]) if x.dim() == 1 else (x.shape[0], x.shape[1])


def _new_moments(x: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float64, device=x.device)


def _dense_stats(x: Tensor, stats: Tensor) -> Tensor:
    """As the kernels read them; on another device they are copied, and the host waits."""
    return stats.detach().to(x.device, torch.float64).contiguous()


def _new_partials(x: Tensor) -> Tensor:
    """Room for the moments of every chunk."""
    chunk = native.core().MOMENTS_CHUNK
    return _new_moments(x, (x.numel() + chunk - 1) // chunk, 3)


def _run_moments(
    x: Tensor, mask: Tensor | None, partials: Tensor | None, out: Tensor | None
) -> None:
    """Moments of x into `out`, on CUDA by way of those of the chunks, where it may end."""
    native.core().masked_moments(
        *_as_rows(x),
        native.view(x),
        native.mask_view(mask),
        0 if partials is None else partials.data_ptr(),
        0 if out is None else out.data_ptr(),
        native.placement(x.device),
    )


def _masked_moments_native(x: Tensor, mask: Tensor | None) -> Tensor:
    out = _new_moments(x, 3)
    _run_moments(x, mask, None if x.device.type == "cpu" else _new_partials(x), out)
    return out


def _whiten_native(
    x: Tensor,
    mask: Tensor | None,
    shift_mean: bool,
    unbiased: bool,
    eps: float,
    stats: Tensor | None,
) -> Tensor:
    on_cpu = x.device.type == "cpu"
    if stats is not None:
        moments = _dense_stats(x, stats)
    elif on_cpu:
        moments = _masked_moments_native(x, mask)
    else:
        moments = _new_partials(x)
        _run_moments(x, mask, moments, None)
    merged = None if on_cpu else _new_moments(x, 3)
    out = torch.empty_like(x, dtype=torch.float32, memory_format=torch.contiguous_format)
    native.core().whiten(
        *_as_rows(x),
        native.view(x),
        native.mask_view(mask),
        (moments.data_ptr(), moments.numel() // 3, 0 if merged is None else merged.data_ptr()),
        shift_mean,
        unbiased,
        eps,
        out.data_ptr(),
        native.placement(x.device),
    )
    return out


# ---- Triton -------------------------------------------------------------------------------------


def _layout(x: Tensor, mask: Tensor | None) -> tuple[int, ...]:
    """Elements, columns, strides of x and of the mask; `[N]` is one row."""
    strides = [0, 0] if mask is None else [*mask.stride()]
    return (
        *(x.numel(), max(1, x.shape[-1])),
        *([0, 0, *x.stride()][-2:]),
        *([0, 0, *strides][-2:]),
    )


def _partials_triton(x: Tensor, mask: Tensor | None) -> Tensor:
    kernels = triton_support.kernels("whiten")
    chunks = (x.numel() + kernels.CHUNK - 1) // kernels.CHUNK
    partials = _new_moments(x, chunks, 3)
    if chunks:
        triton_support.launch(
            kernels.moments_kernel,
            chunks,
            x.device,
            *(x, mask, partials, *_layout(x, mask)),
            BLOCK=kernels.CHUNK,
            num_warps=kernels.NUM_WARPS,
        )
    return partials


def _merge_triton(partials: Tensor) -> Tensor:
    kernels = triton_support.kernels("whiten")
    out = _new_moments(partials, 3)
    triton_support.launch(
        kernels.merge_kernel,
        1,
        out.device,
        *(partials, out, partials.numel() // 3),
        BLOCK=kernels.MERGE_BLOCK,
        num_warps=kernels.NUM_WARPS,
    )
    return out


def _masked_moments_triton(x: Tensor, mask: Tensor | None) -> Tensor:
    return _merge_triton(_partials_triton(x, mask))


def _whiten_triton(
    x: Tensor,
    mask: Tensor | None,
    shift_mean: bool,
    unbiased: bool,
    eps: float,
    stats: Tensor | None,
) -> Tensor:
    kernels = triton_support.kernels("whiten")
    moments = _partials_triton(x, mask) if stats is None else _dense_stats(x, stats)
    if moments.numel() > 3 * kernels.MERGE_INLINE:
        moments = _merge_triton(moments)
    out = torch.empty_like(x, dtype=torch.float32, memory_format=torch.contiguous_format)
    if x.numel():
        triton_support.launch(
            kernels.whiten_kernel,
            (x.numel() + kernels.CHUNK - 1) // kernels.CHUNK,
            x.device,
            *(x, mask, moments, out, *_layout(x, mask), moments.numel() // 3, eps),
            SHIFT_MEAN=shift_mean,
            UNBIASED=unbiased,
            MERGE=kernels.MERGE_BLOCK,
            BLOCK=kernels.CHUNK,
            num_warps=kernels.NUM_WARPS,
        )
    return out


# ---- torch.library ------------------------------------------------------------------------------


def _run_masked_moments(x: Tensor, mask: Tensor | None, impl: str | None) -> Tensor:
    return dispatch.choose("masked_moments", impl, x).function(x, mask)


def _run_whiten(
    x: Tensor,
    mask: Tensor | None,
    shift_mean: bool,
    unbiased: bool,
    eps: float,
    stats: Tensor | None,
    impl: str | None,
) -> Tensor:
    return dispatch.choose("whiten", impl, x).function(x, mask, shift_mean, unbiased, eps, stats)


_masked_moments = opaque_op(
    "masked_moments",
    _run_masked_moments,
    lambda x, mask, impl: torch.empty(3, dtype=reference.moments_dtype(x), device=x.device),
)
_whiten = opaque_op(
    "whiten",
    _run_whiten,
    lambda x, *_: torch.empty(x.shape, dtype=output_dtype(x), device=x.device),
)


# ---- public functions ---------------------------------------------------------------------------


def masked_moments(x: Tensor, mask: Tensor | None, *, impl: str | None = None) -> Tensor:
    """Count, mean and sum of squared deviations over the true slots.

    Args:
        x: `[S, R]` or `[N]`, floating point, any strides.
        mask: bool of the same shape; None: every slot counts.
        impl: implementation by name, see `rlhf_fast_kernels.dispatch`.

    Returns:
        `[3]` fp64 (fp32 on devices without it): `(count, mean, m2)`; zeros if no slot is true.
    """
    _check_inputs("masked_moments", x, mask)
    return _masked_moments(x, mask, impl)  # type: ignore[return-value]


def merge_moments(moments: Tensor) -> Tensor:
    """Moments of the union of disjoint sets.

    Args:
        moments: `[W, 3]`: of W ranks by `masked_moments`, or of W sequences by `rewards_and_gae`.

    Returns:
        `[3]` `(count, mean, m2)`.
    """
    if moments.dim() != 2 or moments.shape[1] != 3:
        raise ValueError(f"merge_moments: moments has shape {tuple(moments.shape)}, want [W, 3]")
    return reference.merge_moments(moments)


def whiten(
    x: Tensor,
    mask: Tensor | None,
    *,
    shift_mean: bool = True,
    unbiased: bool = False,
    eps: float = 1e-8,
    stats: Tensor | None = None,
    impl: str | None = None,
) -> Tensor:
    """x scaled to unit variance, and to mean 0 unless the mean is kept, over the true slots.

    Args:
        x: `[S, R]` or `[N]`, floating point, any strides.
        mask: bool of the same shape; None: every slot counts.
        shift_mean: False keeps the mean.
        unbiased: divide m2 by count - 1 instead of count.
        eps: added to the variance.
        stats: `[3]` from `masked_moments` or `merge_moments`, when the scope is larger than `x`, or
            `[W, 3]` of disjoint sets, which are merged, such as `rewards_and_gae(...).moments`;
            fp32 or fp64; None: of `x` itself.
        impl: implementation by name, see `rlhf_fast_kernels.dispatch`.

    Returns:
        fp32 (fp64 for fp64 x), shape of x, detached, exactly 0 where the mask is false. With at
        most one true slot there is no spread: x - mean (+ mean if kept), never NaN.

    Raises:
        ValueError: shapes or devices that do not fit. TypeError: wrong dtypes.
    """
    _check_inputs("whiten", x, mask)
    if stats is not None and (
        stats.dim() not in (1, 2) or stats.shape[-1] != 3 or not stats.dtype.is_floating_point
    ):
        raise ValueError(
            f"whiten: stats has shape {tuple(stats.shape)} and dtype {stats.dtype}, "
            "expected [3] or [W, 3] floating-point numbers (count, mean, m2)"
        )
    return _whiten(x, mask, shift_mean, unbiased, float(eps), stats, impl)  # type: ignore[return-value]


def _selftest_inputs(
    device: torch.device, dtype: torch.dtype, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    x = torch.randn(7, 500, generator=generator) + 3.0
    return x.to(device, dtype), (torch.rand(7, 500, generator=generator) < 0.7).to(device)


def _selftest_moments(
    device: torch.device, dtype: torch.dtype, generator: torch.Generator
) -> dispatch.SelftestRun:
    x, mask = _selftest_inputs(device, dtype, generator)
    return lambda impl: (masked_moments(x, mask, impl=impl),)


def _selftest_whiten(
    device: torch.device, dtype: torch.dtype, generator: torch.Generator
) -> dispatch.SelftestRun:
    x, mask = _selftest_inputs(device, dtype, generator)
    return lambda impl: (whiten(x, mask, impl=impl),)


dispatch.register("masked_moments", "reference", torch.no_grad()(reference.masked_moments))
dispatch.register("whiten", "reference", torch.no_grad()(reference.whiten))
for _op, _native, _triton, _needs, _case in (
    (
        "masked_moments",
        _masked_moments_native,
        _masked_moments_triton,
        ("masked_moments", "MOMENTS_CHUNK"),
        _selftest_moments,
    ),
    (
        "whiten",
        _whiten_native,
        _whiten_triton,
        ("whiten", "masked_moments", "MOMENTS_CHUNK"),
        _selftest_whiten,
    ),
):
    dispatch.register(_op, "cpu", _native, native.on_cpu(*_needs), dtypes=FAST_DTYPES)
    dispatch.register(_op, "cuda", _native, native.on_cuda(*_needs), dtypes=FAST_DTYPES)
    triton_support.register(_op, _triton)
    dispatch.register_selftest(_op, _case)
