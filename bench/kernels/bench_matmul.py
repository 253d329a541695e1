"""Products of fp32 matrices on a CPU: tiles against torch.mm.

    python -m bench.kernels.bench_matmul [--shape 704x128x512 ...] [--threads 2] [--repeats 9]
                                         [--quick] [--json FILE]

A shape is NxKxM, tokens and the width before and after a linear layer, whose three products are
measured: `x W^T` forward, `d W` and `d^T x` backward. The defaults are layers of small Llamas and
one of a large. A turn is CALLS calls, each on the next of several sets of operands and results,
which together exceed a second-level cache: as between the operations of a training step.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rlhf_fast_kernels.matmul import matmul, tiles

from . import harness

SHAPES = ("704x128x512", "704x512x128", "1024x512x1408", "512x4096x4096")
PRODUCTS = ("x W^T", "d W", "d^T x")
CALLS = 12
SET_BYTES = 16 << 20  # of all sets together at least
# Of the largest entry: a sum of thousands of products in fp32.
ERROR_LIMIT = 1e-5


def operands(product: str, tokens: int, inner: int, outer: int, seed: int) -> tuple[Tensor, Tensor]:
    """Both sides of one of `PRODUCTS`, with the strides that training has."""
    generator = torch.Generator().manual_seed(seed)
    x, d, weight = (
        torch.randn(shape, generator=generator)
        for shape in ((tokens, inner), (tokens, outer), (outer, inner))
    )
    if product == "x W^T":
        return x, weight.t()
    return (d, weight) if product == "d W" else (d.t(), x)


def run_case(session: harness.Session, product: str, tokens: int, inner: int, outer: int) -> None:
    a, b = operands(product, tokens, inner, outer, 0)
    rows, depth, columns = *a.shape, b.shape[1]
    moved = 4 * (a.numel() + b.numel() + rows * columns)
    count = max(1, min(CALLS, SET_BYTES // moved))
    sets = [
        (*operands(product, tokens, inner, outer, k), torch.empty(rows, columns))
        for k in range(count)
    ]
    exact = a.double() @ b.double()

    def contender(name: str, multiply: Callable[[int], Tensor]) -> harness.Contender:
        multiply(0)
        error = float((sets[0][2].double() - exact).abs().max() / exact.abs().max())
        return harness.Contender(name, multiply, error, ERROR_LIMIT, ours=name == "cpu")

    def ours(k: int) -> Tensor:
        left, right, out = sets[k]
        return matmul(left, right, out=out)

    def theirs(k: int) -> Tensor:
        left, right, out = sets[k]
        return torch.mm(left, right, out=out)

    rows_of_table = harness.measure(
        f"{product}: [{rows}, {depth}] @ [{depth}, {columns}]",
        [contender("cpu", ours), contender("torch.mm", theirs)],
        sets=count,
        bytes_moved=moved,
        calls=CALLS if moved * CALLS < 4 * SET_BYTES else 1,
        flops=2 * rows * depth * columns,
        **session.limits(),
    )
    session.add(rows_of_table)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = harness.parser("products of fp32 matrices")
    parser.add_argument("--shape", nargs="+", default=SHAPES, help="NxKxM")
    options = parser.parse_args(arguments)
    session = harness.start(options)
    if session.device.type != "cpu":
        print("nothing to measure: on accelerators products are PyTorch's", file=sys.stderr)
        return session.finish()
    if not tiles():
        print("no tile unit here: both contenders are PyTorch's product", file=sys.stderr)
    for shape in options.shape[:1] if session.quick else options.shape:
        tokens, inner, outer = (int(part) for part in shape.split("x"))
        for product in PRODUCTS:
            run_case(session, product, tokens, inner, outer)
    return session.finish()


if __name__ == "__main__":
    sys.exit(main())
