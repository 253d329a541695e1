"""A head cut over ranks: its rows stay where they are, or are gathered for the call.

    torchrun --nproc-per-node 2 -m bench.distributed.bench_vocab_parallel [--device cpu|cuda]
        [--tokens 1024] [--hidden 1024] [--vocab 32000] [--dtype fp32|bf16] [--repeats 5]
        [--json FILE]

`vocab parallel` is `rlhf_fast.distributed.vocab_parallel`. `gather` gathers the weight in the
compute dtype, keeps it for backward, runs the op of one process on this rank's tokens and
reduce-scatters the weight's gradient in fp32, which is what FSDP does with a head. Both get fp32
weights; every rank has `--tokens` tokens, all of which count. Contenders take turns; a call's time
is that of the slowest rank, medians are printed.

`received` are the bytes that a rank receives by the volume of the collectives; gloo may move more.
Peak memory, beyond the inputs, is measured on GPUs only.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import rlhf_fast_kernels
from rlhf_fast.distributed import vocab_rows
from rlhf_fast.distributed.vocab_parallel import VocabParallel
from rlhf_fast.distributed.vocab_rows import Group, all_gather
from rlhf_fast.distributed.world import World

from ..kernels.environment import environment
from ..kernels.tables import print_environment

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
WARMUPS = 1


@dataclass
class Row:
    """One line of the table.

    Attributes:
        error: largest difference of log-probs, and of the weight's gradient over its largest entry,
            to those of the other contender.
        ranks_ms: median of each rank.
    """

    case: str
    contender: str
    median_ms: float
    ranks_ms: list[float]
    received_mib: float
    collectives: int
    error: float
    peak_mib: float | None


class GatheredHead(torch.autograd.Function):
    """The whole weight in the compute dtype; its gradient goes back to the ranks in fp32."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, group: Group, dtype: torch.dtype) -> Tensor:
        ctx.group = group
        out = weight.new_empty(weight.shape[0] * group.size(), weight.shape[1], dtype=dtype)
        vocab_rows.all_gather(out, weight.to(dtype), group)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        rows = gradient.shape[0] // ctx.group.size()
        out = gradient.new_empty(rows, gradient.shape[1], dtype=torch.float32)
        work = vocab_rows.reduce_scatter(out, gradient.float(), ctx.group)
        work.wait()
        return out, None, None


class Gather:
    """The ops of one process on a weight that is gathered for the call."""

    def __init__(self, group: Group) -> None:
        self.group = group

    def __getattr__(self, name: str) -> Callable[..., Any]:
        op = getattr(rlhf_fast_kernels, name)

        def call(hidden: Tensor, weight: Tensor, labels: Tensor, **settings: Any) -> Any:
            whole = GatheredHead.apply(weight, self.group, hidden.dtype)
            return op(hidden, whole, labels, **settings)

        return call


class Traffic:
    """Collectives and the bytes that this rank receives in them."""

    def __init__(self) -> None:
        self.calls = self.received = 0

    @contextmanager
    def counted(self, ranks: int) -> Iterator[Traffic]:
        """Count what runs inside."""
        places = [(vocab_rows, "_gather", 0), (vocab_rows, "_scatter", 1)]
        places += [(dist, "all_to_all_single", 0)]
        inner = [getattr(owner, name) for owner, name, _ in places]
        for (owner, name, which), function in zip(places, inner, strict=True):
            setattr(owner, name, partial(self._call, function, which, ranks))
        try:
            yield self
        finally:
            for (owner, name, _), function in zip(places, inner, strict=True):
                setattr(owner, name, function)

    def _call(
        self, inner: Any, which: int, ranks: int, out: Tensor, own: Tensor, **more: Any
    ) -> Any:
        x = (out, own)[which]
        self.calls += 1
        self.received += x.numel() * x.element_size() * (ranks - 1) // ranks
        return inner(out, own, **more)


# ---- what is timed ------------------------------------------------------------------------------


@dataclass
class Inputs:
    hidden: Tensor
    weight: Tensor
    labels: Tensor
    old_logprobs: Tensor
    advantages: Tensor


def draw(options: argparse.Namespace, world: World) -> Inputs:
    generator = torch.Generator().manual_seed(world.shard_rank)
    tokens, rows = options.tokens, options.vocab // world.shards
    hidden = torch.randn(tokens, options.hidden, generator=generator)
    weight = torch.randn(rows, options.hidden, generator=generator) * 2 * options.hidden**-0.5
    labels = torch.randint(0, options.vocab, (tokens,), generator=generator)
    more = torch.randn(2, tokens, generator=generator)
    found = (hidden.to(DTYPES[options.dtype]), weight, labels, more[0] - 10, more[1])
    return Inputs(*(x.to(world.device) for x in found))


def forward(ops: Any, x: Inputs) -> tuple[Tensor, ...]:
    with torch.no_grad():
        return (ops.linear_logprobs(x.hidden, x.weight, x.labels)[0],)


