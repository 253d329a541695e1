"""The exact KL between two distributions over the vocabulary, in one sweep over both logits.

With z = softcap(logits) / temperature, q the same of the reference, p = softmax(z):

    KL = sum_j p_j (z_j - q_j) - logsumexp(z) + logsumexp(q)
    dKL/dlogits_j = p_j ( (z_j - logsumexp(z)) - (q_j - logsumexp(q)) - KL ) dz_j/dlogits_j

The first line loses a small KL in the rounding of its three numbers. For any constant c, with
d_j = z_j - q_j - c and m = sum_j p_j d_j,

    KL = m + log1p(K - m)          K = sum_j p_j (exp(-d_j) - 1 + d_j)

whose terms are not negative (k3 of Schulman 2020, under the expectation): this is what is summed,
with c the mean of z - q over the first entries.

An entry with p_j = 0 adds nothing; q_j = 0 < p_j makes the KL infinite. No gradient flows to the
reference. Saved for backward: both logits and three numbers a row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlhf_fast_kernels import dispatch, native, reference, triton_support
from rlhf_fast_kernels.kl_rows import (
    OP,
    KLRowSettings,
    KLRowStats,
    kl_row_gradient,
    kl_row_stats,
)
from rlhf_fast_kernels.linear_arguments import plain, temperature_of, validate_softcap

FAST_DTYPES = tuple(native.DTYPE_CODES)


def _rows(x: Tensor) -> Tensor:
    """[n, V] with entries side by side: the tensor's own memory wherever a view can say so."""
    flat = x.reshape(-1, x.shape[-1])
    return flat if flat.stride(-1) == 1 or flat.shape[-1] <= 1 else flat.contiguous()


# ---- eager autograd -----------------------------------------------------------------------------


class _KLFromLogits(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        ref_logits: Tensor,
        mask: Tensor | None,
        settings: KLRowSettings,
        impl: str,
        inplace_backward: bool,
    ) -> Tensor:
        stats = kl_row_stats(impl, logits, ref_logits, settings, mask=mask)
        ctx.save_for_backward(logits, ref_logits, mask, *stats)
        ctx.settings, ctx.impl, ctx.inplace = settings, impl, inplace_backward
        ctx.consumed = False
        return stats.kl

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_kl: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.consumed:
            raise RuntimeError(
                f"{OP}: a second backward is impossible after inplace_backward=True, because the "
                "first one wrote the gradient over the logits"
            )
        logits, ref_logits, mask, *stats = ctx.saved_tensors
        out = logits.detach() if ctx.inplace else torch.empty_like(logits)
        kl_row_gradient(
            *(ctx.impl, logits, ref_logits, ctx.settings, KLRowStats(*stats), grad_kl, out),
            mask=mask,
        )
        if ctx.inplace:
            ctx.consumed = True
            # Anyone else who saved these logits for a backward must hear that they are gone.
            torch.autograd.graph.increment_version(logits)
        return out, *(None,) * 5


# ---- torch.library, for torch.compile -----------------------------------------------------------


def _settings_of(
    temperature: Tensor | None,
    scale: float,
    softcap: float | None,
    ref_softcap: float | None,
    vocab_size: int | None,
) -> KLRowSettings:
    return KLRowSettings(temperature, scale, softcap, ref_softcap, 0, vocab_size)


