"""The exact KL of two rows of logits against F.kl_div, torch.compile and the sampled k3.

    python -m bench.kernels.bench_kl [--device cpu] [--threads 2] [--repeats 9] [--quick]
                                     [--shape 256x151936 ...] [--dtype fp32|bf16 ...]
                                     [--forward-only] [--json FILE]

Peers, in fp32 as trainers compute them:

    kl_div            F.kl_div of two log_softmax, log_target, summed over the vocabulary
    log_softmax       sum of p (log p - log q) of the same
    compile ...       torch.compile of either
    k3, for scale     exp(d) - 1 - d of one sampled token's log-probs, both by logsumexp: an
                      estimate, not the KL, so its error has no gate and it sets no gain

The actor's logits are the reference's plus noise of 0.01, a KL of 5e-5: a policy a few steps from
its start. The error is relative to the KL, in fp64, on 48 rows (gradient: to its largest entry);
the gate is that of kl_div plus 1e-6. The bytes are one read of both sides, and with backward
another and one write.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rlhf_fast_kernels import kl_from_logits, native

from . import harness

OP = "kl_from_logits"
SHAPES = {"cpu": ("256x151936", "2048x32000"), "cuda": ("8192x151936", "256x151936")}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
NOISE = 0.01
SETS = 2  # of 156 MB or more: every one alone exceeds the caches
ERROR_ROWS = 48
PEER_LIMIT = 10.0
NO_LIMIT = 1e30

Op = Callable[[Tensor, Tensor], Tensor]
Inputs = tuple[Tensor, Tensor, Tensor]


# ---- contenders ---------------------------------------------------------------------------------


def kl_div(logits: Tensor, ref_logits: Tensor) -> Tensor:
    log_p = torch.log_softmax(logits.float(), dim=-1)
    log_q = torch.log_softmax(ref_logits.float(), dim=-1)
    return torch.nn.functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)


def log_softmax(logits: Tensor, ref_logits: Tensor) -> Tensor:
    log_p = torch.log_softmax(logits.float(), dim=-1)
    log_q = torch.log_softmax(ref_logits.float(), dim=-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def sampled_k3(logits: Tensor, ref_logits: Tensor) -> Tensor:
    """Of token 0, which costs as much as one that was sampled."""
    logits, ref_logits = logits.float(), ref_logits.float()
    log_p = logits[:, 0] - torch.logsumexp(logits, dim=-1)
    d = ref_logits[:, 0] - torch.logsumexp(ref_logits, dim=-1) - log_p
    return torch.expm1(d) - d


def exact(logits: Tensor, ref_logits: Tensor) -> Tensor:
    log_p = torch.log_softmax(logits.double(), dim=-1)
    return (log_p.exp() * (log_p - torch.log_softmax(ref_logits.double(), dim=-1))).sum(-1)


def contenders(backward: bool, sample: Inputs) -> tuple[dict[str, Op], dict[str, Op]]:
    """(ours, peers)."""
    name = f"rlhf_fast {harness.implementation(OP, sample[0])}"
    own: dict[str, Op] = {name: kl_from_logits}
    if backward:
        own[f"{name}, in place"] = partial(kl_from_logits, inplace_backward=True)
    peers: dict[str, Op] = {"kl_div": kl_div, "log_softmax": log_softmax}
    for peer, op in tuple(peers.items()):
        torch.compiler.reset()
        fast = harness.compiled(op, sample[:2])
        if fast is not None:
            peers[f"compile {peer}"] = fast
    return own, peers


# ---- what is run --------------------------------------------------------------------------------


def forward(op: Op, sets: list[Inputs], k: int) -> Any:
    with torch.no_grad():
        return op(*sets[k][:2])


def both(op: Op, sets: list[Inputs], k: int) -> Tensor:
    """Forward and backward from the output of a model.

    Those in place leave a gradient in the set: other logits, and the same work, for the next turn.
    """
    logits, ref_logits, upstream = sets[k]
    output = harness.model_output(logits)
    kl = op(output, ref_logits)
    return torch.autograd.grad(kl, output, upstream.to(kl.dtype))[0]


def error(op: Op, sets: list[Inputs], backward: bool) -> float:
    logits, ref_logits, upstream = (x[:ERROR_ROWS].clone() for x in sets[0])
    if backward:
        want = both(exact, [(logits.double(), ref_logits, upstream)], 0)
        got = both(op, [(logits, ref_logits, upstream)], 0).double()
        return float((got - want).abs().max() / want.abs().max())
    want = exact(logits, ref_logits)
    got = forward(op, [(logits, ref_logits, upstream)], 0).double()
    return float(((got - want).abs() / want).max())


def draw(rows: int, vocab: int, dtype: torch.dtype, device: torch.device) -> list[Inputs]:
    generator = torch.Generator(device).manual_seed(0)
    sets = []
    for _ in range(SETS):
        ref_logits = torch.empty(rows, vocab, device=device).normal_(std=2.0, generator=generator)
        noise = torch.empty(rows, vocab, device=device).normal_(std=NOISE, generator=generator)
        logits = noise.add_(ref_logits).to(dtype)
        upstream = torch.randn(rows, generator=generator, device=device)
        sets.append((logits, ref_logits.to(dtype), upstream))
    return sets


def run_case(
    rows: int, vocab: int, dtype: str, backward: bool, session: harness.Session
) -> list[harness.Row]:
    sets = draw(rows, vocab, DTYPES[dtype], session.device)
    own, peers = contenders(backward, sets[0])
    # All before the first run, because those in place overwrite their logits.
    errors = {name: error(op, sets, backward) for name, op in {**own, **peers}.items()}
    apart = error(sampled_k3, sets, backward)
    limit = errors["kl_div"] + 1e-6
    run = both if backward else forward
    nbytes = harness.bytes_of(sets[0][0])
    found = []
    for name, op in {**own, **peers}.items():
        returned = nbytes if backward and "in place" not in name else 0
        allowed = limit if name in own else PEER_LIMIT
        found.append(
            harness.Contender(
                name, partial(run, op, sets), errors[name], allowed, name in own, returned
            )
        )
    what = "forward + backward" if backward else "forward"
    measured = partial(harness.measure, sets=SETS, **session.limits())
    moved = (5 if backward else 2) * nbytes
    table = measured(f"[{rows}, {vocab}] {dtype} {what}", found, bytes_moved=moved)
    scale = harness.Contender("k3, for scale", partial(run, sampled_k3, sets), apart, NO_LIMIT)
    return [*table, *measured(f"[{rows}, {vocab}] {dtype} {what}", [scale], bytes_moved=moved)]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = harness.parser("the exact KL of two rows of logits")
    parser.add_argument("--shape", nargs="+", help="ROWSxVOCAB")
    parser.add_argument("--dtype", nargs="+", default=tuple(DTYPES), choices=tuple(DTYPES))
    parser.add_argument("--forward-only", action="store_true")
    options = parser.parse_args(arguments)
    session = harness.start(options)
    problem = native.missing(f"{OP}_forward", f"{OP}_backward")
    if problem and session.device.type == "cpu":
        print(f"nothing to measure: {problem}", file=sys.stderr)
        return 1
    shapes = options.shape or SHAPES[session.device.type]
    for backward in (False,) if options.forward_only else (False, True):
        for shape in shapes[:1] if options.quick else shapes:
            rows, vocab = (int(part) for part in shape.split("x"))
            for dtype in options.dtype:
                session.add(run_case(rows, vocab, dtype, backward, session))
    return session.finish()


if __name__ == "__main__":
    sys.exit(main())
