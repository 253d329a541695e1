"""Products of fp32 matrices for the ops of this package: by PyTorch, or on the tile unit.

    out = a b (+ add)

x86 processors since Sapphire Rapids multiply bf16 tiles (AMX) at sixteen times the rate at which
they multiply fp32. An fp32 number is the exact sum of three bf16 numbers; six of the nine products
of two such sums make the product of fp32 to its last bit or so (csrc/cpu/matmul.cpp).

`matmul` has no gradient: ops call it inside their own forward and backward. `linear` has, for
layers whose parts run one by one: its products have the bits of those of `decoder_layer`.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf_fast_kernels import native
from rlhf_fast_kernels.registry import is_plain


def _find_sgemm() -> int:
    for path in sorted((Path(torch.__file__).parent / "lib").glob("*torch_cpu.*")):
        try:
            function = ctypes.CDLL(str(path)).sgemm_
        except (OSError, AttributeError):
            continue
        return ctypes.cast(function, ctypes.c_void_p).value or 0
    return 0


@cache
def tiles() -> bool:
    """Whether the compiled module multiplies on the tile unit here.

    The first call asks the system for it, for the whole process: threads then need signal stacks of
    11 KB, and the system refuses while one has a smaller one.
    """
    return native.missing("matmul", "tiles_usable") is None and native.core().tiles_usable()


#: Address of the BLAS product that PyTorch brings for itself, 0 if it shows none: C++ that runs a
#: whole layer multiplies with it where there are no tiles.
SGEMM = _find_sgemm()


def matmul(a: Tensor, b: Tensor, add: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """a b, plus `add` if given.

    Args:
        a: `[M, K]`. b: `[K, N]`, as it.
        add: `[M, N]`, or `[N]` for every row; may be out.
        out: where to write, `[M, N]`, apart from a and b; None: a new tensor.

    Returns:
        out. Errors are those of the same product in PyTorch, or close to them.

    Raises:
        RuntimeError: what PyTorch raises for shapes and dtypes that do not fit.
    """
    if tiles() and _fits(a, b, add, out):
        if out is None:
            out = a.new_empty(a.shape[0], b.shape[1])
        native.core().matmul(
            *(a.shape[0], a.shape[1], b.shape[1]),
            *((a.data_ptr(), *a.stride()), (b.data_ptr(), *b.stride())),
            *(_rows(add), _rows(out), torch.get_num_threads()),
        )
        return out
    if add is None:
        return torch.mm(a, b, out=out)
    return torch.addmm(add, a, b, out=out)


def _rows(x: Tensor | None) -> tuple[int, int]:
    if x is None:
        return 0, 0
    return x.data_ptr(), x.stride(0) if x.dim() == 2 else 0


def _fits(a: Tensor, b: Tensor, add: Tensor | None, out: Tensor | None) -> bool:
    if not (_of_a_product(a) and _of_a_product(b)) or a.shape[1] != b.shape[0]:
        return False
    shape = (a.shape[0], b.shape[1])
    if out is not None and not (
        out.shape == shape
        and _of_a_product(out)
        and out.stride(1) == 1
        and (out.stride(0) >= shape[1] or shape[0] == 1)
    ):
        return False
    if add is None:
        return True
    fits = add.shape in (shape, shape[1:]) and add.stride(-1) == 1
    return fits and _in_memory(add)


def _of_a_product(x: Tensor) -> bool:
    return _in_memory(x) and x.dim() == 2 and 1 in x.stride()


def _in_memory(x: Tensor) -> bool:
    """fp32 on the host, read as it lies, without a graph to be part of."""
    return (
        is_plain((x,))
        and x.dtype == torch.float32
        and x.device.type == "cpu"
        and not x.is_neg()
        and not (x.requires_grad and torch.is_grad_enabled())
    )


# ---- a linear layer -----------------------------------------------------------------------------


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        of_x, of_weight, _ = ctx.needs_input_grad
        ctx.shape = x.shape
        # Under adapters the weight is frozen: nobody reads x.
        ctx.save_for_backward(x if of_weight else None, weight if of_x else None)
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, above: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        rows = above.reshape(-1, above.shape[-1])
        multiply = torch.mm if torch.is_grad_enabled() else matmul  # a gradient of the gradient
        return (
            multiply(rows, weight).view(ctx.shape) if of_x else None,
            multiply(rows.t(), x.reshape(-1, x.shape[-1])) if of_weight else None,
            rows.sum(0) if of_bias else None,
        )


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    return matmul(rows, weight.t(), bias).view(*x.shape[:-1], weight.shape[0])


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear`, on tiles where they are, with gradients.

    Args:
        x: `[..., K]`. weight: `[M, K]`. bias: `[M]`.

    Returns:
        `[..., M]`.
    """
    given = (x, weight) if bias is None else (x, weight, bias)
    if torch.compiler.is_compiling() or not (tiles() and _on_tiles(given)):
        return torch.nn.functional.linear(x, weight, bias)
    if torch.is_grad_enabled() and any(t.requires_grad for t in given):
        out: Tensor = _Linear.apply(x, weight, bias)
        return out
    return _product(x, weight, bias)


def _on_tiles(given: tuple[Tensor, ...]) -> bool:
    return (
        is_plain(given)
        and all(t.dtype == torch.float32 and t.device.type == "cpu" for t in given)
        and not torch.is_autocast_enabled("cpu")
    )
