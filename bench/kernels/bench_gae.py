"""GAE, the fused reward op and whitening against PyTorch, on the CPU (C++) or a GPU.

    python -m bench.kernels.bench_gae [--case gae long fused whiten] [--rows 64] [--columns 2048]
                                      [--device cpu] [--threads 2] [--repeats 15] [--quick]
                                      [--json FILE]

Ours is the implementation that the op chooses on the device. Cases, all fp32 in and out, on the
same rotated inputs:

    gae      rlhf_fast_kernels.gae against an eager loop over time (the reference), the leanest loop
             in use, a product with the [R, R] triangle of powers, and slime's chunked scan
    long     the same at one sequence of 32768 tokens, where the eager loop runs once
    fused    KL, rewards, GAE, returns and whitening, two calls, against the chain of PyTorch ops
             that trainers run, with the loop and with the chunked scan
    whiten   whitening alone

torch.compile is no contender in the loops: it unrolls them, 2048 steps are some 10,000 graph nodes.
The gain in the table is against the fastest contender; the goals name theirs. Inputs come from
memory, not from a cache: a single call on warm inputs is several times faster. The error is the
largest one of all results against fp64, relative to the largest value; the gate is that of the
eager loop plus 1e-6 (products: plus 1e-5).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rlhf_fast_kernels import gae, native, reference, rewards_and_gae, whiten

from . import harness
from .gae_peers import (
    GAMMA,
    KL_COEF,
    LAMBDA,
    Inputs,
    Rollout,
    dense_loop,
    eager_loop,
    make_chunked_scan,
    make_eager_chain,
    make_matmul,
    masked_whiten,
)

CASES = ("gae", "long", "fused", "whiten")
LONG = 32768
CALLS = 8  # in a turn, each on the next cold input set: one call alone times its neighbours' caches
# The inputs rotate through more memory than the last-level cache of a server core complex holds.
ROTATED_BYTES = 128 << 20
MOST_SETS = 256  # of the smallest shapes, which mean nothing
# (case, contender): how many times as fast the C++ must be.
GOALS = {
    ("gae", "eager loop"): 200.0,
    ("gae", "chunked scan"): 8.0,
    ("long", "eager loop"): 5000.0,
}
SLACK = {"matmul": 9e-6, "chunked scan": 9e-6}

# One way through a case: a name, and a function from an input set to the results that are checked.
Way = tuple[str, Callable[[Any], Sequence[Tensor]]]


def draw_rollouts(rows: int, columns: int, device: torch.device) -> list[Rollout]:
    """Normal numbers; lengths uniform in [columns / 2, columns]."""
    generator = torch.Generator().manual_seed(0)
    sets = []
    for _ in range(min(MOST_SETS, max(2, ROTATED_BYTES // (13 * rows * columns)))):
        old, ref, values = torch.randn(3, rows, columns, generator=generator).unbind()
        lengths = torch.randint(columns // 2, columns + 1, (rows, 1), generator=generator)
        scores = torch.randn(rows, generator=generator)
        mask = torch.arange(columns) < lengths
        sets.append(tuple(x.to(device) for x in (old, ref, values, scores, mask)))
    return sets


# ---- ours ---------------------------------------------------------------------------------------


def our_gae(inputs: Inputs) -> tuple[Tensor, Tensor]:
    return gae(*inputs, gamma=GAMMA, gae_lambda=LAMBDA)


def our_fused(rollout: Rollout) -> tuple[Tensor, Tensor]:
    out = rewards_and_gae(*rollout, kl_coef=KL_COEF, gamma=GAMMA, gae_lambda=LAMBDA)
    return whiten(out.advantages, rollout[-1], stats=out.moments), out.returns


def our_whiten(inputs: Inputs) -> tuple[Tensor]:
    return (whiten(inputs[1], inputs[2]),)


# ---- truth --------------------------------------------------------------------------------------


def true_gae(inputs: Inputs) -> tuple[Tensor, Tensor]:
    rewards, values, mask = inputs
    return reference.gae(rewards.double(), values.double(), mask, GAMMA, LAMBDA)


def true_fused(rollout: Rollout) -> tuple[Tensor, Tensor]:
    old, ref, values, scores = (x.double() for x in rollout[:4])
    settings = {"kl_coef": KL_COEF, "gamma": GAMMA, "gae_lambda": LAMBDA}
    out = rewards_and_gae(old, ref, values, scores, rollout[-1], **settings)
    return reference.whiten(out.advantages, rollout[-1]), out.returns


def true_whiten(inputs: Inputs) -> tuple[Tensor]:
    return (reference.whiten(inputs[1].double(), inputs[2]),)


def largest_error(results: Sequence[Tensor], truth: Sequence[Tensor]) -> float:
    return max(
        float((x.double() - y).abs().max() / y.abs().max())
        for x, y in zip(results, truth, strict=True)
    )


# ---- cases --------------------------------------------------------------------------------------


def run_case(
    session: harness.Session,
    label: str,
    ways: Sequence[Way],
    sets: Sequence[Any],
    truth: Sequence[Tensor],
    bytes_per_token: int,
    limit: float | None = None,
) -> list[harness.Row]:
    """Rows of one case. The first of `ways` is ours; the second sets the gate if none is given."""
    errors = [largest_error(run(sets[0]), truth) for _, run in ways]
    gate = (errors[1] if limit is None else limit) + 1e-6

    def call(run: Callable[[Any], Any], k: int) -> Any:
        return run(sets[k])

    return harness.measure(
        label,
        [
            harness.Contender(
                name,
                partial(call, run),
                error,
                gate + SLACK.get(name, 0.0),
                ours=name == ways[0][0],
                graph_safe=name == ways[0][0],
            )
            for (name, run), error in zip(ways, errors, strict=True)
        ],
        sets=len(sets),
        calls=CALLS,
        bytes_moved=sets[0][-1].numel() * bytes_per_token,
        **session.limits(),
    )


def gae_case(session: harness.Session, rows: int, columns: int) -> list[harness.Row]:
    rollouts = draw_rollouts(rows, columns, session.device)
    sets = [(old, values, mask) for old, _, values, _, mask in rollouts]
    ways: list[Way] = [
        (harness.implementation("gae", *sets[0]), our_gae),
        ("eager loop", eager_loop),
        ("dense loop", dense_loop),
        ("matmul", make_matmul(columns, session.device)),
        ("chunked scan", make_chunked_scan(session.device)),
    ]
    label = f"gae [{rows}, {columns}] fp32, {len(sets)} rotated input sets"
    # Rewards, values and mask are read, advantages and returns written.
    return run_case(session, label, ways, sets, true_gae(sets[0]), 4 + 4 + 1 + 4 + 4)


def long_case(session: harness.Session) -> list[harness.Row]:
    """The eager loop takes a second, so it runs once."""
    rollouts = draw_rollouts(1, LONG, session.device)
    sets = [(old, values, mask) for old, _, values, _, mask in rollouts]
    truth = true_gae(sets[0])
    error = largest_error(eager_loop(sets[0]), truth)  # waits for the device, if there is one
    start = time.perf_counter()
    eager_loop(sets[1])[0].sum().item()
    wall = 1e3 * (time.perf_counter() - start)
    label = f"long: gae [1, {LONG}] fp32, {len(sets)} rotated input sets"
    own = harness.implementation("gae", *sets[0])
    ways: list[Way] = [(own, our_gae), ("chunked scan", make_chunked_scan(session.device))]
    rows = run_case(session, label, ways, sets, truth, 4 + 4 + 1 + 4 + 4, limit=error)
    loop = harness.Row(label, "eager loop", False, error, error, median_ms=wall, repeats=1)
    return [*rows, loop]


def fused_case(session: harness.Session, rows: int, columns: int) -> list[harness.Row]:
    sets = draw_rollouts(rows, columns, session.device)
    ways: list[Way] = [
        (harness.implementation("rewards_and_gae", *sets[0]), our_fused),
        ("eager loop", make_eager_chain(eager_loop)),
        ("dense loop", make_eager_chain(dense_loop)),
        ("chunked scan", make_eager_chain(make_chunked_scan(session.device))),
    ]
    label = f"fused: rewards_and_gae + whiten [{rows}, {columns}] fp32, {len(sets)} input sets"
    # Three reads and the mask, four writes; one read and the mask, one write.
    bytes_per_token = 3 * 4 + 1 + 4 * 4 + 4 + 1 + 4
    return run_case(session, label, ways, sets, true_fused(sets[0]), bytes_per_token)


def whiten_case(session: harness.Session, rows: int, columns: int) -> list[harness.Row]:
    rollouts = draw_rollouts(rows, columns, session.device)
    sets = [(old, values, mask) for old, _, values, _, mask in rollouts]

    def eager(inputs: Inputs) -> tuple[Tensor]:
        return (masked_whiten(inputs[1], inputs[2]),)

    ways: list[Way] = [
        (harness.implementation("whiten", sets[0][1]), our_whiten),
        ("eager", eager),
    ]
    compiled = harness.compiled(masked_whiten, sets[0][1:])
    if compiled is not None:
        ways.append(("compile eager", lambda inputs: (compiled(inputs[1], inputs[2]),)))
    label = f"whiten [{rows}, {columns}] fp32, {len(sets)} rotated input sets"
    # Twice the numbers and the mask, one write.
    return run_case(session, label, ways, sets, true_whiten(sets[0]), 2 * (4 + 1) + 4)


def print_goals(case: str, rows: Sequence[harness.Row]) -> None:
    medians = {row.contender: row.median_ms for row in rows}
    own = next(row for row in rows if row.ours)
    for (of_case, peer), goal in GOALS.items():
        theirs = medians.get(peer)
        if of_case == case and own.median_ms is not None and theirs is not None:
            ratio = theirs / own.median_ms
            verdict = "met" if ratio >= goal else "MISSED"
            print(f"{own.contender} against the {peer}: {ratio:.0f}x (goal {goal:.0f}x: {verdict})")
    print()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = harness.parser("GAE and whitening against PyTorch", repeats=15)
    parser.add_argument("--case", nargs="+", choices=CASES, default=CASES)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--columns", type=int, default=2048)
    options = parser.parse_args(arguments)
    session = harness.start(options)
    reason = native.missing("gae", "whiten")
    if reason is not None and session.device.type == "cpu":
        print(f"no compiled module: {reason}")
        return 1
    shape = (options.rows, options.columns)
    runs: dict[str, Callable[[], list[harness.Row]]] = {
        "gae": lambda: gae_case(session, *shape),
        "long": lambda: long_case(session),
        "fused": lambda: fused_case(session, *shape),
        "whiten": lambda: whiten_case(session, *shape),
    }
    for case in options.case:
        rows = runs[case]()
        session.add(rows)
        print_goals(case, rows)
    return session.finish()


if __name__ == "__main__":
    sys.exit(main())
