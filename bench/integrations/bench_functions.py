"""Each function that an adapter replaces, the trainer's own against ours, in turns.

    make .venv-peers/.ready
    PYTHONPATH=.:kernels .venv-peers/bin/python -m bench.integrations.bench_functions
        [--peer areal verl openrlhf trl] [--device cpu] [--threads 2] [--repeats 9] [--quick]
        [--json FILE]

TRL 1.12: PYTHONPATH=.venv-peers/trl-1.12:.:kernels and --peer trl.

A turn is one call with its backward where the function has one. Printed are the median of the turns
in ms, the memory at the peak beyond the inputs in MiB, how many times faster ours is, and the
largest difference of the results. verl's and OpenRLHF's own code is what runs without flash-attn.
`compute_entropy` of OpenRLHF and AReaL's functions are compiled before they are timed.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels import harness
from ..kernels.environment import environment
from .stubs import stand_in

ADAPTERS = "rlhf_fast.integrations"
ROWS, COLUMNS = 64, 512  # of what is [B, R]
TOKENS, VOCAB, HIDDEN = 512, 32000, 512  # of what is [N, V]


class Case(NamedTuple):
    """A call that looks its function up when it runs: inside `patched()` it finds ours."""

    name: str
    run: Callable[[], Any]


def main() -> int:
    options = arguments()
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    rows = []
    for peer in options.peer:
        stand_in(peer)
        adapter = importlib.import_module(f"{ADAPTERS}.{peer}")
        version = importlib.metadata.version(peer)
        print(f"\n{peer} {version} on {device}, {options.threads} threads")
        print(f"{'':44} {'theirs':>9} {'ours':>9} {'gain':>6} {'MiB':>8} {'MiB':>8} {'diff':>9}")
        for case in CASES[peer](device, options.quick):
            row = compare(case, adapter.patched, device, 3 if options.quick else options.repeats)
            rows.append({"peer": f"{peer} {version}", **row})
            print(
                f"{row['name']:44} {row['theirs_ms']:9.3f} {row['ours_ms']:9.3f} "
                f"{row['gain']:5.2f}x {row['theirs_mib']:8.1f} {row['ours_mib']:8.1f} "
                f"{row['difference']:9.1e}",
                flush=True,
            )
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            stamp = environment(options.threads, device)
            json.dump({"environment": stamp, "rows": rows}, file, indent=1)
    return 0


def arguments() -> argparse.Namespace:
    parser = harness.parser((__doc__ or "").split("\n")[0])
    names = sorted(CASES)
    parser.add_argument("--peer", nargs="+", choices=names, default=names)
    return parser.parse_args()


# ---- measuring ----------------------------------------------------------------------------------


def compare(
    case: Case,
    patched: Callable[[], AbstractContextManager[Any]],
    device: torch.device,
    repeats: int,
) -> dict[str, Any]:
    def once(ours: bool) -> float:
        if not ours:
            return seconds(case.run, device)
        with patched():
            return seconds(case.run, device)

    own = case.run()
    with patched():
        mine = case.run()
        ours_mib = harness.extra_memory(lambda _: case.run(), device)
    theirs_mib = harness.extra_memory(lambda _: case.run(), device)
    turns = [(once(False), once(True)) for _ in range(repeats)]
    theirs, ours = ([1e3 * x for x in column] for column in zip(*turns, strict=True))
    theirs_ms, ours_ms = statistics.median(theirs), statistics.median(ours)
    nothing = float("nan")
    return {
        "name": case.name,
        "theirs_ms": theirs_ms,
        "ours_ms": ours_ms,
        "gain": theirs_ms / ours_ms,
        "theirs_samples_ms": theirs,
        "ours_samples_ms": ours,
        "theirs_mib": nothing if theirs_mib is None else theirs_mib,
        "ours_mib": nothing if ours_mib is None else ours_mib,
        "difference": max(
            float((a.double() - b.double()).abs().max()) for a, b in zip(own, mine, strict=True)
        ),
    }


def seconds(run: Callable[[], Any], device: torch.device) -> float:
    wait = torch.cuda.synchronize if device.type == "cuda" else (lambda: None)
    wait()
    start = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - start


# ---- cases --------------------------------------------------------------------------------------


def case(
    name: str,
    module: str,
    arguments: list[Any],
    *,
    leaves: tuple[int, ...] = (),
    make: Callable[[Callable[..., Any]], Callable[..., Any]] = lambda f: f,
) -> Case:
    """Arguments at `leaves` get a gradient; `make` turns what the module holds into the call."""
    holder = importlib.import_module(module)

    def run() -> tuple[Tensor, ...]:
        inputs = list(arguments)
        for i in leaves:
            inputs[i] = inputs[i].detach().requires_grad_()
        result = make(getattr(holder, name))(*inputs)
        results = [x for x in (result if isinstance(result, tuple) else (result,)) if is_float(x)]
        if leaves:
            sum(x.float().sum() for x in results if x.requires_grad).backward()
        return *(x.detach() for x in results), *(inputs[i].grad for i in leaves)

    return Case(f"{name}{'' if not leaves else ', with backward'}", run)


def is_float(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


class Inputs:
    def __init__(self, device: torch.device, quick: bool) -> None:
        self.generator = torch.Generator().manual_seed(0)
        self.device = device
        scale = 8 if quick else 1
        self.shape = (ROWS // scale, COLUMNS)
        self.tokens, self.vocab = TOKENS // scale, VOCAB // scale
        self.mask = (torch.rand(self.shape, generator=self.generator) < 0.8).long().to(device)

    def draw(self, *shape: int) -> Tensor:
        return torch.randn(*(shape or self.shape), generator=self.generator).to(self.device)

    def logits(self) -> Tensor:
        return self.draw(4, self.tokens // 4, self.vocab)

    def labels(self) -> Tensor:
        shape = (4, self.tokens // 4)
        return torch.randint(0, self.vocab, shape, generator=self.generator).to(self.device)


class _Config(dict[str, Any]):
    """What verl's policy loss reads of its configuration."""

    clip_ratio, clip_ratio_low, clip_ratio_high = 0.2, 0.2, 0.28
    global_batch_info: dict[str, Any] = {}  # noqa: RUF012 - as in verl, an attribute


