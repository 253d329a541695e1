"""Products of fp32 matrices for the ops of this package: by PyTorch, or on the tile unit.

    out = a b (+ add)

x86 processors since Sapphire Rapids multiply bf16 tiles (AMX) at sixteen times the rate at which
they multiply fp32. An fp32 number is the exact sum of three bf16 numbers; six of the nine products
of two such sums make the product of fp32 to its last bit or so (csrc/cpu/matmul.cpp).

Without gradient: ops call this inside their own forward and backward.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from rlhf_fast_kernels import native


def _find_sgemm() -> int:
    for path in sorted((Path(torch.__file__).parent / "lib").glob("*torch_cpu.*")):
        try:
            function = ctypes.CDLL(str(path)).sgemm_
        except (OSError, AttributeError):
            continue
        return ctypes.cast(function, ctypes.c_void_p).value or 0
    return 0


#: Whether the compiled module multiplies on the tile unit here.
TILES = native.missing("matmul", "tiles_usable") is None and native.core().tiles_usable()
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
    if TILES and _fits(a, b, add, out):
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
    if out is not None and (out.shape != shape or not _of_a_product(out) or out.stride(1) != 1):
        return False
    if add is None:
        return True
    fits = add.shape in (shape, shape[1:]) and add.stride(-1) == 1
    return fits and add.dtype == torch.float32 and add.device.type == "cpu"


def _of_a_product(x: Tensor) -> bool:
    return x.dim() == 2 and x.dtype == torch.float32 and x.device.type == "cpu" and 1 in x.stride()
