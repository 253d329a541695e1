"""Moments over the true slots of a mask, and the normalisation that uses them.

    count = number of true slots     mean = sum x / count     m2 = sum (x - mean)^2
    y = (x - mean) / sqrt(m2 / count + eps)     (m2 / (count - 1) if unbiased)     (+ mean if kept)

Two passes in fp64 and a fixed order, so the result does not depend on the number of threads, and a
mean that is large against the spread costs no digits. The moments of several ranks merge (Chan,
Golub and LeVeque 1979): gather [3] from each, `merge_moments`, and pass the result as `stats`.

No gradient flows through these ops; outputs are detached.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_fast_kernels import dispatch, native, reference
from rlhf_fast_kernels.reference import output_dtype
from rlhf_fast_kernels.registry import opaque_op

FAST_DTYPES = tuple(native.DTYPE_CODES)


def _check_inputs(op: str, x: Tensor, mask: Tensor | None) -> None:
    if x.dim() not in (1, 2):
        raise ValueError(f"{op}: x has shape {tuple(x.shape)}, expected [S, R] or [N]")
    if not x.dtype.is_floating_point:
        raise TypeError(f"{op}: x must be floating point, got {x.dtype}")
    if mask is None:
        return
    if mask.dtype != torch.bool:
        raise TypeError(f"{op}: mask must be bool, got {mask.dtype}")
    if mask.shape != x.shape or mask.device != x.device:
        raise ValueError(
            f"{op}: mask has shape {tuple(mask.shape)} on {mask.device}, "
            f"expected that of x: {tuple(x.shape)} on {x.device}"
        )


def _as_rows(x: Tensor) -> tuple[int, int]:
    return (1, x.shape[0]) if x.dim() == 1 else (x.shape[0], x.shape[1])


def _masked_moments_cpu(x: Tensor, mask: Tensor | None) -> Tensor:
    out = torch.zeros(3, dtype=torch.float64)
    native.core().masked_moments(
        *_as_rows(x), native.view(x), native.mask_view(mask), out.data_ptr(), native.thread_count()
    )
    return out


def _whiten_cpu(
    x: Tensor,
    mask: Tensor | None,
    shift_mean: bool,
    unbiased: bool,
    eps: float,
    stats: Tensor | None,
) -> Tensor:
    moments = _masked_moments_cpu(x, mask) if stats is None else stats
    mean, scale = (float(y) for y in reference.mean_and_scale(moments, unbiased, eps))
    out = torch.empty(x.shape, dtype=torch.float32)
    native.core().whiten(
        *_as_rows(x),
        native.view(x),
        native.mask_view(mask),
        *(mean, scale, 0.0 if shift_mean else mean),
        out.data_ptr(),
        native.thread_count(),
    )
    return out


def _run_masked_moments(x: Tensor, mask: Tensor | None, impl: str | None) -> Tensor:
    with torch.no_grad():
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
    with torch.no_grad():
        return dispatch.choose("whiten", impl, x).function(
            x, mask, shift_mean, unbiased, eps, stats
        )


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
        moments: `[W, 3]` of `masked_moments`, merged in the order of dim 0.

    Returns:
        `[3]` `(count, mean, m2)`.
    """
    if moments.dim() != 2 or moments.shape[1] != 3:
        raise ValueError(f"merge_moments: moments has shape {tuple(moments.shape)}, want [W, 3]")
    count, mean, m2 = moments.new_zeros(3).unbind()
    for other_count, other_mean, other_m2 in moments.unbind():
        total = count + other_count
        share = other_count / total.clamp(min=1)
        difference = other_mean - mean
        m2 = m2 + other_m2 + difference.square() * count * share
        mean = mean + difference * share
        count = total
    return torch.stack([count, mean, m2])


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
        stats: `[3]` from `masked_moments` or `merge_moments`, fp32 or fp64, when the scope is
            larger than `x`; None: of `x` itself.
        impl: implementation by name, see `rlhf_fast_kernels.dispatch`.

    Returns:
        fp32 (fp64 for fp64 x), shape of x, detached, exactly 0 where the mask is false. With at
        most one true slot there is no spread: x - mean (+ mean if kept), never NaN.

    Raises:
        ValueError: shapes or devices that do not fit. TypeError: wrong dtypes.
    """
    _check_inputs("whiten", x, mask)
    if stats is not None and (stats.shape != (3,) or not stats.dtype.is_floating_point):
        raise ValueError(
            f"whiten: stats has shape {tuple(stats.shape)} and dtype {stats.dtype}, "
            "expected 3 floating-point numbers (count, mean, m2)"
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


dispatch.register("masked_moments", "reference", reference.masked_moments)
dispatch.register(
    "masked_moments",
    "cpu",
    _masked_moments_cpu,
    native.on_cpu("masked_moments"),
    dtypes=FAST_DTYPES,
)
dispatch.register_selftest("masked_moments", _selftest_moments)
dispatch.register("whiten", "reference", reference.whiten)
dispatch.register(
    "whiten", "cpu", _whiten_cpu, native.on_cpu("masked_moments", "whiten"), dtypes=FAST_DTYPES
)
dispatch.register_selftest("whiten", _selftest_whiten)