def logprobs(ops: Any, x: Inputs) -> tuple[Tensor, ...]:
    leaves = [x.hidden.detach().requires_grad_(), x.weight.detach().requires_grad_()]
    found, _ = ops.linear_logprobs(*leaves, x.labels, with_entropy=False)
    (found * x.advantages).sum().backward()
    return (found.detach(), *(leaf.grad for leaf in leaves))


def loss(ops: Any, x: Inputs) -> tuple[Tensor, ...]:
    leaves = [x.hidden.detach().requires_grad_(), x.weight.detach().requires_grad_()]
    out = ops.linear_ppo_loss(
        *leaves,
        x.labels,
        old_logprobs=x.old_logprobs,
        advantages=x.advantages,
        normalizer=float(x.labels.numel()),
    )
    out.loss.backward()
    return (out.logprobs, *(leaf.grad for leaf in leaves))


CASES: dict[str, Callable[[Any, Inputs], tuple[Tensor, ...]]] = {
    "log-probs, forward": forward,
    "log-probs, forward + backward": logprobs,
    "PPO loss, forward + backward": loss,
}


def timed(world: World, call: Callable[[], Any]) -> float:
    """ms of this rank."""
    world.barrier()
    if world.device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if world.device.type == "cuda":
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start)


def peak(device: torch.device, call: Callable[[], Any]) -> float | None:
    """Call it; MiB of torch's allocator beyond what was there, on a GPU."""
    if device.type != "cuda":
        call()
        return None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def differences(first: tuple[Tensor, ...], second: tuple[Tensor, ...]) -> float:
    """Largest difference, each over the largest entry."""
    pairs = list(zip(first, second, strict=True))
    return max(float((a.float() - b.float()).abs().max() / a.float().abs().max()) for a, b in pairs)


def measure(case: str, world: World, options: argparse.Namespace) -> list[Row]:
    group = world.shard_mesh.get_group()
    contenders = {
        "vocab parallel": VocabParallel.like_shard(group, options.vocab),
        "gather": Gather(group),
    }
    x, run = draw(options, world), CASES[case]
    calls = {name: partial(run, ops, x) for name, ops in contenders.items()}
    outputs = {name: call() for name, call in calls.items()}
    error = torch.tensor(differences(*outputs.values()), device=world.device)
    dist.all_reduce(error, dist.ReduceOp.MAX)
    outputs.clear()
    times: dict[str, list[list[float]]] = {name: [] for name in calls}
    for turn in range(WARMUPS + options.repeats):
        for name, call in calls.items():
            own = torch.tensor([timed(world, call)], dtype=torch.float64, device=world.device)
            everyone = own.new_empty(world.size)
            all_gather(everyone, own, dist.group.WORLD)
            if turn >= WARMUPS:
                times[name].append(everyone.tolist())
    rows = []
    for name, call in calls.items():
        with Traffic().counted(world.shards) as traffic:
            memory = peak(world.device, call)
        slowest = statistics.median(max(turn) for turn in times[name])
        by_rank = [statistics.median(rank) for rank in zip(*times[name], strict=True)]
        received = traffic.received / 2**20
        rows.append(
            Row(case, name, slowest, by_rank, received, traffic.calls, float(error), memory)
        )
    return rows


def print_rows(rows: Sequence[Row]) -> None:
    print(f"\n{rows[0].case}; largest difference between the two {rows[0].error:.1e}")
    print(f"  {'':16}{'median ms':>12}{'received MiB':>14}{'collectives':>13}{'peak MiB':>10}")
    for row in rows:
        memory = "unmeasured" if row.peak_mib is None else f"{row.peak_mib:.0f}"
        print(
            f"  {row.contender:16}{row.median_ms:12.1f}{row.received_mib:14.1f}"
            f"{row.collectives:13}{memory:>12}"
        )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="a vocabulary head cut over ranks")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--tokens", type=int, default=1024, help="of each rank")
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--vocab", type=int, default=32000, help="a multiple of the ranks")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="fp32", help="of hidden states")
    parser.add_argument("--threads", type=int, default=1, help="of torch on the CPU, each rank")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", help="write the report to this file")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    device = torch.device("cpu")
    if options.device == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    world = World.join(device)
    if world.size == 1 or options.vocab % world.size:
        raise SystemExit("start it with torchrun on a number of ranks that divides --vocab")
    facts = environment(options.threads, device)
    if world.is_main:
        print_environment(facts)
        print(
            f"{world.size} ranks, {options.tokens} tokens each, H {options.hidden}, "
            f"V {options.vocab}, {options.dtype}"
        )
    rows: list[Row] = []
    for case in CASES:
        rows += measure(case, world, options)
        if world.is_main:
            print_rows(rows[-2:])
    if world.is_main and options.json:
        report = {
            "environment": facts,
            "arguments": vars(options),
            "rows": [asdict(r) for r in rows],
        }
        Path(options.json).write_text(json.dumps(report, indent=1) + "\n")
    world.leave()
    return 0


if __name__ == "__main__":
    sys.exit(main())
