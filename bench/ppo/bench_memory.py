"""Memory of the four models in three modes: predicted against held, and the peak of each phase.

    python -m bench.ppo.bench_memory [--preset cpu|tiny] [--modes naive,full,shared]
        [--device cuda] [--json results.json]

`predicted` is what `rlhf-fast plan` computes from the configs alone, `held` what the tensors of all
roles take, counted in the phase (`PPOTrainer.watch_memory`). The peak of a phase is that of the
process above what it held before the models were made: on a CPU its resident set, which has
activations, workspaces and every library's buffers in it; on a GPU also that of torch's allocator.
`predicted peak` adds the activations of the plan. On a CPU "device" and "host" are the same memory:
there offloading shows where bytes lie and saves none. Each mode has a process of its own.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rlhf_fast.engine.memory_ledger import PHASES

from ..choices import several
from ..kernels.environment import environment
from ..kernels.tables import print_environment
from .case import PRESETS, Case
from .memory_step import MODES
from .side import Side

MIB = 1 << 20
TOLERANCE = 0.05  # of a slot, predicted against held


def measure(mode: str, case: Case, device: str) -> dict[str, Any]:
    """What a mode's process found."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = ["-m", f"{__package__}.memory_step", mode, case.to_json(), device]
        with Side(mode, arguments, Path(folder) / "log", threads=case.threads) as side:
            return side.facts


def sums(found: dict[str, Any], key: str) -> dict[str, dict[str, int]]:
    """Phase -> role -> bytes, `key` one of predicted and held."""
    total: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for row in found["rows"]:
        total[row["phase"]][row["role"]] += row[key]
    return total


def print_mode(found: dict[str, Any]) -> None:
    """The tables of one mode."""
    predicted, held = sums(found, "predicted"), sums(found, "held")
    roles = list(dict.fromkeys(row["role"] for row in found["rows"]))
    print(f"\n{found['mode']}: MiB held / predicted by role, then the peak of the phase")
    print(
        f"{'phase':10}"
        + "".join(f"{role:>18}" for role in roles)
        + f"{'all':>18}{'peak':>9}{'predicted':>11}"
    )
    for phase in (p for p in PHASES if p in held):
        cells = [_pair(held[phase][role], predicted[phase][role]) for role in roles]
        cells.append(_pair(sum(held[phase].values()), sum(predicted[phase].values())))
        peak = found["resident_peak"].get(phase)
        shown = "" if peak is None else f"{peak / MIB:.1f}"
        print(
            f"{phase:10}"
            + "".join(f"{cell:>18}" for cell in cells)
            + f"{shown:>9}{found['predicted_peak'][phase] / MIB:11.1f}"
        )
        if phase in found["allocated_peak"]:
            print(f"{'':10}peak of torch's allocator {found['allocated_peak'][phase] / MIB:.1f}")
    print(f"the largest difference of a slot: {found['worst']:.1%}", flush=True)


def _pair(held: int, predicted: int) -> str:
    return f"{held / MIB:.2f} / {predicted / MIB:.2f}"


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--preset", choices=tuple(PRESETS), default="cpu")
    parser.add_argument("--modes", type=several(MODES, "mode"), default=list(MODES))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write the report to this file")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; 1 if a prediction was off by more than a twentieth."""
    options = parse(sys.argv[1:] if arguments is None else arguments)
    facts = environment(options.threads, options.device)
    print_environment(facts)
    case = replace(PRESETS[options.preset], threads=options.threads)
    modes = []
    for mode in options.modes:
        modes.append(measure(mode, case, options.device))
        print_mode(modes[-1])
    if options.json is not None:
        report = {"environment": facts, "case": json.loads(case.to_json()), "modes": modes}
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return int(any(found["worst"] > TOLERANCE for found in modes))


if __name__ == "__main__":
    sys.exit(main())
