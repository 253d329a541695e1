"""Log-probability of the label and entropy of the distribution, in one read of the logits.

With z = logits / temperature, over the vocabulary j and per row:

    m    = max_j z_j                        lse = m + log sum_j exp(z_j - m)
    logp = z_label - lse                    p_j = exp(z_j - lse)
    H    = - sum_j p_j log p_j = lse - sum_j p_j z_j

and for upstream gradients g = dL/dlogp, h = dL/dH (dlogp/dz_j = [j = label] - p_j and
dH/dz_j = -p_j (log p_j + H), because sum_j p_j log p_j = -H):

    dL/dlogits_j = ( g ([j = label] - p_j) - h p_j (z_j - lse + H) ) / temperature

Saved for backward are the logits themselves and two numbers a row, lse (fp64) and H: backward is
one read and one write, and nothing of the logits' size is allocated but the gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlhf_fast_kernels import dispatch, native, reference
from rlhf_fast_kernels.logit_rows import (
    OP,
    addressable,
    validate,
    validate_data,
    validate_inplace,
)

FAST_DTYPES = tuple(native.DTYPE_CODES)


# ---- C++ launchers ------------------------------------------------------------------------------


def _pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _per_row(temperature: Tensor | None) -> Tensor | None:
    return None if temperature is None else temperature.to(torch.float32).contiguous()


def _forward_cpu(
    logits: Tensor,
    labels: Tensor,
    temperature: Tensor | None,
    scale: float,
    with_entropy: bool,
    ignore_index: int,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """(logprobs f32, entropy f32 or None, lse f64), each of labels' shape."""
    logprobs = torch.empty(labels.shape, dtype=torch.float32)
    entropy = torch.empty_like(logprobs) if with_entropy else None
    lse = torch.empty(labels.shape, dtype=torch.float64)
    if labels.numel() == 0:
        return logprobs, entropy, lse
    logits, layout = addressable(logits.detach())
    labels, per_row = labels.contiguous(), _per_row(temperature)
    native.core().logprobs_from_logits_forward(
        logits.data_ptr(),
        native.DTYPE_CODES[logits.dtype],
        layout,
        logits.shape[-1],
        labels.data_ptr(),
        ignore_index,
        _pointer(per_row),
        scale,
        native.thread_count(),
        logprobs.data_ptr(),
        _pointer(entropy),
        lse.data_ptr(),
    )
    return logprobs, entropy, lse


def _backward_cpu(
    logits: Tensor,
    labels: Tensor,
    temperature: Tensor | None,
    scale: float,
    ignore_index: int,
    entropy: Tensor | None,
    lse: Tensor,
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    in_place: bool,
) -> Tensor:
    """The gradient of the logits: a new contiguous tensor, or the logits' own storage."""
    logits = logits.detach()
    logits, layout = addressable(logits)
    if in_place:
        grad, grad_strides = logits, layout[2:]
    else:
        vocab = logits.shape[-1]
        grad = torch.empty(logits.shape, dtype=logits.dtype)
        grad_strides = (layout[1] * vocab, vocab)
    if grad.numel() == 0:
        return grad
    labels, per_row = labels.contiguous(), _per_row(temperature)
    g = None if grad_logprobs is None else grad_logprobs.to(torch.float32).contiguous()
    h = None if grad_entropy is None else grad_entropy.to(torch.float32).contiguous()
    native.core().logprobs_from_logits_backward(
        logits.data_ptr(),
        native.DTYPE_CODES[logits.dtype],
        layout,
        logits.shape[-1],
        labels.data_ptr(),
        ignore_index,
        _pointer(per_row),
        scale,
        native.thread_count(),
        _pointer(entropy),
        lse.data_ptr(),
        _pointer(g),
        _pointer(h),
        grad.data_ptr(),
        grad_strides,
    )
    return grad


# ---- eager autograd -----------------------------------------------------------------------------


