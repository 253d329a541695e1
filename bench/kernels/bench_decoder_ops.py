"""The small ops of a decoder layer, rms_norm and silu_mul: ours against transformers' eager code.

    python -m bench.kernels.bench_decoder_ops [--shape 64x4096 ...] [--dtype bf16 ...]
                                              [--device cpu] [--threads 2] [--repeats 9] [--quick]
                                              [--json FILE]

A shape is ROWSxCOLUMNS of the output. On one row the call is nearly all that is timed. Contenders:

    cpu, triton       the public function with `out=`
    unchecked         C++ without checks and choice of the implementation, as an engine calls it
    prepared          the bare call of C++, addresses and shapes read before
    eager             the operations of transformers' modules
    torch             torch.nn.functional.rms_norm, where that is the op
    compile eager     torch.compile of the former

The error is the largest difference from fp64 over the largest element; the gate is 4 roundings.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from rlhf_fast_kernels import native, rms_norm, silu_mul
from rlhf_fast_kernels.rms_norm import prepare as prepare_norm
from rlhf_fast_kernels.rms_norm import unchecked as unchecked_norm
from rlhf_fast_kernels.silu_mul import prepare as prepare_silu
from rlhf_fast_kernels.silu_mul import unchecked as unchecked_silu

from . import harness

SHAPES = ("1x128", "64x256", "64x4096")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
EPS = 1e-6
ROTATED_BYTES = 64 << 20
SHORT_ELEMENTS = 1 << 15  # many calls a turn below

Run = Callable[[int], Any]


# ---- the operations of transformers' modules ----------------------------------------------------


def eager_norm(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
    return weight * wide.to(x.dtype)


def eager_residual_norm(x: Tensor, weight: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    total = residual + x
    return eager_norm(total, weight), total


def eager_silu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return functional.silu(gate) * up


# ---- cases --------------------------------------------------------------------------------------


def norm_runs(
    session: harness.Session, sets: Sequence[Sequence[Tensor]], out: Tensor, residual: bool
) -> dict[str, Run]:
    """Set k is (x, weight, residual). Ours adds to the residual in place, call after call."""

    def added(k: int) -> Tensor | None:
        return sets[k][2] if residual else None

    def eager(norm: Callable[..., Any], k: int) -> Any:
        return norm(*sets[k][: 3 if residual else 2])

    definition = eager_residual_norm if residual else eager_norm
    runs: dict[str, Run] = {
        harness.implementation("rms_norm", out): lambda k: rms_norm(
            sets[k][0], sets[k][1], EPS, residual=added(k), out=out
        )
    }
    if session.device.type == "cpu":
        calls = [prepare_norm(s[0], s[1], EPS, added(k), 0.0, out) for k, s in enumerate(sets)]
        runs["unchecked"] = lambda k: unchecked_norm(
            sets[k][0], sets[k][1], EPS, added(k), 0.0, out
        )
        runs["prepared"] = lambda k: calls[k]()
    runs["eager"] = partial(eager, definition)
    if not residual:
        runs["torch"] = lambda k: functional.rms_norm(sets[k][0], out.shape[1:], sets[k][1], EPS)
    compiled = harness.compiled(definition, sets[0][: 3 if residual else 2])
    if compiled is not None:
        runs["compile eager"] = partial(eager, compiled)
    return runs


def silu_runs(
    session: harness.Session, sets: Sequence[Sequence[Tensor]], out: Tensor
) -> dict[str, Run]:
    """Set k is (gate_up,)."""
    runs: dict[str, Run] = {
        harness.implementation("silu_mul", out): lambda k: silu_mul(sets[k][0], out=out)
    }
    if session.device.type == "cpu":
        calls = [prepare_silu(s[0], out) for s in sets]
        runs["unchecked"] = lambda k: unchecked_silu(sets[k][0], out)
        runs["prepared"] = lambda k: calls[k]()
    runs["eager"] = lambda k: eager_silu(sets[k][0])
    compiled = harness.compiled(eager_silu, sets[0])
    if compiled is not None:
        runs["compile eager"] = lambda k: compiled(sets[k][0])
    return runs


def error_of(got: Any, exact: Tensor, out: Tensor, ours: bool) -> float:
    """Of `out` for ours, of the (first) result for the others."""
    result = out if ours else got[0] if isinstance(got, tuple) else got
    return float((result.double() - exact).abs().max() / exact.abs().max())


def run_case(
    session: harness.Session,
    label: str,
    sets: Sequence[list[Tensor]],
    runs: dict[str, Run],
    exact: Callable[[], Tensor],
    out: Tensor,
    bytes_moved: int,
) -> None:
    contenders = []
    for name, run in runs.items():
        ours = name not in ("eager", "torch", "compile eager")
        before = [x.clone() for x in sets[0]]
        want = exact()
        error = error_of(run(0), want, out, ours)
        for x, kept in zip(sets[0], before, strict=True):
            x.copy_(kept)
        limit = 4 * torch.finfo(out.dtype).eps
        contenders.append(harness.Contender(name, run, error, limit, ours=ours))
    session.add(
        harness.measure(
            label,
            contenders,
            sets=len(sets),
            bytes_moved=bytes_moved,
            calls=100 if out.numel() <= SHORT_ELEMENTS else 1,
            **session.limits(),
        )
    )


def run_shape(session: harness.Session, rows: int, columns: int, name: str) -> None:
    dtype, generator = DTYPES[name], torch.Generator().manual_seed(0)
    count = min(8, max(2, ROTATED_BYTES // (2 * rows * columns * dtype.itemsize)))

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(session.device, dtype)

    out = draw(rows, columns)
    norm_sets = [[draw(rows, columns), draw(columns), draw(rows, columns)] for _ in range(count)]
    silu_sets = [[draw(rows, 2 * columns)] for _ in range(count)]
    label, unit = f"[{rows}, {columns}] {name}", out.numel() * out.element_size()

    def exact_norm(residual: bool) -> Tensor:
        x, weight, kept = norm_sets[0]
        wide = ((kept + x) if residual else x).double()
        return wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS) * weight.double()

    for residual, passes in ((False, 2), (True, 4)):
        run_case(
            session,
            f"rms_norm{' + residual' if residual else ''} {label}",
            norm_sets,
            norm_runs(session, norm_sets, out, residual),
            partial(exact_norm, residual),
            out,
            passes * unit,
        )
    run_case(
        session,
        f"silu_mul {label}",
        silu_sets,
        silu_runs(session, silu_sets, out),
        lambda: eager_silu(silu_sets[0][0].double()),
        out,
        3 * unit,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = harness.parser("rms_norm and silu_mul")
    parser.add_argument("--shape", nargs="+", default=SHAPES, help="ROWSxCOLUMNS")
    parser.add_argument("--dtype", nargs="+", default=tuple(DTYPES), choices=tuple(DTYPES))
    options = parser.parse_args(arguments)
    session = harness.start(options)
    reason = native.missing("rms_norm", "silu_mul")
    if reason is not None and session.device.type == "cpu":
        print(f"nothing to measure: {reason}", file=sys.stderr)
        return 1
    for shape in options.shape[:1] if session.quick else options.shape:
        rows, columns = (int(part) for part in shape.split("x"))
        for name in options.dtype:
            run_shape(session, rows, columns, name)
    return session.finish()


if __name__ == "__main__":
    sys.exit(main())
