"""A whole PPO step beside TRL 1.12.0's, the last TRL that has PPO: seconds by phase, memory, trend.

    python -m bench.ppo.bench_step [--preset cpu|tiny] [--lengths fixed,long-tailed] [--rounds 7]
        [--steps 3] [--microbatch-tokens N] [--trl-python /path/to/python] [--profile]
        [--json results.json]

Both sides have the same four models, prompts, response lengths, minibatches and hyper-parameters
(`bench.ppo.case`), each in a process of its own, and take turns: a round is `--steps` steps of
each. `docs/benchmarking.md` says what is in the time of each side. Sides:

    ours            as configured by default: the anchors of the ratio are recomputed by the policy
    ours, rollout   anchors from the generator, measured against the policy: what TRL does
    trl             `trl.experimental.ppo.PPOTrainer`, driven from outside (`bench.ppo.trl_step`)
    generate        transformers' `generate` on the policy alone, for the first phase

A side that cannot be imported is listed as not measured, and the others are measured all the same;
TRL may live in another environment with the same torch (`--trl-python`).

Error gate: samples differ, since generators draw differently, so trends are compared, step by step.
A ratio is printed only if the mean difference of the KL to the reference, of both losses and of the
entropy is within four of its standard errors plus a twentieth of the mean.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from ..choices import several
from ..kernels.environment import environment
from ..kernels.probes import MatmulProbe
from ..kernels.tables import print_environment
from . import flops, trl_step
from .case import KINDS, PRESETS, Case
from .side import Side

PHASES = ("generate", "score", "prepare", "update", "gc", "rest", "step")
TREND = ("score", "kl", "policy_loss", "value_loss", "entropy")
GATED = ("kl", "policy_loss", "value_loss", "entropy")
OURS = ("ours", "ours, rollout")
TARGETS = {"fixed": 2.2, "long-tailed": 5.0}
MEMORY_TARGET = 3.0
MIB = 1 << 20


def sides_of(case: Case, trl_python: str) -> dict[str, tuple[str, Case, str]]:
    """Name -> (module of the child, its case, interpreter)."""
    return {
        "ours": (f"{__package__}.our_step", case, ""),
        "ours, rollout": (f"{__package__}.our_step", replace(case, anchor="rollout"), ""),
        "trl": (f"{__package__}.trl_step", case, trl_python),
        "generate": (f"{__package__}.generate_step", case, ""),
    }


def measure(case: Case, options: argparse.Namespace) -> dict[str, Any]:
    """All sides of one case in turns; what they found, medians and ratios."""
    steps: dict[str, list[dict[str, Any]]] = {}
    absent: dict[str, str] = {}
    facts: dict[str, Any] = {}
    torch.set_num_threads(case.threads)
    product = MatmulProbe()
    rates = []
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        running = {}
        for name, (module, own, python) in sides_of(case, options.trl_python).items():
            if name == "trl" and (reason := trl_step.missing(python)):
                facts[name] = {"absent": reason}
                absent[name] = reason
                continue
            side = stack.enter_context(
                Side(
                    name,
                    ["-m", module, own.to_json()],
                    folder / f"{name}.log",
                    threads=case.threads,
                    python=python,
                )
            )
            facts[name] = side.facts
            if "absent" in side.facts:
                absent[name] = side.facts["absent"]
            else:
                running[name] = side
                steps[name] = [side.step() for _ in range(options.warmups)]
        for _ in range(options.rounds):
            rates.append(product.tflops(3))
            for name, side in running.items():
                steps[name] += [side.step() for _ in range(options.steps)]
    rows = {
        name: row_of(case, found, options.warmups, statistics.median(rates))
        for name, found in steps.items()
    }
    trend = {
        name: [step["trend"] for step in found]
        for name, found in steps.items()
        if name != "generate"
    }
    return {
        "case": asdict(case),
        "tokens": sum(case.response_lengths()),
        "matmul_tflop_per_s": statistics.median(rates),
        "facts": facts,
        "absent": absent,
        "rows": rows,
        "gate": {name: disagreements(trend[name], trend["trl"]) for name in OURS if "trl" in trend},
        "trend": trend,
    }


def row_of(
    case: Case, steps: Sequence[dict[str, Any]], warmups: int, rate: float
) -> dict[str, Any]:
    """Medians and spread over the steps after the warm-up; the peak is that of all steps."""
    timed = steps[warmups:]
    phases = [p for p in PHASES if any(p in step["seconds"] for step in timed)]
    seconds = {p: [step["seconds"].get(p, 0.0) for step in timed] for p in phases}
    whole = sorted(seconds["step"])
    row: dict[str, Any] = {
        "seconds": {p: statistics.median(values) for p, values in seconds.items()},
        "p20": whole[int(0.2 * (len(whole) - 1))],
        "p80": whole[round(0.8 * (len(whole) - 1))],
        "cpu_seconds": statistics.median(step["cpu_seconds"] for step in timed),
        "tokens_per_second": sum(case.response_lengths()) / statistics.median(whole),
        "extra_mib": {
            p: max(step["extra_bytes"].get(p, 0.0) for step in steps) / MIB for p in phases
        },
    }
    if "update" in phases:
        needed = flops.of_step(case)
        row["utilisation"] = {
            p: needed[p] / row["seconds"][p] / rate / 1e12 for p in needed if row["seconds"][p]
        }
        row["trend"] = {key: _mean(step["trend"][key] for step in steps) for key in TREND}
    return row


def _mean(values: Any) -> dict[str, float]:
    """Mean and its standard error."""
    found = list(values)
    mean = sum(found) / len(found)  # NaN stays NaN, which `statistics` refuses
    squares = sum((x - mean) ** 2 for x in found)
    spread = math.sqrt(squares / (len(found) - 1)) if len(found) > 1 else math.inf
    return {"mean": mean, "error": spread / math.sqrt(len(found))}


def disagreements(
    ours: Sequence[dict[str, float]], theirs: Sequence[dict[str, float]]
) -> list[str]:
    """The gated figures of a trend that differ by more than chance and a twentieth."""
    found = []
    for key in GATED:
        pairs = [(a[key], b[key]) for a, b in zip(ours, theirs, strict=True)]
        apart = _mean(a - b for a, b in pairs)
        limit = 4 * apart["error"] + abs(_mean(b for _, b in pairs)["mean"]) / 20
        if not abs(apart["mean"]) <= limit:
            found.append(f"{key} differs by {apart['mean']:.4g}, limit {limit:.2g}")
    return found


# ---- tables -------------------------------------------------------------------------------------


def print_case(found: dict[str, Any]) -> None:
    """The tables of one case."""
    case, rows = found["case"], found["rows"]
    print(
        f"\n{case['lengths']} lengths: {case['episodes']} episodes, "
        f"{found['tokens']} response tokens, "
        f"{case['epochs']} epochs x {case['minibatches']} minibatches; "
        f"matrix product {1e3 * found['matmul_tflop_per_s']:.0f} GFLOP/s"
    )
    print(
        f"{'seconds':15}" + "".join(f"{p:>10}" for p in PHASES) + f"{'p20':>9}{'p80':>9}{'cpu':>9}"
    )
    for name, row in rows.items():
        cells = "".join(f"{row['seconds'].get(p, 0.0):10.3f}" for p in PHASES)
        print(f"{name:15}{cells}{row['p20']:9.3f}{row['p80']:9.3f}{row['cpu_seconds']:9.3f}")
    shown = ("generate", "score", "update", "step")
    print(f"{'':15}{'tokens/s':>10}{'extra MiB':>11}  of the matrix product: {', '.join(shown)}")
    for name, row in rows.items():
        parts = ", ".join(f"{row['utilisation'][p]:.0%}" for p in shown if "utilisation" in row)
        extra = row["extra_mib"]["step"]
        print(f"{name:15}{row['tokens_per_second']:10.0f}{extra:11.1f}  {parts}")
    print(f"{'mean of steps':15}" + "".join(f"{key:>22}" for key in TREND))
    for name, row in rows.items():
        if "trend" in row:
            cells = [
                f"{row['trend'][key]['mean']:.4f}+-{row['trend'][key]['error']:.4f}"
                for key in TREND
            ]
            print(f"{name:15}" + "".join(f"{cell:>22}" for cell in cells))
    for name, reason in found["absent"].items():
        print(f"not measured: {name}: {reason}")
    print_ratios(found)


def print_ratios(found: dict[str, Any]) -> None:
    """Ours against TRL, unless they did not do the same."""
    rows = found["rows"]
    if "trl" not in rows:
        return
    theirs = rows["trl"]
    for name in OURS:
        ours, wrong = rows[name], found["gate"][name]
        if wrong:
            print(f"{name}: error gate: {'; '.join(wrong)}")
            continue
        faster = theirs["seconds"]["step"] / ours["seconds"]["step"]
        less = theirs["extra_mib"]["step"] / max(ours["extra_mib"]["step"], 1e-9)
        print(
            f"{name}: {faster:.2f} times as fast as TRL "
            f"(target {TARGETS[found['case']['lengths']]}), "
            f"1/{less:.2f} of its extra peak memory (target 1/{MEMORY_TARGET:.0f})"
        )


# ---- command line -------------------------------------------------------------------------------


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--preset", choices=tuple(PRESETS), default="cpu")
    parser.add_argument("--lengths", type=several(KINDS, "lengths"), default=list(KINDS))
    parser.add_argument("--rounds", type=int, default=7, help="turns of each side")
    parser.add_argument("--steps", type=int, default=3, help="steps of a turn")
    parser.add_argument("--warmups", type=int, default=2, help="steps that are not timed")
    parser.add_argument("--threads", type=int, default=2, help="of torch, each side")
    parser.add_argument(
        "--microbatch-tokens", type=int, help="of ours, of one forward; default: the preset's"
    )
    parser.add_argument("--trl-python", default="", help="interpreter that has trl; default: this")
    parser.add_argument("--profile", action="store_true", help="also where our step's time goes")
    parser.add_argument("--json", type=Path, help="write the report to this file")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; 1 if a side did not do the same as the other."""
    options = parse(sys.argv[1:] if arguments is None else arguments)
    facts = environment(options.threads)
    print_environment(facts)
    cases = []
    for kind in options.lengths:
        case = replace(PRESETS[options.preset], lengths=kind, threads=options.threads)
        if options.microbatch_tokens:
            case = replace(case, microbatch_tokens=options.microbatch_tokens)
        cases.append(measure(case, options))
        print_case(cases[-1])
        if options.profile:
            from .profile_step import profile_step

            cases[-1]["profile"] = profile_step(case)
    if options.json is not None:
        report = {"environment": facts, "cases": cases}
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return int(any(wrong for case in cases for wrong in case["gate"].values()))


if __name__ == "__main__":
    sys.exit(main())