class _LogprobsFromLogits(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        labels: Tensor,
        temperature: Tensor | None,
        scale: float,
        with_entropy: bool,
        ignore_index: int,
        inplace_backward: bool,
    ) -> tuple[Tensor, Tensor | None]:
        logprobs, entropy, lse = _forward_cpu(
            logits, labels, temperature, scale, with_entropy, ignore_index
        )
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(logits, labels, temperature, entropy, lse)
        ctx.scale, ctx.ignore_index = scale, ignore_index
        ctx.inplace_backward, ctx.consumed = inplace_backward, False
        return logprobs, entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        if ctx.consumed:
            raise RuntimeError(
                f"{OP}: a second backward is impossible after inplace_backward=True, because the "
                "first one wrote the gradient over the logits; use inplace_backward=False with "
                "retain_graph=True"
            )
        nothing = (None,) * 6
        if grad_logprobs is None and grad_entropy is None:
            return None, *nothing
        logits, labels, temperature, entropy, lse = ctx.saved_tensors
        grad = _backward_cpu(
            logits,
            labels,
            temperature,
            ctx.scale,
            ctx.ignore_index,
            entropy,
            lse,
            grad_logprobs,
            grad_entropy,
            ctx.inplace_backward,
        )
        if ctx.inplace_backward:
            ctx.consumed = True
            # Anyone else who saved these logits for a backward must hear that they are gone.
            torch.autograd.graph.increment_version(logits)
        return grad, *nothing


# ---- torch.library, for torch.compile -----------------------------------------------------------


@torch.library.custom_op("rlhf_fast::logprobs_from_logits", mutates_args=(), device_types="cpu")
def _op(
    logits: Tensor,
    labels: Tensor,
    temperature: Tensor | None,
    scale: float,
    with_entropy: bool,
    ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor]:
    validate_data(
        labels, logits.shape[-1], 1.0 if temperature is None else temperature, ignore_index
    )
    logprobs, entropy, lse = _forward_cpu(
        logits, labels, temperature, scale, with_entropy, ignore_index
    )
    return logprobs, logprobs.new_empty(0) if entropy is None else entropy, lse


