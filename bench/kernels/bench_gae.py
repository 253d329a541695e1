"""GAE against PyTorch, on the CPU (C++) or a GPU.

    python -m bench.kernels.bench_gae [--rows 64] [--columns 2048] [--device cpu] [--threads 2]
                                      [--repeats 15] [--quick] [--json FILE]

Contenders, all fp32 in and out, on the same rotated inputs:

    cpu, cuda    rlhf_fast_kernels.gae, by the implementation that it chooses on the device
    eager loop   the reference: a loop over time steps, batched over rows, that carries value and
                 advantage across masked steps (the rule that the op implements)
    dense loop   the leanest loop in use: deltas for all steps at once, then one multiply-add per
                 step; only right when masks are trailing padding
    matmul       no loop: the deltas times the [R, R] triangle of powers of gamma*lambda; the same
                 restriction, O(R^2) work, and the triangle is made outside the timing

torch.compile is not a contender: it unrolls the loop (2048 steps are some 10,000 graph nodes). The
speed-up in the table is against the fastest contender; the goal, 200, is against the eager loop.
Inputs come from memory, not from a cache: a single call on warm inputs is several times faster. The
error is the largest one of advantages and returns against an fp64 recurrence, relative to the
largest value; the gate is that of the eager loop plus 1e-6 (matmul: plus 1e-5).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

import torch

from bench.kernels import harness
from rlhf_fast_kernels import gae, native, reference

GAMMA, LAMBDA = 1.0, 0.95
# Rewards, values and mask are read, advantages and returns written.
BYTES_PER_TOKEN = 4 + 4 + 1 + 4 + 4
CALLS = 8  # in a turn, each on the next cold input set: one call alone times its neighbours' caches
TARGET = 200.0
# The inputs rotate through more memory than the last-level cache of a server core complex holds.
ROTATED_BYTES = 128 << 20

Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
Op = Callable[[Inputs], tuple[torch.Tensor, torch.Tensor]]


def draw_inputs(rows: int, columns: int, count: int, device: torch.device) -> list[Inputs]:
    """Normal rewards and values; lengths uniform in [columns / 2, columns]."""
    generator = torch.Generator().manual_seed(0)
    sets = []
    for _ in range(count):
        rewards, values = torch.randn(2, rows, columns, generator=generator).unbind()
        lengths = torch.randint(columns // 2, columns + 1, (rows, 1), generator=generator)
        mask = torch.arange(columns) < lengths
        sets.append((rewards.to(device), values.to(device), mask.to(device)))
    return sets


def ours(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    return gae(*inputs, gamma=GAMMA, gae_lambda=LAMBDA)


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


def make_matmul(columns: int, device: torch.device) -> Op:
    steps = torch.arange(columns, device=device)
    distance = (steps[:, None] - steps).double()  # row: source step, column: target step
    powers = torch.where(distance >= 0, (GAMMA * LAMBDA) ** distance, 0.0).float()

    def matmul(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
        delta, values = deltas(inputs)
        advantages = torch.where(inputs[2], delta @ powers, 0.0)
        return advantages, advantages + values

    return matmul


def largest_error(run: Op, inputs: Inputs) -> float:
    rewards, values, mask = inputs
    truth = reference.gae(rewards.double(), values.double(), mask, GAMMA, LAMBDA)
    return max(
        float((x.double() - y).abs().max() / y.abs().max())
        for x, y in zip(run(inputs), truth, strict=True)
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = harness.parser("GAE against PyTorch", repeats=15)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--columns", type=int, default=2048)
    options = parser.parse_args(arguments)
    session = harness.start(options)
    device = session.device
    reason = native.missing("gae")
    if reason is not None and device.type == "cpu":
        print(f"no compiled module: {reason}")
        return 1
    tokens = options.rows * options.columns
    count = max(2, ROTATED_BYTES // (9 * tokens))
    sets = draw_inputs(options.rows, options.columns, count, device)
    own = harness.implementation("gae", *sets[0])
    limit = largest_error(eager_loop, sets[0]) + 1e-6

    def contender(name: str, op: Op, slack: float = 0.0) -> harness.Contender:
        error = largest_error(op, sets[0])
        return harness.Contender(
            name, lambda k: op(sets[k]), error, limit + slack, ours=name == own
        )

    rows = harness.measure(
        f"GAE [{options.rows}, {options.columns}] fp32, {len(sets)} rotated input sets",
        [
            contender(own, ours),
            contender("eager loop", eager_loop),
            contender("dense loop", dense_loop),
            contender("matmul", make_matmul(options.columns, device), slack=9e-6),
        ],
        sets=len(sets),
        calls=CALLS,
        bytes_moved=tokens * BYTES_PER_TOKEN,
        **session.limits(),
    )
    session.add(rows)
    medians = {row.contender: row.median_ms for row in rows}
    if medians[own] is not None and medians["eager loop"] is not None:
        ratio = medians["eager loop"] / medians[own]
        verdict = "met" if ratio >= TARGET else "MISSED"
        print(f"{own} against the eager loop: {ratio:.0f}x (goal {TARGET:.0f}x: {verdict})")
    return session.finish()


if __name__ == "__main__":
    sys.exit(main())
