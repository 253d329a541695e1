"""Log-prob and entropy from logits: the C++ op against eager PyTorch and torch.compile.

    python -m bench.kernels.bench_logprobs [--device cpu] [--threads 2] [--repeats 9] [--quick]
                                           [--shape 512x151936 ...] [--dtype fp32|bf16 ...]
                                           [--forward-only] [--json FILE]

Peers give the same two fp32 tensors; bf16 logits are upcast as trainers do:

    log_softmax       log_softmax, gather, -(p log p) summed
    logsumexp         gather - logsumexp, logsumexp - (softmax * logits) summed (verl, TRL)
    logsumexp by rows the same for as many rows at a time as fit the second-level cache
    compile ...       torch.compile of the first two

Forward + backward takes random upstream gradients of both outputs. The gain is against the
fastest peer of the row. The error is the largest one of log-prob and entropy against fp64 on 48
rows (gradient: relative to its largest entry); the gate is the error of log_softmax plus 1e-6.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.kernels import harness
from rlhf_fast_kernels import logprobs_from_logits, native

SHAPES = ("512x151936", "4096x32000")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SETS = 2  # of 156 MB or more: every one alone exceeds the caches
ERROR_ROWS = 48
CACHE_BYTES = 1 << 20

Op = Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]]


def log_softmax(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    log_p = torch.log_softmax(logits.float(), dim=-1)
    logprobs = log_p.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    return logprobs, -(log_p.exp() * log_p).sum(-1)


def logsumexp(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    logits = logits.float()
    lse = torch.logsumexp(logits, dim=-1)
    logprobs = logits.gather(-1, labels.unsqueeze(-1)).squeeze(-1) - lse
    return logprobs, lse - (torch.softmax(logits, dim=-1) * logits).sum(-1)


def logsumexp_by_rows(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    rows = max(2, CACHE_BYTES // (4 * logits.shape[-1]))
    pieces = [logsumexp(x, y) for x, y in zip(logits.split(rows), labels.split(rows), strict=True)]
    logprobs, entropy = zip(*pieces, strict=True)
    return torch.cat(logprobs), torch.cat(entropy)


def ours(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor | None]:
    return logprobs_from_logits(logits, labels)


def ours_in_place(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor | None]:
    return logprobs_from_logits(logits, labels, inplace_backward=True)


def forward(op: Op, sets: list[tuple[Tensor, ...]], k: int) -> Any:
    logits, labels = sets[k][:2]
    with torch.no_grad():
        return op(logits, labels)


def both(op: Op, sets: list[tuple[Tensor, ...]], k: int) -> Tensor:
    """Forward and backward; an alias with a graph of its own stands for the model's output."""
    logits, labels, g, h = sets[k]
    leaf = logits.detach().requires_grad_()
    outputs = op(leaf.view_as(leaf), labels)
    return torch.autograd.grad(outputs, leaf, (g, h))[0]  # type: ignore[arg-type]


def forward_error(op: Op, sets: list[tuple[Tensor, ...]]) -> float:
    logits, labels = (x[:ERROR_ROWS] for x in sets[0][:2])
    want = log_softmax_fp64(logits, labels)
    with torch.no_grad():
        got = op(logits, labels)
    return max(
        float((x.double() - y).abs().max()) for x, y in zip(got, want, strict=True) if x is not None
    )


def log_softmax_fp64(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    log_p = torch.log_softmax(logits.double(), dim=-1)
    logprobs = log_p.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    return logprobs, -(log_p.exp() * log_p).sum(-1)


def backward_error(op: Op, sets: list[tuple[Tensor, ...]]) -> float:
    rows = [tuple(x[:ERROR_ROWS].clone() for x in sets[0])]
    exact = both(log_softmax_fp64, [(rows[0][0].double(), *rows[0][1:])], 0)
    got = both(op, rows, 0).double()
    return float((got - exact).abs().max() / exact.abs().max())


def draw(
    rows: int, vocab: int, dtype: torch.dtype, device: torch.device
) -> list[tuple[Tensor, ...]]:
    generator = torch.Generator().manual_seed(0)
    sets = []
    for _ in range(SETS):
        logits = (2.0 * torch.randn(rows, vocab, generator=generator)).to(dtype)
        labels = torch.randint(0, vocab, (rows,), generator=generator)
        drawn = (logits, labels, *torch.randn(2, rows, generator=generator).unbind())
        sets.append(tuple(x.to(device) for x in drawn))
    return sets


def run_case(
    rows: int, vocab: int, dtype: str, backward: bool, session: harness.Session
) -> list[harness.Row]:
    sets = draw(rows, vocab, DTYPES[dtype], session.device)
    error_of = backward_error if backward else forward_error
    run = both if backward else forward
    peers: dict[str, Op] = {
        "log_softmax": log_softmax,
        "logsumexp": logsumexp,
        "logsumexp by rows": logsumexp_by_rows,
    }
    for name in ("log_softmax", "logsumexp"):
        torch.compiler.reset()
        fast = harness.compiled(peers[name], sets[0][:2])
        if fast is not None:
            peers[f"compile {name}"] = fast
    name = f"rlhf_fast {harness.implementation('logprobs_from_logits', sets[0][0])}"
    own: dict[str, Op] = {name: ours}
    if backward:
        own[f"{name}, in place"] = ours_in_place
    limit = error_of(log_softmax, sets) + 1e-6
    contenders = [
        harness.Contender(name, partial(run, op, sets), error_of(op, sets), limit, ours=name in own)
        for name, op in {**own, **peers}.items()
    ]
    # Another formulation may be less exact than log_softmax and still be what trainers run.
    contenders = [
        c if c.ours else harness.Contender(c.name, c.run, c.error, max(limit, 1e-3))
        for c in contenders
    ]
    nbytes = sets[0][0].numel() * sets[0][0].element_size()
    what = "forward + backward" if backward else "forward"
    return harness.measure(
        f"[{rows}, {vocab}] {dtype} {what}",
        contenders,
        sets=SETS,
        bytes_moved=3 * nbytes if backward else nbytes,
        **session.limits(),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = harness.parser("log-prob and entropy from logits")
    parser.add_argument("--shape", nargs="+", default=SHAPES, help="ROWSxVOCAB")
    parser.add_argument("--dtype", nargs="+", default=tuple(DTYPES), choices=tuple(DTYPES))
    parser.add_argument("--forward-only", action="store_true")
    options = parser.parse_args(arguments)
    session = harness.start(options)
    problem = native.missing("logprobs_from_logits_forward", "logprobs_from_logits_backward")
    if problem and session.device.type == "cpu":
        print(f"nothing to measure: {problem}", file=sys.stderr)
        return 1
    for backward in (False,) if options.forward_only else (False, True):
        for shape in options.shape[:1] if options.quick else options.shape:
            rows, vocab = (int(part) for part in shape.split("x"))
            for dtype in options.dtype:
                session.add(run_case(rows, vocab, dtype, backward, session))
    return session.finish()


if __name__ == "__main__":
    sys.exit(main())