def verl(device: torch.device, quick: bool) -> Iterator[Case]:
    x = Inputs(device, quick)
    torch_f, core = "verl.utils.torch_functional", "verl.trainer.ppo.core_algos"
    labels = x.labels()
    yield case("logprobs_from_logits", torch_f, [x.logits(), labels], leaves=(0,))
    yield case("entropy_from_logits", torch_f, [x.logits()], leaves=(0,))
    yield case("masked_mean", torch_f, [x.draw(), x.mask])
    yield case("masked_whiten", torch_f, [x.draw(), x.mask])
    yield case("kl_penalty", core, [x.draw(), x.draw(), "low_var_kl"], leaves=(0,))
    yield case(
        "compute_gae_advantage_return",
        core,
        [x.draw(), x.draw(), x.mask, 1.0, 0.95],
        make=lambda f: lambda *inputs: tuple(y * x.mask for y in f(*inputs)),
    )
    policy = [x.draw(), x.draw(), x.draw(), x.mask, "token-mean", _Config()]
    yield case("compute_policy_loss_vanilla", core, policy, leaves=(1,))
    value = [x.draw(), x.draw(), x.draw(), x.mask, 0.2]
    yield case("compute_value_loss", core, value, leaves=(0,))
    hidden, weight = x.draw(x.tokens, HIDDEN), x.draw(x.vocab, HIDDEN) / HIDDEN**0.5
    yield case(
        "FusedLinearForPPO",
        "verl.utils.experimental.torch_functional",
        [hidden, weight, labels.flatten()],
        leaves=(0, 1),
        make=lambda head: head(),
    )


def openrlhf(device: torch.device, quick: bool) -> Iterator[Case]:
    x = Inputs(device, quick)
    utils, loss = "openrlhf.models.utils", "openrlhf.models.loss"
    yield case("log_probs_from_logits", utils, [x.logits(), x.labels()], leaves=(0,))
    yield case("compute_entropy", utils, [x.logits()], leaves=(0,))
    kl = [x.draw(), x.draw(), None, "k3"]
    yield case("compute_approx_kl", utils, kl, leaves=(0,))
    yield case("compute_reward", utils, [x.draw(x.shape[0]), 0.05, x.draw(), x.mask, (-10, 10)])
    yield case(
        "RemoteExperienceMaker",
        "openrlhf.trainer.ppo_utils.experience_maker",
        [None, x.draw(), x.draw(), x.mask, 1.0, 0.95],
        make=lambda maker: maker.get_advantages_and_returns,
    )
    three = [x.draw(), x.draw(), x.draw(), x.mask]
    yield case("PolicyLoss", loss, three, leaves=(0,), make=lambda module: module())
    yield case("ValueLoss", loss, three, leaves=(0,), make=lambda module: module(0.2))


def trl(device: torch.device, quick: bool) -> Iterator[Case]:
    x = Inputs(device, quick)
    utils = "trl.trainer.utils"
    yield case("selective_log_softmax", utils, [x.logits(), x.labels()], leaves=(0,))
    yield case("entropy_from_logits", utils, [x.logits()], leaves=(0,))
    if importlib.metadata.version("trl") == "1.12.0":
        ppo = "trl.experimental.ppo.ppo_trainer"
        yield case("masked_whiten", ppo, [x.draw(), x.mask.bool()])
        return
    yield case("selective_log_softmax_and_entropy", utils, [x.logits(), x.labels()], leaves=(0,))
    hidden, weight = x.draw(x.tokens, HIDDEN), x.draw(x.vocab, HIDDEN) / HIDDEN**0.5
    call = [hidden, weight, None, x.labels().flatten(), 1.0, 32768, None, 1.0, ("entropy",)]
    yield case("_ChunkedLogProbFunction", utils, call, leaves=(0, 1), make=lambda head: head.apply)


def areal(device: torch.device, quick: bool) -> Iterator[Case]:
    x = Inputs(device, quick)
    for name in ("gather_logprobs", "gather_logprobs_entropy"):
        packed = [x.draw(x.tokens, x.vocab), x.labels().flatten()]
        yield case(name, "areal.utils.functional", packed)
        yield case(name, "areal.utils.functional", packed, leaves=(0,))


CASES = {"areal": areal, "openrlhf": openrlhf, "trl": trl, "verl": verl}

if __name__ == "__main__":
    sys.exit(main())
