"""The element-wise parts of a decoder layer, with gradients: SwiGLU, rotation, RMSNorm.

    swiglu(gate, up)               silu(gate) * up
    rotary(x, cos, sin)            x cos + (-x2, x1) sin, x1 and x2 the halves of a head
    trained_rms_norm(x, w, eps)    w x r,  r = (mean x^2 + eps)^-1/2

Backward, with s = sigmoid(gate), a = grad_out, g = a w:

    grad_up = a gate s             grad_gate = a up s (1 + gate (1 - s))
    grad_x of a rotation: the rotation by the opposite angle
    grad_x of the norm = r (g - x r mean(g x r)),   grad_w = sum over rows of a x r

In C++ (fp32, CPU) each direction reads its inputs once; they are all that is saved. Elsewhere, and
under torch.compile, the plain operations of PyTorch run, which a compiler fuses by itself. Sums go
in a fixed order: the same bits twice and for any number of threads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlhf_fast_kernels import dispatch, native
from rlhf_fast_kernels.reference import layer_ops as reference
from rlhf_fast_kernels.registry import is_plain
from rlhf_fast_kernels.rms_norm import unchecked as unchecked_norm


def _chosen(op: str, impl: str | None, *tensors: Tensor) -> Any:
    """What runs; the plain operations where a call must be traced."""
    choice = dispatch.choose(op, impl, *tensors)
    if torch.compiler.is_compiling() or not is_plain(tensors):
        return dispatch.choose(op, "reference", *tensors).function
    return choice.function


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _refuse_second(op: str) -> None:
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"{op}: gradients of its gradients do not exist in C++; call backward without "
            "create_graph=True, or pass impl='reference'"
        )


# ---- SwiGLU -------------------------------------------------------------------------------------


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        out = torch.empty_like(gate)
        run_swiglu(gate, up, out)
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, Tensor]:
        _refuse_second("swiglu")
        gate, up = ctx.saved_tensors
        grad_gate, grad_up = torch.empty_like(gate), torch.empty_like(up)
        run_swiglu(gate, up, None, grad_out.contiguous(), grad_gate, grad_up)
        return grad_gate, grad_up


def run_swiglu(
    gate: Tensor,
    up: Tensor,
    out: Tensor | None,
    grad_out: Tensor | None = None,
    grad_gate: Tensor | None = None,
    grad_up: Tensor | None = None,
) -> None:
    """SwiGLU in C++ on fp32 CPU tensors that fit, contiguous, of one size.

    Without grad_out `out` is written; with it the two gradients, which may be gate and up
    themselves, and `out` as well unless it is None.
    """
    others = (out, grad_out, grad_gate, grad_up)
    addresses = map(_address, (gate, up, *others))
    native.core().swiglu(gate.numel(), *addresses, native.thread_count())


def swiglu(gate: Tensor, up: Tensor, *, impl: str | None = None) -> Tensor:
    """silu(gate) * up, both of one shape and floating dtype, with gradients.

    Raises:
        ValueError: shapes, dtypes or devices differ.
    """
    if gate.shape != up.shape or gate.dtype != up.dtype or gate.device != up.device:
        found = f"gate {list(gate.shape)} {gate.dtype}, up {list(up.shape)} {up.dtype}"
        raise ValueError(f"swiglu: {found}; expected one shape, dtype and device")
    out: Tensor = _chosen("swiglu", impl, gate, up)(gate, up)
    return out


# ---- rotation -----------------------------------------------------------------------------------


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin, transposed=False)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, None, None]:
        _refuse_second("rotary")
        return _rotated(grad_out, *ctx.saved_tensors, transposed=True), None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, *, transposed: bool) -> Tensor:
    if x.stride(-1) != 1:
        x = x.contiguous()
    out = x.new_empty(x.shape)
    run_rotary(x, cos, sin, out, transposed=transposed)
    return out


def run_rotary(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor, *, transposed: bool) -> None:
    """The rotation, or its gradient, in C++ on fp32 CPU tensors that fit; out may be x.

    x and out `[N, heads, D]` of any strides of tokens and heads, contiguous cos and sin.
    """
    tokens, heads, width = x.shape
    native.core().rotary(
        (tokens, heads, width // 2),
        *(x.data_ptr(), x.stride()[:2], cos.data_ptr(), sin.data_ptr()),
        *(out.data_ptr(), out.stride()[:2], transposed, native.thread_count()),
    )


def rotary(x: Tensor, cos: Tensor, sin: Tensor, *, impl: str | None = None) -> Tensor:
    """Rotate the two halves of each head, as Llama does, with the gradient of x.

    Args:
        x: `[N, heads, D]`, D even; any strides of tokens and heads.
        cos, sin: `[N, D]` in x's dtype; no gradient.
        impl: implementation by name, see `rlhf_fast_kernels.dispatch`.

    Returns:
        `[N, heads, D]`.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.
    """
    if x.dim() != 3 or x.shape[-1] % 2:
        raise ValueError(f"rotary: x is {list(x.shape)}; expected [N, heads, D] with D even")
    for name, table in (("cos", cos), ("sin", sin)):
        if table.shape != (x.shape[0], x.shape[2]) or table.dtype != x.dtype:
            found = f"{name} is {list(table.shape)} {table.dtype}"
            expected = f"{[x.shape[0], x.shape[2]]} {x.dtype}"
            raise ValueError(f"rotary: {found}; expected {expected}")
    out: Tensor = _chosen("rotary", impl, x)(x, cos.contiguous(), sin.contiguous())
    return out


# ---- RMSNorm ------------------------------------------------------------------------------------


class _TrainedRmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x = x.contiguous()
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        out = torch.empty_like(x)
        columns = x.shape[-1]
        unchecked_norm(x.view(-1, columns), weight, eps, None, 0.0, out.view(-1, columns))
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, Tensor, None]:
        _refuse_second("trained_rms_norm")
        x, weight = ctx.saved_tensors
        grad_x = torch.empty_like(x)
        grad_weight = run_rms_norm_backward(x, weight, grad_out.contiguous(), ctx.eps, None, grad_x)
        return grad_x, grad_weight, None


def run_rms_norm_backward(
    x: Tensor, weight: Tensor, grad_out: Tensor, eps: float, residual: Tensor | None, grad_x: Tensor
) -> Tensor:
    """The gradient of weight, in C++ on contiguous fp32 CPU tensors that fit.

    That of x, plus the residual, is written to grad_x, which may be the residual or grad_out.
    """
    grad_weight, columns = torch.empty_like(weight), x.shape[-1]
    native.core().rms_norm_backward(
        *(x.numel() // max(columns, 1), columns, x.data_ptr(), weight.data_ptr()),
        *(grad_out.data_ptr(), eps, _address(residual), grad_x.data_ptr()),
        *(grad_weight.data_ptr(), native.thread_count()),
    )
    return grad_weight


def trained_rms_norm(x: Tensor, weight: Tensor, eps: float, *, impl: str | None = None) -> Tensor:
    """weight * x / rms(x) over the last dim, with gradients of both.

    Args:
        x: `[..., H]`.
        weight: contiguous `[H]` in x's dtype (the reference also takes fp32 beside a narrower x).
        eps: added to the mean of squares.
        impl: implementation by name, see `rlhf_fast_kernels.dispatch`.

    Raises:
        ValueError: shapes or devices that do not fit.
    """
    if weight.shape != x.shape[-1:] or not weight.is_contiguous() or weight.device != x.device:
        found = (
            f"x is {list(x.shape)} on {x.device}, weight {list(weight.shape)} on {weight.device}"
        )
        raise ValueError(f"trained_rms_norm: {found}; expected [..., H] and contiguous [H]")
    out: Tensor = _chosen("trained_rms_norm", impl, x, weight)(x, weight, eps)
    return out


# ---- registration -------------------------------------------------------------------------------


def _case(op: str, width: int) -> dispatch.SelftestCase:
    def case(
        device: torch.device, dtype: torch.dtype, generator: torch.Generator
    ) -> dispatch.SelftestRun:
        shapes = {
            "swiglu": ((5, width), (5, width)),
            "rotary": ((5, 3, width), (5, width), (5, width)),
            "trained_rms_norm": ((5, width), (width,)),
        }[op]
        tensors = [torch.randn(s, generator=generator).to(device, dtype) for s in shapes]
        functions: dict[str, Any] = {
            "swiglu": swiglu,
            "rotary": rotary,
            "trained_rms_norm": lambda x, w, impl: trained_rms_norm(x, w, 1e-6, impl=impl),
        }

        def run(impl: str) -> tuple[Tensor, ...]:
            inputs = [x.clone() for x in tensors]
            trained = inputs[:1] if op == "rotary" else inputs
            for x in trained:
                x.requires_grad_()
            out = functions[op](*inputs, impl=impl)
            return out.detach(), *torch.autograd.grad(out, trained, torch.cos(out.detach()))

        return run

    return case


for _op, _reference, _native in (
    ("swiglu", reference.swiglu, _Swiglu),
    ("rotary", reference.rotary, _Rotary),
    ("trained_rms_norm", reference.trained_rms_norm, _TrainedRmsNorm),
):
    dispatch.register(_op, "reference", _reference)
    dispatch.register(
        *(_op, "cpu", _native.apply, native.on_cpu("swiglu", "rotary", "rms_norm_backward")),
        dtypes=(torch.float32,),
    )
    dispatch.register_selftest(_op, _case(_op, 24))
