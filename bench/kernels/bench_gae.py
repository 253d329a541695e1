"""GAE in C++ against PyTorch on this machine's CPU.

    python -m bench.kernels.bench_gae [--rows 64] [--columns 2048] [--threads 2] [--repeats 15]

Contenders, all fp32 in and out, on the same rotated inputs:

    cpu          rlhf_fast_kernels.gae(impl="cpu")
    eager loop   the reference: a loop over time steps, batched over rows, that carries value and
                 advantage across masked steps (the rule that the op implements)
    dense loop   the leanest loop in use: deltas for all steps at once, then one multiply-add per
                 step; only right when masks are trailing padding
    matmul       no loop: the deltas times the [R, R] triangle of powers of gamma*lambda; the same
                 restriction, O(R^2) work, and the triangle is made outside the timing

torch.compile is not a contender: it unrolls the loop (2048 steps are some 10,000 graph nodes).
Times are medians of interleaved repeats; the error is the largest one against an fp64 recurrence,
relative to the largest advantage. Exits 1 if an error exceeds that of the eager loop by more than
1e-6, or without the compiled module.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import torch

from rlhf_fast_kernels import gae, native, reference

GAMMA, LAMBDA = 1.0, 0.95
# Reads of rewards, values and mask, writes of advantages and returns.
BYTES_PER_TOKEN = 4 + 4 + 1 + 4 + 4
TARGET = 200.0
# The inputs rotate through more memory than the last-level cache of a server core complex holds.
ROTATED_BYTES = 128 << 20

Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
Contender = Callable[[Inputs], tuple[torch.Tensor, torch.Tensor]]


def draw_inputs(rows: int, columns: int, count: int) -> list[Inputs]:
    """Normal rewards and values; lengths uniform in [columns / 2, columns]."""
    generator = torch.Generator().manual_seed(0)
    sets = []
    for _ in range(count):
        rewards, values = torch.randn(2, rows, columns, generator=generator).unbind()
        lengths = torch.randint(columns // 2, columns + 1, (rows, 1), generator=generator)
        sets.append((rewards, values, torch.arange(columns) < lengths))
    return sets


def cpp(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    return gae(*inputs, gamma=GAMMA, gae_lambda=LAMBDA, impl="cpu")


def eager_loop(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    return gae(*inputs, gamma=GAMMA, gae_lambda=LAMBDA, impl="reference")


def deltas(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    rewards, values, mask = inputs
    values = torch.where(mask, values, 0.0)
    following = torch.nn.functional.pad(values[:, 1:], (0, 1))
    return torch.where(mask, rewards + GAMMA * following - values, 0.0), values


def dense_loop(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    delta, values = deltas(inputs)
    advantage = delta.new_zeros(delta.shape[0])
    columns = []
    for step in reversed(delta.unbind(1)):
        advantage = torch.add(step, advantage, alpha=GAMMA * LAMBDA)
        columns.append(advantage)
    advantages = torch.where(inputs[2], torch.stack(columns[::-1], dim=1), 0.0)
    return advantages, advantages + values


def make_matmul(columns: int) -> Contender:
    steps = torch.arange(columns)
    distance = (steps[:, None] - steps).double()  # row: source step, column: target step
    powers = torch.where(distance >= 0, (GAMMA * LAMBDA) ** distance, 0.0).float()

    def matmul(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
        delta, values = deltas(inputs)
        advantages = torch.where(inputs[2], delta @ powers, 0.0)
        return advantages, advantages + values

    return matmul


def interleaved(
    contenders: dict[str, Contender], sets: list[Inputs], repeats: int
) -> tuple[dict[str, float], float]:
    """Median seconds of each contender, and bytes per second of one streaming read of 256 MB.

    All take turns, so that they meet the same machine.
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}
    reads = []
    stream = torch.ones(64 << 20)
    for repeat in range(repeats + 1):
        for name, run in contenders.items():
            # The fast one goes through all sets in a turn: a clock tick is not a measurement.
            chosen = sets if name == "cpu" else [sets[repeat % len(sets)]]
            start = time.perf_counter()
            for inputs in chosen:
                run(inputs)
            if repeat:  # the first turn warms up
                times[name].append((time.perf_counter() - start) / len(chosen))
        start = time.perf_counter()
        stream.sum()
        reads.append(time.perf_counter() - start)
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    return medians, stream.nbytes / statistics.median(reads)


def largest_error(run: Contender, inputs: Inputs) -> float:
    rewards, values, mask = inputs
    truth = reference.gae(rewards.double(), values.double(), mask, GAMMA, LAMBDA)[0]
    return float((run(inputs)[0].double() - truth).abs().max() / truth.abs().max())


def main() -> int:
    parser = argparse.ArgumentParser(description="GAE in C++ against PyTorch")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--columns", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    reason = native.missing("gae")
    if reason is not None:
        print(f"no compiled module: {reason}")
        return 1
    tokens = options.rows * options.columns
    sets = draw_inputs(options.rows, options.columns, max(2, ROTATED_BYTES // (9 * tokens)))
    contenders = {
        "cpu": cpp,
        "eager loop": eager_loop,
        "dense loop": dense_loop,
        "matmul": make_matmul(options.columns),
    }
    medians, bandwidth = interleaved(contenders, sets, options.repeats)
    errors = {name: largest_error(run, sets[0]) for name, run in contenders.items()}
    print(
        f"GAE [{options.rows}, {options.columns}] fp32, {options.threads} threads, "
        f"{len(sets)} rotated input sets; {native.describe()['cpu']}"
    )
    print(f"{'contender':12} {'ms':>9} {'cpu is':>10} {'GB/s':>7} {'of read bw':>10} {'error':>9}")
    for name, seconds in medians.items():
        rate = tokens * BYTES_PER_TOKEN / seconds
        print(
            f"{name:12} {seconds * 1e3:9.3f} {seconds / medians['cpu']:9.1f}x {rate / 1e9:7.2f} "
            f"{rate / bandwidth:10.1%} {errors[name]:9.1e}"
        )
    ratio = medians["eager loop"] / medians["cpu"]
    print(
        f"read bandwidth {bandwidth / 1e9:.1f} GB/s; C++ against the eager loop {ratio:.0f}x "
        f"(goal {TARGET:.0f}x: {'met' if ratio >= TARGET else 'MISSED'})"
    )
    return 0 if errors["cpu"] <= errors["eager loop"] + 1e-6 else 1


if __name__ == "__main__":
    sys.exit(main())
