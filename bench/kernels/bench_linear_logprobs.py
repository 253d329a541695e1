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

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from bench.kernels import harness, linear_peers
from rlhf_fast_kernels import linear_logprobs, reference
from rlhf_fast_kernels.linear_head import Head, chunk_bounds

SHAPES = {
    "cpu": ("1024x256x32000", "1024x1024x32000", "512x1024x151936"),
    "cuda": ("16384x4096x151936", "16384x4096x128256", "4096x896x151936"),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SETS = 2
ERROR_TOKENS = 32

Op = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor | None]]
Inputs = tuple[Tensor, ...]


def draw(tokens: int, width: int, vocab: int, dtype: torch.dtype, device: str) -> list[Inputs]:
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


def error(op: Op, sets: list[Inputs]) -> float:
    hidden, weight, labels = (x[:ERROR_TOKENS] if i != 1 else x for i, x in enumerate(sets[0][:3]))
    with torch.no_grad():
        got = op(hidden, weight, labels)
        exact = reference.linear_logprobs(hidden.double(), weight.double(), labels)
    kept = got[0] != 0
    return max(float((a.double() - b)[kept].abs().max()) for a, b in zip(got, exact, strict=True))


def contenders(
    sets: list[Inputs], run: Callable[..., Any], backward: bool
) -> list[harness.Contender]:
    own: dict[str, Op] = {"rlhf_fast": linear_logprobs, "rlhf_fast, half masked": half_masked}
    peers: dict[str, Op] = {"all logits": linear_peers.all_logits}
    if backward:
        peers["chunked autograd"] = linear_peers.chunked_autograd
    torch.compiler.reset()
    fast = harness.compiled(linear_peers.all_logits, sets[0][:3])
    if fast is not None:
        peers["compile all logits"] = fast
    found = [
        harness.Contender(
            name,
            partial(run, op, sets),
            error(op, sets),
            2e-5 if name in own else 5e-2,
            name in own,
        )
        for name, op in {**own, **peers}.items()
    ]
    if not backward:
        bare = harness.Contender("matmul", lambda k: matmul(*sets[k][:2]), 0.0, 0.0)
        found.append(bare)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="log-prob and entropy from hidden states")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu", choices=tuple(SHAPES))
    parser.add_argument("--shape", nargs="+", help="TOKENSxHIDDENxVOCAB")
    parser.add_argument("--dtype", nargs="+", choices=tuple(DTYPES))
    parser.add_argument("--json", help="write the report to this file")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    probe = harness.ReadProbe()
    report = harness.Report(harness.environment(options.threads))
    harness.print_environment(report.environment)
    dtypes = options.dtype or (("fp32", "bf16") if options.device == "cpu" else ("bf16",))
    for shape in options.shape or SHAPES[options.device]:
        tokens, width, vocab = (int(part) for part in shape.split("x"))
        for dtype in dtypes:
            sets = draw(tokens, width, vocab, DTYPES[dtype], options.device)
            for backward in (False, True):
                what = "forward + backward" if backward else "forward"
                rows = harness.measure(
                    f"[{tokens}, {width}] x [{vocab}, {width}] {dtype} {what}",
                    contenders(sets, both if backward else forward, backward),
                    sets=SETS,
                    bytes_moved=weight_bytes(sets[0]),
                    probe=probe,
                    repeats=options.repeats,
                )
                harness.print_rows(rows)
                report.rows += rows
    harness.write_json(report, options.json)
    return harness.exit_code(report.rows)


def weight_bytes(inputs: Inputs) -> int:
    return sum(x.numel() * x.element_size() for x in inputs[:2])


if __name__ == "__main__":
    sys.exit(main())