@_op.register_fake
def _op_fake(
    logits: Tensor, labels: Tensor, _temperature: Any, _scale: Any, with_entropy: bool, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    logprobs = torch.empty(labels.shape, dtype=torch.float32, device=logits.device)
    entropy = torch.empty_like(logprobs) if with_entropy else logprobs.new_empty(0)
    return logprobs, entropy, torch.empty_like(logprobs, dtype=torch.float64)


@torch.library.custom_op(
    "rlhf_fast::logprobs_from_logits_backward", mutates_args=(), device_types="cpu"
)
def _backward_op(
    logits: Tensor,
    labels: Tensor,
    temperature: Tensor | None,
    scale: float,
    ignore_index: int,
    entropy: Tensor | None,
    lse: Tensor,
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
) -> Tensor:
    return _backward_cpu(
        logits,
        labels,
        temperature,
        scale,
        ignore_index,
        entropy,
        lse,
        grad_logprobs,
        grad_entropy,
        in_place=False,
    )


@_backward_op.register_fake
def _backward_op_fake(logits: Tensor, *_: Any) -> Tensor:
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, labels, temperature, scale, with_entropy, ignore_index = inputs
    _, entropy, lse = output
    ctx.save_for_backward(logits, labels, temperature, entropy, lse)
    ctx.scale, ctx.with_entropy, ctx.ignore_index = scale, with_entropy, ignore_index


def _op_backward(
    ctx: Any, grad_logprobs: Tensor, grad_entropy: Tensor, _grad_lse: Tensor
) -> tuple[Tensor | None, ...]:
    logits, labels, temperature, entropy, lse = ctx.saved_tensors
    grad = _backward_op(
        logits,
        labels,
        temperature,
        ctx.scale,
        ctx.ignore_index,
        entropy if ctx.with_entropy else None,
        lse,
        grad_logprobs,
        grad_entropy if ctx.with_entropy else None,
    )
    return grad, None, None, None, None, None


_op.register_autograd(_op_backward, setup_context=_setup_context)


# ---- the public function ------------------------------------------------------------------------


def logprobs_from_logits(
    logits: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    with_entropy: bool = True,
    ignore_index: int = -100,
    inplace_backward: bool = False,
    impl: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Per-row log softmax(logits / temperature)[label] and entropy of that softmax, in nats.

    Args:
        logits: `[..., V]`, fp32 or bf16 (fp16 and fp64 run in the PyTorch reference). Slices and
            transposes of the leading dims are read where they lie; a strided last dim is copied.
        labels: `[...]` int64 in `[0, V)`, or `ignore_index`.
        temperature: positive scalar, or a tensor of labels' shape. It receives no gradient.
        with_entropy: whether to return the entropy; it costs no further read.
        ignore_index: rows with this label are not read (they may hold NaN), yield exact 0 and
            have a zero gradient.
        inplace_backward: write the gradient over the logits, which must not be needed by anyone
            else. A second backward then raises. Has no effect under `torch.compile` or in the
            reference.
        impl: implementation by name, see `rlhf_fast_kernels.dispatch`.

    Returns:
        `(logprobs, entropy)`, fp32 (fp64 for fp64 logits), of labels' shape; entropy is None
        without `with_entropy`. Entries at -inf are legal (probability 0); a row that holds NaN
        or +inf, or nothing above -inf, yields NaN.

    Raises:
        ValueError: shapes differ; on the CPU also a label out of range or a temperature that is
            not positive, naming row and value. On an accelerator, where looking would stall the
            device, such a row yields NaN. `inplace_backward` on a leaf or on overlapping rows.
        RuntimeError: second backward after `inplace_backward`.
    """
    validate(logits, labels, temperature)
    if isinstance(temperature, Tensor):
        temperature = temperature.detach().expand(labels.shape)
    per_row = temperature if isinstance(temperature, Tensor) else None
    scale = 1.0 if isinstance(temperature, Tensor) else float(temperature)
    chosen = dispatch.choose(OP, impl, logits)
    if torch.compiler.is_compiling():
        if chosen.impl == "cpu":
            logprobs, entropy, _ = _op(logits, labels, per_row, scale, with_entropy, ignore_index)
            return logprobs, entropy if with_entropy else None
    elif logits.device.type == "cpu":
        validate_data(labels, logits.shape[-1], temperature, ignore_index)
    return chosen.function(
        logits, labels, per_row, scale, with_entropy, ignore_index, inplace_backward
    )


def _run_cpu(
    logits: Tensor,
    labels: Tensor,
    temperature: Tensor | None,
    scale: float,
    with_entropy: bool,
    ignore_index: int,
    inplace_backward: bool,
) -> tuple[Tensor, Tensor | None]:
    if inplace_backward:
        validate_inplace(logits)
    return _LogprobsFromLogits.apply(
        logits, labels, temperature, scale, with_entropy, ignore_index, inplace_backward
    )


def _run_reference(
    logits: Tensor,
    labels: Tensor,
    temperature: Tensor | None,
    scale: float,
    with_entropy: bool,
    ignore_index: int,
    _inplace_backward: bool,
) -> tuple[Tensor, Tensor | None]:
    return reference.logprobs_from_logits(
        logits,
        labels,
        temperature=scale if temperature is None else temperature,
        with_entropy=with_entropy,
        ignore_index=ignore_index,
    )


def _selftest(
    device: torch.device, dtype: torch.dtype, generator: torch.Generator
) -> dispatch.SelftestRun:
    logits = (4 * torch.randn(5, 1027, generator=generator)).to(device, dtype)
    labels = torch.randint(0, 1027, (5,), generator=generator).to(device)
    labels[2] = -100
    upstream = torch.randn(2, 5, generator=generator).to(device)

    def run(impl: str) -> tuple[Tensor, ...]:
        leaf = logits.clone().requires_grad_()
        logprobs, entropy = logprobs_from_logits(leaf, labels, temperature=0.7, impl=impl)
        assert entropy is not None
        (upstream[0] * logprobs + upstream[1] * entropy).sum().backward()
        assert leaf.grad is not None
        # One step of bf16 lies above the self-test's tolerance: gradients are summed in fp32.
        return logprobs.detach(), entropy.detach(), leaf.grad.float().square().sum(-1)

    return run


dispatch.register(OP, "reference", _run_reference)
dispatch.register(
    OP,
    "cpu",
    _run_cpu,
    native.on_cpu(f"{OP}_forward", f"{OP}_backward"),
    dtypes=FAST_DTYPES,
)
dispatch.register_selftest(OP, _selftest)
