"""The exact KL(actor || reference) of each row of logits, in one sweep of both.

With z = logits / temperature, or softcap * tanh(logits / softcap) / temperature, z' the same of the
reference's logits, and over the vocabulary j and per row:

    lse = log sum_j exp z_j          p_j = exp(z_j - lse)          (lse', q_j: of z')
    KL  = sum_j p_j log(p_j / q_j) = sum_j p_j (z_j - z'_j) - lse + lse'

Computed like that, a KL of 1e-6 is the difference of numbers of the size of the logits and drowns
in fp32. With v_j = log(q_j / p_j), and because both p and q sum to 1, it is also

    KL  = sum_j p_j (exp(v_j) - 1 - v_j)

of which no term is negative, so its relative error is that of one term. v_j is z'_j - z_j + c, with
c = lse - lse' known only after the sweep: a provisional c, off by d, gives the same sum plus
log1p(r) - r, about -d^2 / 2, with r = sum_j p_j (exp(v_j) - 1), which is added at the end.

The gradient flows to `logits` alone, the reference is frozen:

    dKL/dlogits_j = p_j (log(p_j / q_j) - KL) / temperature * (1 - tanh(logits_j / softcap)^2)

Saved for backward are both logits and three numbers a row, KL, lse and lse': backward is one read
of both and one write. Nothing of the logits' size is allocated but the gradient.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from rlhf_fast_kernels import dispatch, native, triton_support
from rlhf_fast_kernels.checked_mode import reads_values
from rlhf_fast_kernels.first_order import first_order
from rlhf_fast_kernels.kl_rows import OP, kl_row_gradient, kl_row_stats
from rlhf_fast_kernels.kl_settings import KLRowSettings, KLRowStats
from rlhf_fast_kernels.linear_arguments import plain, validate_softcap
from rlhf_fast_kernels.logit_arguments import validate_no_leaf
from rlhf_fast_kernels.logit_rows import row_layout
from rlhf_fast_kernels.registry import is_plain

FAST_DTYPES = tuple(native.DTYPE_CODES)
Scale = float | Tensor


# ---- validation ---------------------------------------------------------------------------------


def _validate(
    logits: Tensor, ref_logits: Tensor, temperature: Scale, mask: Tensor | None, vocab_size: Any
) -> None:
    plain(OP, logits=logits, ref_logits=ref_logits)
    for name, x in (("logits", logits), ("ref_logits", ref_logits)):
        if not x.is_floating_point():
            raise TypeError(f"{OP}: {name} must be floating point, got {x.dtype}")
    if logits.dim() < 1 or ref_logits.shape != logits.shape:
        raise ValueError(
            f"{OP}: logits and ref_logits must have one shape [..., V], got "
            f"{tuple(logits.shape)} and {tuple(ref_logits.shape)}"
        )
    rows, width = logits.shape[:-1], logits.shape[-1]
    if width == 0 and rows.numel() > 0:
        raise ValueError(f"{OP}: the vocabulary (last dim of logits) is empty")
    if vocab_size is not None and not 0 < vocab_size <= width:
        raise ValueError(
            f"{OP}: vocab_size must be between 1 and the last dim of logits {width}, "
            f"got {vocab_size}"
        )
    others = {"ref_logits": ref_logits, "mask": mask, "temperature": temperature}
    for name, other in others.items():
        if isinstance(other, Tensor) and other.device != logits.device:
            raise ValueError(f"{OP}: logits on {logits.device} but {name} on {other.device}")
    if mask is not None and (mask.dtype != torch.bool or mask.shape != rows):
        raise ValueError(
            f"{OP}: mask must be bool {tuple(rows)}, got {mask.dtype} {tuple(mask.shape)}"
        )
    if isinstance(temperature, Tensor) and temperature.shape not in (rows, torch.Size([])):
        raise ValueError(
            f"{OP}: a temperature tensor must have the shape of logits without the vocabulary "
            f"{tuple(rows)}, got {tuple(temperature.shape)}"
        )


def _validate_numbers(temperature: Scale, softcap: float | None, ref_softcap: float | None) -> None:
    if not isinstance(temperature, Tensor) and not 0.0 < temperature < float("inf"):
        raise ValueError(f"{OP}: temperature must be positive and finite, got {temperature}")
    validate_softcap(OP, softcap)
    validate_softcap(OP, ref_softcap)


def _validate_temperatures(temperature: Tensor | None, mask: Tensor | None) -> None:
    """Reads data; on an accelerator that would cost a synchronisation."""
    if temperature is None:
        return
    wrong = ~((temperature > 0) & torch.isfinite(temperature))
    if mask is not None:
        wrong = wrong & mask
    if wrong.any():
        row = tuple(int(i) for i in wrong.nonzero()[0])
        raise ValueError(
            f"{OP}: temperature {float(temperature[row])} at row {row} must be positive and finite"
        )


def _validate_inplace(logits: Tensor, ref_logits: Tensor) -> None:
    validate_no_leaf(OP, logits)
    layout = row_layout(logits)
    if layout is None:
        raise ValueError(f"{OP}: inplace_backward needs rows contiguous at one or two strides")
    width = logits.shape[-1]
    if any(n > 1 and stride < width for n, stride in zip(layout[:2], layout[2:], strict=True)):
        raise ValueError(f"{OP}: inplace_backward needs rows that do not share memory")
    if logits.untyped_storage().data_ptr() == ref_logits.untyped_storage().data_ptr():
        raise ValueError(f"{OP}: inplace_backward would overwrite ref_logits, in the same storage")


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
        ctx.save_for_backward(logits, ref_logits, mask, settings.temperature, *stats)
        ctx.settings, ctx.impl = settings._replace(temperature=None), impl
        ctx.inplace_backward, ctx.consumed = inplace_backward, False
        return stats.kl

    @staticmethod
    @first_order(OP)
    def backward(ctx: Any, grad_kl: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.consumed:
            raise RuntimeError(
                f"{OP}: a second backward is impossible after inplace_backward=True, because the "
                "first one wrote the gradient over the logits; use inplace_backward=False with "
                "retain_graph=True"
            )
        logits, ref_logits, mask, temperature, *stats = ctx.saved_tensors
        settings = ctx.settings._replace(temperature=temperature)
        out = logits.detach() if ctx.inplace_backward else _new_gradient(logits)
        _gradient(ctx.impl, logits, ref_logits, mask, settings, KLRowStats(*stats), grad_kl, out)
        if ctx.inplace_backward:
            ctx.consumed = True
            # Anyone else who saved these logits for a backward must hear that they are gone.
            torch.autograd.graph.increment_version(logits)
        return out, *(None,) * 5


def _new_gradient(logits: Tensor) -> Tensor:
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


def _gradient(
    impl: str,
    logits: Tensor,
    ref_logits: Tensor,
    mask: Tensor | None,
    settings: KLRowSettings,
    stats: KLRowStats,
    grad_kl: Tensor,
    out: Tensor,
) -> None:
    kl_row_gradient(impl, logits, ref_logits, settings, stats, grad_kl, out, mask=mask)


# ---- torch.library, for torch.compile -----------------------------------------------------------


@torch.library.custom_op("rlhf_fast::kl_from_logits", mutates_args=())
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
    settings = KLRowSettings(temperature, scale, softcap, ref_softcap, 0, vocab_size)
    if reads_values(logits):
        _validate_temperatures(temperature, mask)
    return tuple(kl_row_stats(impl, logits, ref_logits, settings, mask=mask))  # type: ignore[return-value]


@_op.register_fake
def _op_fake(logits: Tensor, ref_logits: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.float64 in (logits.dtype, ref_logits.dtype)
    kind = torch.float64 if wide else torch.float32
    kl = torch.empty(logits.shape[:-1], dtype=kind, device=logits.device)
    lse = torch.empty_like(kl, dtype=torch.float64)
    return kl, lse, torch.empty_like(lse)


@torch.library.custom_op("rlhf_fast::kl_from_logits_backward", mutates_args=())
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
    kl: Tensor,
    lse: Tensor,
    ref_lse: Tensor,
    grad_kl: Tensor,
) -> Tensor:
    settings = KLRowSettings(temperature, scale, softcap, ref_softcap, 0, vocab_size)
    out = _new_gradient(logits)
    stats = KLRowStats(kl, lse, ref_lse)
    _gradient(impl, logits, ref_logits, mask, settings, stats, grad_kl, out)
    return out


@_backward_op.register_fake
def _backward_op_fake(logits: Tensor, *_: Any) -> Tensor:
    return _new_gradient(logits)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, scale, softcap, ref_softcap, vocab_size, impl = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.scalars = (scale, softcap, ref_softcap, vocab_size, impl)


def _op_backward(ctx: Any, grad_kl: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    *tensors, kl, lse, ref_lse = ctx.saved_tensors
    grad = _backward_op(*tensors, *ctx.scalars, kl, lse, ref_lse, grad_kl)
    return grad, *(None,) * 8


_op.register_autograd(_op_backward, setup_context=_setup_context)


# ---- the public function ------------------------------------------------------------------------


def kl_from_logits(
    logits: Tensor,
    ref_logits: Tensor,
    *,
    temperature: Scale = 1.0,
    softcap: float | None = None,
    ref_softcap: float | None = None,
    mask: Tensor | None = None,
    vocab_size: int | None = None,
    inplace_backward: bool = False,
    impl: str | None = None,
) -> Tensor:
    """KL(softmax(logits / T) || softmax(ref_logits / T)) of each row, in nats.

    Args:
        logits: `[..., V]` of the actor, fp32 or bf16, on an accelerator also fp16 (the PyTorch
            reference takes any). Slices and transposes of the leading dims are read where they lie.
        ref_logits: `[..., V]` of the frozen reference; its dtype may differ. No gradient.
        temperature: positive scalar, or a tensor `[...]`; divides both sides. No gradient.
        softcap: z = softcap * tanh(logits / softcap) / temperature, as Gemma has it. A logit at
            -inf is then at -softcap.
        ref_softcap: the same of the reference's logits.
        mask: bool `[...]`. Rows where it is false are not read (they may hold NaN), yield exact 0
            and have a zero gradient. Rows whose upstream gradient is 0 are not read in backward.
        vocab_size: ids that exist. Columns from there on (padding of the embedding) are not read
            and have a zero gradient. Default: all columns.
        inplace_backward: write the gradient over `logits`, which must not be needed by anyone
            else. A second backward then raises. Has no effect under `torch.compile`.
        impl: implementation by name, see `rlhf_fast_kernels.dispatch`.

    Returns:
        `[...]`, fp32 (fp64 if an input is fp64), never negative. An entry at -inf in
        `logits`, where p is 0, adds nothing; one at -inf in `ref_logits` alone gives +inf, and
        then the row's gradient is NaN. A row that holds NaN or +inf, or a side with
        nothing above -inf, yields NaN.

    Raises:
        TypeError: logits that are not floating point, a DTensor.
        ValueError: shapes, devices or the mask's dtype do not fit; a number out of range; on the
            CPU also a temperature that is not positive. `inplace_backward` on a leaf, on
            overlapping rows or over the storage of `ref_logits`.
        RuntimeError: second backward after `inplace_backward`.
    """
    _validate(logits, ref_logits, temperature, mask, vocab_size)
    _validate_numbers(temperature, softcap, ref_softcap)
    ref_logits = ref_logits.detach()
    per_row, scale = None, 1.0
    if isinstance(temperature, Tensor):
        per_row = temperature.detach().expand(logits.shape[:-1])
    else:
        scale = float(temperature)
    settings = KLRowSettings(per_row, scale, softcap, ref_softcap, 0, vocab_size)
    chosen = dispatch.choose(OP, impl, logits, ref_logits)
    if torch.compiler.is_compiling() or not is_plain((logits, ref_logits, mask, per_row)):
        kl: Tensor = _op(logits, ref_logits, mask, *settings[:4], settings.vocab_size, chosen.impl)[
            0
        ]
        return kl
    if reads_values(logits):
        _validate_temperatures(per_row, mask)
    if inplace_backward:
        _validate_inplace(logits, ref_logits)
    kl = chosen.function(logits, ref_logits, mask, settings, inplace_backward)
    return kl  # noqa: RET504 (the name carries the type)


# ---- implementations ----------------------------------------------------------------------------


def _run(
    impl: str,
    logits: Tensor,
    ref_logits: Tensor,
    mask: Tensor | None,
    settings: KLRowSettings,
    inplace_backward: bool,
) -> Tensor:
    kl: Tensor = _KLFromLogits.apply(logits, ref_logits, mask, settings, impl, inplace_backward)
    return kl


def _selftest(
    device: torch.device, dtype: torch.dtype, generator: torch.Generator
) -> dispatch.SelftestRun:
    logits = (3 * torch.randn(5, 1027, generator=generator)).to(device, dtype)
    noise = torch.randn(5, 1027, generator=generator).to(device, dtype)
    ref_logits = logits + torch.tensor([1e-3, 0.1, 0.5, 1.0, 3.0]).to(noise).unsqueeze(-1) * noise
    mask = torch.tensor([True, True, False, True, True], device=device)
    upstream = torch.randn(5, generator=generator).to(device)

    def run(impl: str) -> tuple[Tensor, ...]:
        leaf = logits.clone().requires_grad_()
        kl = kl_from_logits(leaf, ref_logits, temperature=0.7, mask=mask, impl=impl)
        (upstream * kl).sum().backward()
        assert leaf.grad is not None
        # One step of bf16 lies above the self-test's tolerance: gradients are summed in fp32.
        return kl.detach(), leaf.grad.float().square().sum(-1)

    return run


dispatch.register(OP, "reference", partial(_run, "reference"))
dispatch.register(
    OP,
    "cpu",
    partial(_run, "cpu"),
    native.on_cpu(f"{OP}_forward", f"{OP}_backward"),
    dtypes=FAST_DTYPES,
)
# Above CUDA: on [tokens, vocab] a launch costs nothing beside the work.
triton_support.register(OP, partial(_run, "triton"), preference=4)
dispatch.register_selftest(OP, _selftest)
