"""Log-prob and entropy from hidden states: the chunked op against all logits at once.

    python -m bench.kernels.bench_linear_logprobs [--threads 2] [--repeats 5] [--device cpu|cuda]
        [--shape 1024x1024x32000 ...] [--dtype fp32|bf16 ...] [--json FILE]

Shapes are TOKENSxHIDDENxVOCAB. Contenders:

    matmul           the bare product hidden weight^T, in the op's own chunks: the floor
    all logits       product, log_softmax, gather, -(p log p) summed (what trainers run)
    chunked autograd the same for 512 tokens at a time under checkpointing (verl's torch scheme)
    compile ...      torch.compile of all logits

Forward + backward takes random upstream gradients of both outputs. "half masked" leaves every
second token out: it must halve the time. The error is the largest of log-prob and entropy against
fp64 on 32 tokens; the gate is 2e-5 for ours and 5e-2 for peers, whose bf16 logits are off by 1e-2.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from rlhf_fast_kernels import linear_logprobs, reference
from rlhf_fast_kernels.linear_head import Head, chunk_bounds

from . import harness, linear_peers, peers

SHAPES = {
    "cpu": ("1024x256x32000", "1024x1024x32000", "512x1024x151936"),
    "cuda": ("16384x4096x151936", "16384x4096x128256", "4096x896x151936"),
}
OP = "linear_logprobs"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SETS = 2
ERROR_TOKENS = 32

Op = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor | None]]
Inputs = tuple[Tensor, ...]


def draw(
    tokens: int, width: int, vocab: int, dtype: torch.dtype, device: torch.device
) -> list[Inputs]:
    generator = torch.Generator().manual_seed(0)
    sets = []
    for _ in range(SETS):
        hidden = torch.randn(tokens, width, generator=generator)
        weight = torch.randn(vocab, width, generator=generator) * 2 * width**-0.5
        labels = torch.randint(0, vocab, (tokens,), generator=generator)
        upstream = torch.randn(2, tokens, generator=generator)
        floats = (x.to(device, dtype) for x in (hidden, weight))
        sets.append((*floats, labels.to(device), *upstream.to(device)))
    return sets


def half_masked(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor | None]:
    return linear_logprobs(hidden, weight, labels.index_fill(0, _even(labels), -100))


def _even(labels: Tensor) -> Tensor:
    return torch.arange(0, labels.shape[0], 2, device=labels.device)


def matmul(hidden: Tensor, weight: Tensor) -> Tensor:
    """The products of the forward and nothing else."""
    head = Head(weight, None, hidden.dtype).rounded()
    bounds = chunk_bounds(hidden.shape[0], head.vocab, hidden.device, None)
    largest = max(b - a for a, b in pairwise(bounds))
    logits = torch.empty(largest, head.vocab, device=hidden.device)
    for start, stop in pairwise(bounds):
        head.logits(head.operand(hidden[start:stop]), logits[: stop - start])
    return logits


def forward(op: Op, sets: list[Inputs], k: int) -> Any:
    with torch.no_grad():
        return op(*sets[k][:3])


def both(op: Op, sets: list[Inputs], k: int) -> Any:
    hidden, weight, labels, g, h = sets[k]
    leaves = [hidden.detach().requires_grad_(), weight.detach().requires_grad_()]
    logprobs, entropy = op(*leaves, labels)
    return torch.autograd.grad([logprobs, entropy], leaves, [g, h])


def first_tokens(inputs: Inputs) -> Inputs:
    """Few tokens and the whole weight."""
    return tuple(x if i == 1 else x[:ERROR_TOKENS] for i, x in enumerate(inputs))


def error(op: Op, sets: list[Inputs]) -> float:
    hidden, weight, labels = first_tokens(sets[0])[:3]
    with torch.no_grad():
        got = op(hidden, weight, labels)
        exact = reference.linear_logprobs(hidden.double(), weight.double(), labels)
    kept = got[0] != 0
    return max(float((a.double() - b)[kept].abs().max()) for a, b in zip(got, exact, strict=True))


def contenders(
    sets: list[Inputs], backward: bool, session: harness.Session
) -> list[harness.Contender]:
    run = both if backward else forward
    own: dict[str, Op] = {"rlhf_fast": linear_logprobs, "rlhf_fast, half masked": half_masked}
    other: dict[str, Op] = {"all logits": linear_peers.all_logits}
    if backward:
        other["chunked autograd"] = linear_peers.chunked_autograd
    torch.compiler.reset()
    fast = harness.compiled(linear_peers.all_logits, sets[0][:3])
    if fast is not None:
        other["compile all logits"] = fast

    def trial(op: Op) -> None:
        few = first_tokens(sets[0])
        if op(*few[:3])[1] is None:
            raise ValueError("gives no entropy")
        run(op, [few], 0)

    found, absent = peers.usable(OP, session.device, trial)
    session.report.absent |= absent
    other |= found
    returned = harness.bytes_of(*sets[0][:2]) if backward else 0
    result = [
        harness.Contender(
            name,
            partial(run, op, sets),
            error(op, sets),
            2e-5 if name in own else 5e-2,
            ours=name in own,
            returned_bytes=returned,
        )
        for name, op in {**own, **other}.items()
    ]
    if not backward:
        bare = partial(lambda k: matmul(*sets[k][:2]))
        # The floor, and nobody's rival: as one of ours it is in no gain.
        result.append(harness.Contender("matmul", bare, 0.0, 0.0, ours=True))
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    parser = harness.parser("log-prob and entropy from hidden states", repeats=5)
    parser.add_argument("--shape", nargs="+", help="TOKENSxHIDDENxVOCAB")
    parser.add_argument("--dtype", nargs="+", choices=tuple(DTYPES))
    options = parser.parse_args(arguments)
    session = harness.start(options)
    kind = session.device.type
    dtypes = options.dtype or (("fp32", "bf16") if kind == "cpu" else ("bf16",))
    for shape in options.shape or (SHAPES[kind][:1] if session.quick else SHAPES[kind]):
        tokens, width, vocab = (int(part) for part in shape.split("x"))
        for dtype in dtypes:
            sets = draw(tokens, width, vocab, DTYPES[dtype], session.device)
            for backward in (False, True):
                what = "forward + backward" if backward else "forward"
                rows = harness.measure(
                    f"[{tokens}, {width}] x [{vocab}, {width}] {dtype} {what}",
                    contenders(sets, backward, session),
                    sets=SETS,
                    bytes_moved=harness.bytes_of(*sets[0][:2]),
                    flops=(8 if backward else 2) * tokens * width * vocab,
                    matmul=session.matmul(DTYPES[dtype], (tokens, vocab, width)),
                    **session.limits(),
                )
                session.add(rows)
    return session.finish()


if __name__ == "__main__":
    sys.exit(main())