@torch.library.custom_op(f"rlhf_fast::{OP}", mutates_args=())
def _op(
    logits: Tensor,
    ref_logits: Tensor,
    mask: Tensor | None,
    temperature: Tensor | None,
    scale: float,
    softcap: float | None,
    ref_softcap: float | None,
    vocab_size: int | None,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    settings = _settings_of(temperature, scale, softcap, ref_softcap, vocab_size)
    kl, lse, ref_lse = kl_row_stats(impl, logits, ref_logits, settings, mask=mask)
    return kl, lse, ref_lse


@_op.register_fake
def _op_fake(logits: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    kl = torch.empty(logits.shape[0], dtype=reference.output_dtype(logits), device=logits.device)
    return kl, torch.empty_like(kl, dtype=torch.float64), torch.empty_like(kl, dtype=torch.float64)


@torch.library.custom_op(f"rlhf_fast::{OP}_backward", mutates_args=())
def _backward_op(
    logits: Tensor,
    ref_logits: Tensor,
    mask: Tensor | None,
    temperature: Tensor | None,
    scale: float,
    softcap: float | None,
    ref_softcap: float | None,
    vocab_size: int | None,
    impl: str,
    stats: list[Tensor],
    grad_kl: Tensor,
) -> Tensor:
    settings = _settings_of(temperature, scale, softcap, ref_softcap, vocab_size)
    out = torch.empty_like(logits)
    kl_row_gradient(
        *(impl, logits, ref_logits, settings, KLRowStats(*stats), grad_kl, out), mask=mask
    )
    return out


@_backward_op.register_fake
def _backward_op_fake(logits: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(logits)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:4], *output)
    ctx.rest = inputs[4:]


def _op_backward(ctx: Any, grad_kl: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    tensors, stats = ctx.saved_tensors[:4], list(ctx.saved_tensors[4:])
    return _backward_op(*tensors, *ctx.rest, stats, grad_kl), *(None,) * 8


_op.register_autograd(_op_backward, setup_context=_setup_context)


# ---- the public function ------------------------------------------------------------------------


def kl_from_logits(
    logits: Tensor,
    ref_logits: Tensor,
    *,
    mask: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    ref_softcap: float | None = None,
    vocab_size: int | None = None,
    inplace_backward: bool = False,
    impl: str | None = None,
) -> Tensor:
    """KL(softmax(z) || softmax(q)) of every row, in nats; see the module for z and q.

    Args:
        logits, ref_logits: `[..., V]`, fp32 or bf16, the two may differ (fp16 in Triton and the
            reference, fp64 in the reference). Slices of the leading dims are read where they lie
            if a 2-D view describes them.
        mask: bool `[...]`; rows where it is false are not read (they may hold NaN), yield exact 0
            and have a zero gradient.
        temperature: positive scalar or a tensor `[...]`, of both sides.
        softcap, ref_softcap: c of c tanh(logit / c), before the temperature; None: no cap.
        vocab_size: columns from there on are padding and have no probability. None: all count.
        inplace_backward: write the gradient over `logits`, which must not be a leaf nor be needed
            by anyone else. A second backward then raises. No effect under `torch.compile`.
        impl: implementation by name, see `rlhf_fast_kernels.dispatch`.

    Returns:
        `[...]` fp32 (fp64 for fp64 logits), never negative; NaN for a row with NaN, +inf or nothing
        above -inf.

    Raises:
        ValueError: shapes or devices that do not fit, a temperature or cap that is not positive;
            `inplace_backward` on a leaf or on overlapping rows. TypeError: wrong dtypes, a DTensor.
    """
    _validate(logits, ref_logits, mask)
    validate_softcap(OP, softcap)
    validate_softcap(OP, ref_softcap)
    shape = logits.shape[:-1]
    scale, per_row = temperature_of(OP, temperature, logits[..., 0] if logits.numel() else logits)
    chosen = dispatch.choose(OP, impl, logits, ref_logits)
    rows, ref_rows = _rows(logits), _rows(ref_logits.detach())
    kept = None if mask is None else mask.reshape(-1)
    if torch.compiler.is_compiling():
        kl, _, _ = _op(
            *(rows, ref_rows, kept, per_row, scale, softcap, ref_softcap, vocab_size, chosen.impl)
        )
        return kl.view(shape)
    if inplace_backward:
        _validate_inplace(logits, rows)
    settings = _settings_of(per_row, scale, softcap, ref_softcap, vocab_size)
    kl = _KLFromLogits.apply(rows, ref_rows, kept, settings, chosen.impl, inplace_backward)
    return kl.view(shape)


def _validate(logits: Tensor, ref_logits: Tensor, mask: Tensor | None) -> None:
    plain(OP, logits=logits, ref_logits=ref_logits)
    if logits.dim() < 1 or ref_logits.shape != logits.shape:
        raise ValueError(
            f"{OP}: logits and ref_logits must have one shape [..., V], got "
            f"{tuple(logits.shape)} and {tuple(ref_logits.shape)}"
        )
    for name, x in (("logits", logits), ("ref_logits", ref_logits)):
        if not x.is_floating_point():
            raise TypeError(f"{OP}: {name} must be floating point, got {x.dtype}")
    if ref_logits.device != logits.device:
        raise ValueError(f"{OP}: logits on {logits.device}, ref_logits on {ref_logits.device}")
    if logits.shape[-1] == 0 and logits.shape[:-1].numel() > 0:
        raise ValueError(f"{OP}: the vocabulary (last dim of logits) is empty")
    if mask is None:
        return
    if mask.dtype != torch.bool or mask.shape != logits.shape[:-1] or mask.device != logits.device:
        raise ValueError(
            f"{OP}: mask must be bool {tuple(logits.shape[:-1])} on {logits.device}, "
            f"got {mask.dtype} {tuple(mask.shape)} on {mask.device}"
        )


def _validate_inplace(logits: Tensor, rows: Tensor) -> None:
    if logits.is_leaf and logits.requires_grad:
        raise ValueError(f"{OP}: inplace_backward would overwrite a leaf tensor with its gradient")
    overlapping = rows.shape[0] > 1 and rows.stride(0) < rows.shape[1]
    if overlapping or rows.data_ptr() != logits.data_ptr():
        raise ValueError(
            f"{OP}: inplace_backward needs rows that a 2-D view describes and that share no memory"
        )


# ---- registration -------------------------------------------------------------------------------


def _selftest(
    device: torch.device, dtype: torch.dtype, generator: torch.Generator
) -> dispatch.SelftestRun:
    logits = (3 * torch.randn(5, 2100, generator=generator)).to(device, dtype)
    noise = 0.1 * torch.randn(5, 2100, generator=generator).to(device)
    ref_logits = (logits.float() + noise).to(dtype)
    mask = (torch.arange(5) != 2).to(device)
    upstream = torch.randn(5, generator=generator).to(device)

    def run(impl: str) -> tuple[Tensor, ...]:
        leaf = logits.clone().requires_grad_()
        kl = kl_from_logits(leaf, ref_logits, mask=mask, temperature=0.7, impl=impl)
        (upstream * kl).sum().backward()
        assert leaf.grad is not None
        # One step of bf16 lies above the self-test's tolerance: gradients are summed in fp32.
        return kl.detach(), leaf.grad.float().square().sum(-1)

    return run


def _by_name(*_: Any) -> None:
    raise RuntimeError(f"{OP}: row kernels are called by the name of the implementation")


dispatch.register(OP, "reference", _by_name)
dispatch.register(
    OP, "cpu", _by_name, native.on_cpu(f"{OP}_forward", f"{OP}_backward"), dtypes=FAST_DTYPES
)
triton_support.register(OP, _by_name, preference=4)
dispatch.register_selftest(OP, _selftest)
