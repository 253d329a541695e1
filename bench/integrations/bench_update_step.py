"""One PPO step of verl or OpenRLHF by its own code, as it is and on our functions, in turns.

    make .venv-peers/.ready
    PYTHONPATH=.:kernels .venv-peers/bin/python -m bench.integrations.bench_update_step
        [--peer verl|openrlhf] [--threads 2] [--repeats 5] [--quick] [--json FILE]

One trainer a process: what stands in for a package that one imports must not be seen by another.
What a step is: see `verl_run` and `openrlhf_run`. Printed are the median of the turns in ms, the
growth of the resident set at the peak of one step in MiB, how many times faster ours is, and the
largest difference of the stepped weights. On a CPU; verl's and OpenRLHF's own code is what runs
without flash-attn, and `compute_entropy` of OpenRLHF is compiled before it is timed.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from ..kernels import harness
from ..kernels.environment import environment
from . import openrlhf_run, verl_run
from .stubs import stand_in

ADAPTERS = "rlhf_fast.integrations"
SHAPE = {"vocab": 32000, "hidden": 256, "layers": 4, "rows": 8, "prompt": 64, "response": 192}
QUICK = {"vocab": 2000, "hidden": 64, "layers": 2, "rows": 4, "prompt": 8, "response": 24}


def main() -> int:
    parser = harness.parser((__doc__ or "").split("\n")[0], repeats=5)
    parser.add_argument("--peer", choices=sorted(MAKERS), default="verl")
    options = parser.parse_args()
    if options.device != "cpu":
        parser.error("the steps run on a CPU")
    torch.set_num_threads(options.threads)
    stand_in(options.peer)
    make = MAKERS[options.peer](QUICK if options.quick else SHAPE)
    row = compare(options.peer, make, 1 if options.quick else options.repeats)
    print(f"{'':20} {'theirs ms':>9} {'ours ms':>9} {'gain':>6} {'MiB':>8} {'MiB':>8} {'diff':>9}")
    print(
        f"{row['peer']:20} {row['theirs_ms']:9.1f} {row['ours_ms']:9.1f} {row['gain']:5.2f}x "
        f"{row['theirs_mib']:8.1f} {row['ours_mib']:8.1f} {row['difference']:9.1e}"
    )
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            stamp = environment(options.threads)
            json.dump({"environment": stamp, "rows": [row]}, file, indent=1)
    return 0


def compare(peer: str, make: Callable[[], Any], repeats: int) -> dict[str, Any]:
    """Turns of one peer; every turn starts from fresh models, whose making is not timed."""
    patched = importlib.import_module(f"{ADAPTERS}.{peer}").patched

    def theirs() -> tuple[Any, float]:
        return _turn(make)

    def ours() -> tuple[Any, float]:
        with patched():
            return _turn(make)

    own, mine = theirs()[0].weights(), ours()[0].weights()  # and what the first call sets up
    turns = [(theirs()[1], ours()[1]) for _ in range(repeats)]
    theirs_all, ours_all = ([1e3 * x for x in column] for column in zip(*turns, strict=True))
    theirs_ms, ours_ms = statistics.median(theirs_all), statistics.median(ours_all)
    theirs_mib = _peak(make())
    with patched():
        ours_mib = _peak(make())
    return {
        "peer": f"{peer} {importlib.metadata.version(peer)}",
        "name": "update step",
        "theirs_ms": theirs_ms,
        "ours_ms": ours_ms,
        "gain": theirs_ms / ours_ms,
        "theirs_samples_ms": theirs_all,
        "ours_samples_ms": ours_all,
        "theirs_mib": theirs_mib,
        "ours_mib": ours_mib,
        "difference": max(float((own[n] - mine[n]).abs().max()) for n in own),
    }


def _turn(make: Callable[[], Any]) -> tuple[Any, float]:
    run = make()
    start = time.perf_counter()
    run.step()
    return run, time.perf_counter() - start


def _peak(run: Any) -> float:
    found = harness.extra_memory(lambda _: run.step())
    return float("nan") if found is None else found


def _verl(shape: dict[str, int]) -> Callable[[], Any]:
    verl_run.one_process()
    sizes = verl_run.Sizes(**shape, microbatch=shape["rows"] // 2)
    return lambda: verl_run.Run(sizes)


def _openrlhf(shape: dict[str, int]) -> Callable[[], Any]:
    sizes = openrlhf_run.Sizes(**shape)
    return lambda: openrlhf_run.Run(sizes)


MAKERS = {"openrlhf": _openrlhf, "verl": _verl}

if __name__ == "__main__":
    sys.exit(main())
