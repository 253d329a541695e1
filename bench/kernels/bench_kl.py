"""The exact KL of two rows of logits: one sweep against log_softmax of both.

    python -m bench.kernels.bench_kl [--threads 2] [--repeats 9] [--device cpu|cuda]
        [--shape 512x151936 ...] [--dtype fp32|bf16 ...] [--json FILE]

Contenders give the KL of every row, and with its gradient by the first logits:

    log_softmax      both sides, sum of p (log p - log q)
    kl_div           torch.nn.functional.kl_div of the same, log_target
    compile ...      torch.compile of the first

The error is the largest of the KL against fp64 on 32 rows; the gate is that of log_softmax + 1e-6.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.kernels import harness
from rlhf_fast_kernels import kl_from_logits, reference

SHAPES = {"cpu": ("512x151936", "2048x32000"), "cuda": ("16384x151936", "4096x32000")}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SETS = 2
ERROR_ROWS = 32

Op = Callable[[Tensor, Tensor], Tensor]


def log_softmax(logits: Tensor, ref_logits: Tensor) -> Tensor:
    log_p = torch.log_softmax(logits.float(), dim=-1)
    log_q = torch.log_softmax(ref_logits.float(), dim=-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def kl_div(logits: Tensor, ref_logits: Tensor) -> Tensor:
    log_p = torch.log_softmax(logits.float(), dim=-1)
    log_q = torch.log_softmax(ref_logits.float(), dim=-1)
    return torch.nn.functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)


def ours(logits: Tensor, ref_logits: Tensor) -> Tensor:
    return kl_from_logits(logits, ref_logits)


def ours_in_place(logits: Tensor, ref_logits: Tensor) -> Tensor:
    return kl_from_logits(logits, ref_logits, inplace_backward=True)


def draw(
    rows: int, vocab: int, dtype: torch.dtype, device: torch.device
) -> list[tuple[Tensor, Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    sets = []
    for _ in range(SETS):
        logits = 2.0 * torch.randn(rows, vocab, generator=generator)
        ref_logits = logits + 0.1 * torch.randn(rows, vocab, generator=generator)
        upstream = torch.randn(rows, generator=generator).to(device)
        sets.append((logits.to(device, dtype), ref_logits.to(device, dtype), upstream))
    return sets


def forward(op: Op, sets: list[tuple[Tensor, Tensor, Tensor]], k: int) -> Tensor:
    with torch.no_grad():
        return op(*sets[k][:2])


def both(op: Op, sets: list[tuple[Tensor, Tensor, Tensor]], k: int) -> Tensor:
    logits, ref_logits, upstream = sets[k]
    leaf = logits.detach().requires_grad_()
    # A view, because a leaf may not be overwritten.
    return torch.autograd.grad(op(leaf.view_as(leaf), ref_logits), leaf, upstream)[0]


def error(op: Op, sets: list[tuple[Tensor, Tensor, Tensor]]) -> float:
    logits, ref_logits = (x[:ERROR_ROWS].clone() for x in sets[0][:2])
    with torch.no_grad():
        exact = reference.kl_from_logits(logits.double(), ref_logits.double())
        return float((op(logits, ref_logits).double() - exact).abs().max())


def run_case(
    rows: int, vocab: int, dtype: str, backward: bool, session: harness.Session
) -> list[harness.Row]:
    sets = draw(rows, vocab, DTYPES[dtype], session.device)
    own: dict[str, Op] = {"rlhf_fast": ours}
    if backward:
        own["rlhf_fast, in place"] = ours_in_place
    other: dict[str, Op] = {"log_softmax": log_softmax, "kl_div": kl_div}
    torch.compiler.reset()
    fast = harness.compiled(log_softmax, sets[0][:2])
    if fast is not None:
        other["compile log_softmax"] = fast
    limit = error(log_softmax, sets) + 1e-6
    run: Callable[..., Any] = both if backward else forward
    # What is overwritten is of no use to the others.
    own_copy = [(logits.clone(), *rest) for logits, *rest in sets] if backward else sets
    nbytes = harness.bytes_of(*sets[0][:2])
    contenders = [
        harness.Contender(
            name,
            partial(run, op, own_copy if op is ours_in_place else sets),
            error(op, sets),
            limit if name in own else 1e-2,
            ours=name in own,
            returned_bytes=harness.bytes_of(sets[0][0])
            if backward and op is not ours_in_place
            else 0,
        )
        for name, op in {**own, **other}.items()
    ]
    what = "forward + backward" if backward else "forward"
    return harness.measure(
        f"[{rows}, {vocab}] {dtype} {what}",
        contenders,
        sets=SETS,
        bytes_moved=nbytes * 5 // 2 if backward else nbytes,
        **session.limits(),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = harness.parser("exact KL from logits")
    parser.add_argument("--shape", nargs="+", help="ROWSxVOCAB")
    parser.add_argument("--dtype", nargs="+", default=tuple(DTYPES), choices=tuple(DTYPES))
    options = parser.parse_args(arguments)
    session = harness.start(options)
    shapes = SHAPES[session.device.type]
    for shape in options.shape or (shapes[:1] if session.quick else shapes):
        rows, vocab = (int(part) for part in shape.split("x"))
        for dtype in options.dtype:
            for backward in (False, True):
                session.add(run_case(rows, vocab, dtype, backward, session))
    return session.finish()


if __name__ == "__main__":
    sys.exit(main())
