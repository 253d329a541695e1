"""Log-prob and entropy from logits against eager PyTorch, torch.compile, TRL, verl and others.

    python -m bench.kernels.bench_logprobs [--device cpu] [--threads 2] [--repeats 9] [--quick]
                                           [--shape 512x151936 ...] [--dtype fp32|bf16 ...]
                                           [--forward-only] [--json FILE]

Cases: log-prob + entropy, log-prob alone, and both again forward + backward. Peers give the same
tensors; bf16 logits are upcast as trainers do:

    log_softmax       log_softmax, gather, -(p log p) summed
    logsumexp         gather - logsumexp, logsumexp - (softmax * logits) summed
    logsumexp by rows the same for as many rows at a time as fit the second-level cache
    compile ...       torch.compile of the first two
    TRL, verl, ...    their own functions where they are installed (bench.kernels.peers)

Backward takes random upstream gradients of all outputs. The gain is against the fastest peer of
the row. The error is the largest one of log-prob and entropy against fp64 on 48 rows (gradient:
relative to its largest entry); the gate of ours is the error of log_softmax plus 1e-6, that of
peers 0.2, because some compute in bf16 and are what trainers run.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rlhf_fast_kernels import logprobs_from_logits, native

from . import harness, peers

SHAPES = {"cpu": ("512x151936", "4096x32000"), "cuda": ("16384x151936", "256x151936")}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CASES = (  # name, with entropy, with backward
    ("log-prob + entropy", True, False),
    ("log-prob", False, False),
    ("log-prob + entropy, forward + backward", True, True),
    ("log-prob, forward + backward", False, True),
)
PEER_LIMIT = 0.2
SETS = 2  # of 156 MB or more: every one alone exceeds the caches
ERROR_ROWS = 48
CACHE_BYTES = 1 << 20

Op = Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]]


# ---- contenders ---------------------------------------------------------------------------------


def log_softmax(
    logits: Tensor, labels: Tensor, with_entropy: bool = True
) -> tuple[Tensor, Tensor | None]:
    log_p = torch.log_softmax(logits.float(), dim=-1)
    logprobs = log_p.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    return logprobs, -(log_p.exp() * log_p).sum(-1) if with_entropy else None


def logsumexp(
    logits: Tensor, labels: Tensor, with_entropy: bool = True
) -> tuple[Tensor, Tensor | None]:
    logits = logits.float()
    lse = torch.logsumexp(logits, dim=-1)
    logprobs = logits.gather(-1, labels.unsqueeze(-1)).squeeze(-1) - lse
    if not with_entropy:
        return logprobs, None
    return logprobs, lse - (torch.softmax(logits, dim=-1) * logits).sum(-1)


def logsumexp_by_rows(
    logits: Tensor, labels: Tensor, with_entropy: bool = True
) -> tuple[Tensor, Tensor | None]:
    rows = max(2, CACHE_BYTES // (4 * logits.shape[-1]))
    pieces = [
        logsumexp(x, y, with_entropy)
        for x, y in zip(logits.split(rows), labels.split(rows), strict=True)
    ]
    entropy = [piece[1] for piece in pieces if piece[1] is not None]
    return torch.cat([piece[0] for piece in pieces]), torch.cat(entropy) if entropy else None


def ours(
    logits: Tensor, labels: Tensor, with_entropy: bool = True, in_place: bool = False
) -> tuple[Tensor, Tensor | None]:
    return logprobs_from_logits(
        logits, labels, with_entropy=with_entropy, inplace_backward=in_place
    )


def own_ops(with_entropy: bool, backward: bool, logits: Tensor) -> dict[str, Op]:
    name = f"rlhf_fast {harness.implementation('logprobs_from_logits', logits)}"
    found: dict[str, Op] = {name: partial(ours, with_entropy=with_entropy)}
    if backward:
        found[f"{name}, in place"] = partial(ours, with_entropy=with_entropy, in_place=True)
    return found


def peer_ops(
    with_entropy: bool, backward: bool, sample: tuple[Tensor, ...], absent: dict[str, str]
) -> dict[str, Op]:
    """Peers that give what the case asks for; `absent` takes the others and why."""
    found: dict[str, Op] = {
        "log_softmax": partial(log_softmax, with_entropy=with_entropy),
        "logsumexp": partial(logsumexp, with_entropy=with_entropy),
    }
    for name in tuple(found):
        torch.compiler.reset()
        fast = harness.compiled(found[name], sample[:2])
        if fast is not None:
            found[f"compile {name}"] = fast
    found["logsumexp by rows"] = partial(logsumexp_by_rows, with_entropy=with_entropy)
    others, missing = peers.find("logprobs", sample[0].device)
    absent |= missing
    for peer in others:
        in_place = "in place" in peer.name  # a property of backward
        if ("no entropy" in peer.name) != with_entropy and (backward or not in_place):
            found[peer.name] = peer.function
    return found


# ---- what is run --------------------------------------------------------------------------------


def forward(op: Op, sets: list[tuple[Tensor, ...]], k: int) -> Any:
    logits, labels = sets[k][:2]
    with torch.no_grad():
        return op(logits, labels)


def both(op: Op, sets: list[tuple[Tensor, ...]], k: int) -> Tensor:
    """Forward and backward from the output of a model.

    Those in place leave a gradient in the set: other logits, and the same work, for the next turn.
    """
    logits, labels, *upstream = sets[k]
    output = harness.model_output(logits)
    outputs = [x for x in op(output, labels) if x is not None]
    grads = [g.to(x.dtype) for x, g in zip(outputs, upstream, strict=False)]
    return torch.autograd.grad(outputs, output, grads)[0]


def forward_error(op: Op, sets: list[tuple[Tensor, ...]]) -> float:
    logits, labels = (x[:ERROR_ROWS] for x in sets[0][:2])
    want = log_softmax_fp64(logits, labels)
    with torch.no_grad():
        got = op(logits, labels)
    pairs = zip(got, want, strict=True)
    return max(
        float((x.double() - y).abs().max()) for x, y in pairs if x is not None and y is not None
    )


def log_softmax_fp64(
    logits: Tensor, labels: Tensor, with_entropy: bool = True
) -> tuple[Tensor, Tensor | None]:
    log_p = torch.log_softmax(logits.double(), dim=-1)
    logprobs = log_p.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    return logprobs, -(log_p.exp() * log_p).sum(-1) if with_entropy else None


def backward_error(op: Op, sets: list[tuple[Tensor, ...]], with_entropy: bool) -> float:
    rows = [tuple(x[:ERROR_ROWS].clone() for x in sets[0])]
    truth = partial(log_softmax_fp64, with_entropy=with_entropy)
    exact = both(truth, [(rows[0][0].double(), *rows[0][1:])], 0)
    got = both(op, rows, 0).double()
    return float((got - exact).abs().max() / exact.abs().max())


def draw(
    rows: int, vocab: int, dtype: torch.dtype, device: torch.device
) -> list[tuple[Tensor, ...]]:
    generator = torch.Generator(device).manual_seed(0)
    options: dict[str, Any] = {"generator": generator, "device": device}
    sets = []
    for _ in range(SETS):
        logits = torch.empty(rows, vocab, dtype=dtype, device=device)
        logits.normal_(std=2.0, generator=generator)
        labels = torch.randint(0, vocab, (rows,), **options)
        sets.append((logits, labels, *torch.randn(2, rows, **options).unbind()))
    return sets


def fits(name: str, run: Callable[[int], Any], absent: dict[str, str]) -> bool:
    """Whether a device has the memory for a contender."""
    try:
        run(0)
    except torch.OutOfMemoryError as problem:
        absent[name] = str(problem).split(". ")[0]
        torch.cuda.empty_cache()
        return False
    return True


def run_case(
    rows: int,
    vocab: int,
    dtype: str,
    case: tuple[str, bool, bool],
    session: harness.Session,
) -> list[harness.Row]:
    what, with_entropy, backward = case
    label = f"[{rows}, {vocab}] {dtype} {what}"
    sets = draw(rows, vocab, DTYPES[dtype], session.device)
    absent = session.report.absent
    error_of: Callable[..., float] = forward_error
    if backward:
        error_of = partial(backward_error, with_entropy=with_entropy)
    own = own_ops(with_entropy, backward, sets[0][0])
    ops = {**own, **peer_ops(with_entropy, backward, sets[0], absent)}
    # All before the first run, because those in place overwrite their logits.
    errors = {name: error_of(op, sets) for name, op in ops.items()}
    limit = errors["log_softmax"] + 1e-6
    nbytes = harness.bytes_of(sets[0][0])
    contenders = []
    for name, op in ops.items():
        run = partial(both if backward else forward, op, sets)
        if fits(f"{label}: {name}", run, absent):
            returned = nbytes if backward and "in place" not in name else 0
            allowed = limit if name in own else PEER_LIMIT
            contenders.append(
                harness.Contender(name, run, errors[name], allowed, name in own, returned)
            )
    return harness.measure(
        label,
        contenders,
        sets=SETS,
        bytes_moved=3 * nbytes if backward else nbytes,
        **session.limits(),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = harness.parser("log-prob and entropy from logits")
    parser.add_argument("--shape", nargs="+", help="ROWSxVOCAB")
    parser.add_argument("--dtype", nargs="+", default=tuple(DTYPES), choices=tuple(DTYPES))
    parser.add_argument("--forward-only", action="store_true")
    options = parser.parse_args(arguments)
    session = harness.start(options)
    problem = native.missing("logprobs_from_logits_forward", "logprobs_from_logits_backward")
    if problem and session.device.type == "cpu":
        print(f"nothing to measure: {problem}", file=sys.stderr)
        return 1
    shapes = options.shape or SHAPES[session.device.type]
    for case in CASES:
        if case[2] and options.forward_only:
            continue
        for shape in shapes[:1] if options.quick else shapes:
            rows, vocab = (int(part) for part in shape.split("x"))
            for dtype in options.dtype:
                session.add(run_case(rows, vocab, dtype, case, session))
    return session.finish()


if __name__ == "__main__":
    sys.exit(main())
