"""A linear layer on few rows on a CPU, fp32: linear_small against torch.mm.

    python -m bench.kernels.bench_linear_small [--shape 128x384 ...] [--rows 1 16 64]
                                               [--threads 2] [--repeats 9] [--quick] [--json FILE]

A shape is KxM of x [N, K] @ weight [M, K]^T; the defaults are the layers of Llamas of hidden size
96, 128 and 256. Contenders:

    cpu          the public function with `out=`
    prepared     the bare call of C++, addresses and shapes read before, as an engine calls it
    torch.mm     into an `out` tensor

A turn is CALLS calls on one set, since one may take a microsecond: weights and activations stay in
the caches, as those of small models do between steps.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

import torch

from rlhf_fast_kernels import linear_small, native
from rlhf_fast_kernels.linear_small import prepare

from . import harness

SHAPES = ("96x288", "128x384", "128x128", "128x688", "344x128", "256x768", "256x1376", "256x4096")
CALLS = 100
ERROR_LIMIT = 1e-5


def run_case(session: harness.Session, rows: int, inner: int, columns: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(n, inner, generator=generator) for n in (rows, columns))
    out, turned = torch.empty(rows, columns), weight.t()
    exact = x.double() @ weight.double().T
    calls: dict[str, Callable[[], object]] = {
        "cpu": lambda: linear_small(x, weight, out=out),
        "prepared": prepare(x, weight, None, None, out),
        "torch.mm": lambda: torch.mm(x, turned, out=out),
    }

    def contender(name: str, call: Callable[[], object]) -> harness.Contender:
        call()
        error = float((out.double() - exact).abs().max() / exact.abs().max())
        return harness.Contender(
            name, lambda _set: call(), error, ERROR_LIMIT, ours=name != "torch.mm"
        )

    rows_of_table = harness.measure(
        f"[{rows}, {inner}] @ [{inner}, {columns}]",
        [contender(name, call) for name, call in calls.items()],
        sets=1,
        bytes_moved=4 * (rows * inner + columns * inner + rows * columns),
        calls=CALLS,
        flops=2 * rows * inner * columns,
        **session.limits(),
    )
    session.add(rows_of_table)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = harness.parser("linear layers on few rows")
    parser.add_argument("--shape", nargs="+", default=SHAPES, help="KxM")
    parser.add_argument("--rows", nargs="+", type=int, default=(1, 16, 64))
    options = parser.parse_args(arguments)
    session = harness.start(options)
    if session.device.type != "cpu":
        print("nothing to measure: on accelerators linear_small is PyTorch's", file=sys.stderr)
        return session.finish()
    reason = native.missing("linear_small")
    if reason is not None:
        print(f"nothing to measure: {reason}", file=sys.stderr)
        return 1
    for shape in options.shape[1:2] if session.quick else options.shape:
        inner, columns = (int(part) for part in shape.split("x"))
        for rows in options.rows:
            run_case(session, rows, inner, columns)
    return session.finish()


if __name__ == "__main__":
    sys.exit(main())
