"""The PPO loss, forward and backward: the C++ op against eager PyTorch and torch.compile.

    python -m bench.kernels.bench_ppo_loss [--tokens 131072 ...] [--device cpu] [--threads 2]
                                           [--repeats 15] [--quick] [--dtype fp32|bf16 ...]
                                           [--json FILE]

Every contender computes the clipped policy loss, the clipped value loss, the k3 term, the entropy
bonus and the gradients of log-probs, entropy and values, and these metrics: approximate KL, both
clip fractions, mean ratio, mean KL, mean entropy.

    lean        as TRL's trainer writes it: masks by multiplication, few metrics
    verl        verl's own functions, if installed, metrics as numbers on the host
    reference   the op's specification: masks by `where`, all nineteen sums
    compile ... torch.compile of lean and reference
    read only   the floor: as many bytes as the inputs have, read once; computes nothing. Its gain
                is what an op that only reads would have

The gain is against the fastest peer, and against the fastest that is not compiled. The error is the
largest one of loss and gradients against fp64, relative to the largest entry; the gate is the error
of the eager fp32 reference plus 1e-6. Gradients of bf16 inputs are bf16, for everybody.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rlhf_fast_kernels import native, ppo_loss

from . import harness, ppo_loss_peers

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ROTATED_BYTES = 96 << 20
MOST_SETS = 1024  # of the smallest shapes, which mean nothing
CALLS = 20
LEAVES = ("logprobs", "entropy", "values")
NAMES = (*LEAVES, "old_logprobs", "advantages", "ref_logprobs", "old_values", "returns")
OPTIONS: dict[str, Any] = {"entropy_coef": 0.01, "kl_coef": 0.05, "value_coef": 0.1}

Inputs = dict[str, Tensor]
Op = Callable[[Inputs], tuple[Tensor, Any]]


def lean(x: Inputs) -> tuple[Tensor, Any]:
    """The least that eager PyTorch must do, masks multiplied as trainers do."""
    mask = x["mask"]
    count = x["count"]
    logprobs, values = x["logprobs"].float(), x["values"].float()
    delta = logprobs - x["old_logprobs"]
    ratio = delta.clamp(-20.0, 20.0).exp()
    unclipped = -x["advantages"] * ratio
    clipped = -x["advantages"] * ratio.clamp(0.8, 1.2)
    policy = torch.maximum(unclipped, clipped)
    near = x["old_values"] + (values - x["old_values"]).clamp(-0.2, 0.2)
    squared, near_squared = (values - x["returns"]).square(), (near - x["returns"]).square()
    value = 0.5 * torch.maximum(squared, near_squared)
    log_ratio = logprobs - x["ref_logprobs"]
    kl = torch.expm1(-log_ratio) + log_ratio
    token = policy + 0.1 * value + 0.05 * kl - 0.01 * x["entropy"].float()
    loss = (token * mask).sum() / count
    with torch.no_grad():
        metrics = (
            (0.5 * delta.square() * mask).sum(),
            ((clipped > unclipped) * mask).sum(),
            ((near_squared > squared) * mask).sum(),
            (ratio * mask).sum(),
            (kl * mask).sum(),
            (x["entropy"] * mask).sum(),
        )
    return loss, metrics


def by_impl(impl: str, x: Inputs) -> tuple[Tensor, Any]:
    tensors = {name: x[name] for name in NAMES}
    normalizer = float(x["count"]) if impl == "cpu" else x["count"]
    out = ppo_loss(
        **tensors, mask=x["mask"], normalizer=normalizer, kl_gradient="own", impl=impl, **OPTIONS
    )
    return out.loss, out.metrics


def both(op: Op, sets: list[Inputs], k: int) -> tuple[Any, ...]:
    x = dict(sets[k])
    leaves = [x[name].detach().requires_grad_() for name in LEAVES]
    x.update(zip(LEAVES, leaves, strict=True))
    loss, metrics = op(x)
    return *torch.autograd.grad(loss, leaves), loss, metrics


def error_of(op: Op, sets: list[Inputs]) -> float:
    exact = both(
        partial(by_impl, "reference"),
        [{k: v if v.dtype == torch.bool else v.double() for k, v in sets[0].items()}],
        0,
    )
    got = both(op, sets, 0)
    return max(
        float((x.double() - y).abs().max() / y.abs().max())
        for x, y in zip(got[:4], exact[:4], strict=True)
    )


def draw(tokens: int, dtype: torch.dtype, device: torch.device) -> list[Inputs]:
    """Enough sets to exceed the last-level cache; ratios inside and outside the clip band."""
    generator = torch.Generator().manual_seed(0)
    sets = []
    wanted = ROTATED_BYTES // (tokens * len(NAMES) * dtype.itemsize)
    for _ in range(min(MOST_SETS, max(2, wanted))):
        x = {name: 0.3 * torch.randn(tokens, generator=generator) for name in NAMES}
        x = {name: value.to(dtype) for name, value in x.items()}
        x["mask"] = torch.rand(tokens, generator=generator) < 0.9
        x["count"] = x["mask"].sum().float()
        sets.append({name: value.to(device) for name, value in x.items()})
    return sets


def run_case(tokens: int, dtype: str, session: harness.Session) -> list[harness.Row]:
    sets = draw(tokens, DTYPES[dtype], session.device)
    impl = harness.implementation("ppo_loss", sets[0]["logprobs"])
    reference: Op = partial(by_impl, "reference")
    limit = error_of(reference, sets) + 1e-6
    peers: dict[str, Op] = {"lean": lean, "reference": reference}
    for name, op in tuple(peers.items()):
        torch.compiler.reset()
        fast = harness.compiled(op, (sets[0],))
        if fast is not None:
            peers[f"compile {name}"] = fast
    verl = ppo_loss_peers.verl()
    if verl is not None:
        peers["verl"] = verl
    size = DTYPES[dtype].itemsize
    own = harness.Contender(
        f"rlhf_fast {impl}",
        partial(both, partial(by_impl, impl), sets),
        error_of(partial(by_impl, impl), sets),
        limit,
        ours=True,
    )
    others = [
        harness.Contender(name, partial(both, op, sets), error_of(op, sets), max(limit, 1e-2))
        for name, op in peers.items()
    ]
    floor = harness.Contender(
        "read only",
        ppo_loss_peers.read_only(tokens * (len(NAMES) * size + 1), len(sets), session.device),
        0.0,
        0.0,
        ours=True,
    )
    # Read the inputs and the mask, write three gradients in fp32 and read them once in backward.
    moved = tokens * (len(NAMES) * size + 1 + 3 * (4 + 4 + size))
    return harness.measure(
        f"{tokens} tokens {dtype} forward + backward",
        [own, floor, *others],
        sets=len(sets),
        bytes_moved=moved,
        calls=CALLS,
        **session.limits(),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = harness.parser("PPO loss, forward and backward", repeats=15)
    parser.add_argument("--tokens", type=int, nargs="+", default=(131072, 8192))
    parser.add_argument("--dtype", nargs="+", default=tuple(DTYPES), choices=tuple(DTYPES))
    options = parser.parse_args(arguments)
    session = harness.start(options)
    problem = native.missing("ppo_loss")
    if problem and session.device.type == "cpu":
        print(f"nothing to measure: {problem}", file=sys.stderr)
        return 1
    for tokens in options.tokens[:1] if options.quick else options.tokens:
        for dtype in options.dtype:
            session.add(run_case(tokens, dtype, session))
    return session.finish()


if __name__ == "__main__":
    sys.exit(main())
