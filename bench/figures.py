"""What a report says, as figures of one kind: for the table, the comparison and the page.

Reports have the rows that suit their bench; the readers below know them by the keys of a row. A
report may also bring `figures` itself, a list of objects with the attributes of `Figure`.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_fast.errors import ConfigError

from .quantiles import spread

Json = Mapping[str, Any]
MIB = 1 << 20
EXTRA = "extra memory"  # of a call; stands beside its time as well


@dataclass(frozen=True)
class Figure:
    """One measured number.

    Attributes:
        case: workload and contender.
        what: `time`, `tokens per second`, `extra memory` ...
        low, high: 20th and 80th percentile of its samples, where they were kept.
        ours: of this project, not of a peer.
        more_is_better: a rate.
        note: what to read it against.
    """

    case: str
    what: str
    value: float
    unit: str
    low: float | None = None
    high: float | None = None
    ours: bool = True
    more_is_better: bool = False
    note: str = ""

    @property
    def key(self) -> tuple[str, str]:
        """The same figure in another report."""
        return self.case, self.what


def read_report(path: Path) -> Json:
    """A report from disk.

    Raises:
        ConfigError: RF1071, the file is none.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(found, dict) and isinstance(found.get("environment"), dict):
            return found
        problem = "it has no environment"
    except (OSError, ValueError) as error:
        problem = str(error)
    raise ConfigError(
        "RF1071",
        f"not a report of a benchmark: {problem}",
        where=str(path),
        expected="a file that `rlhf-fast bench` wrote, or a folder of them",
        remedy="name such a file or folder",
    )


def figures_of(report: Json) -> list[Figure]:
    """All numbers of a report, in its order."""
    found = [Figure(**row) for row in report.get("figures", [])]
    for row in report.get("rows", []):
        for keys, reader in READERS:
            if keys <= row.keys():
                found += reader(row)
                break
    for case in report.get("cases", []):
        found += trainers(case)
    for mode in report.get("modes", []):
        found += held(mode)
    for algorithm in report.get("algorithms", []):
        found += learning(algorithm)
    return [figure for figure in found if math.isfinite(figure.value)]


def trainers(found: Json) -> Iterator[Figure]:
    """A case of `ppo.bench_step`: a step of every side that took part."""
    for side, row in found["rows"].items():
        case, ours = f"{found['case']['lengths']} lengths, {side}", side.startswith("ours")
        for phase, value in row["seconds"].items():
            low, high = (row["p20"], row["p80"]) if phase == "step" else (None, None)
            note = f"{row['tokens_per_second']:.0f} tokens/s" if phase == "step" else ""
            yield Figure(case, f"seconds: {phase}", value, "s", low, high, ours, note=note)
        yield Figure(case, EXTRA, row["extra_mib"]["step"], "MiB", ours=ours)


def held(mode: Json) -> Iterator[Figure]:
    """A mode of `ppo.bench_memory`: bytes by phase, held beside predicted, and the peak."""
    for phase in dict.fromkeys(row["phase"] for row in mode["rows"]):
        rows = [row for row in mode["rows"] if row["phase"] == phase]
        took, plan = (sum(row[key] for row in rows) / MIB for key in ("held", "predicted"))
        case = f"{mode['mode']}, {phase}"
        yield Figure(case, "held by all roles", took, "MiB", note=f"predicted {plan:.4g} MiB")
        if phase in mode["resident_peak"]:
            peak, plan = (mode[key][phase] / MIB for key in ("resident_peak", "predicted_peak"))
            yield Figure(case, "peak of the process", peak, "MiB", note=f"predicted {plan:.4g} MiB")


def learning(found: Json) -> Iterator[Figure]:
    """An algorithm of `ppo.bench_learning`: what each side had learnt at equal tokens, and when."""
    for side, row in found["rows"].items():
        case, ours = f"{found['algorithm']}, {side}", side == "ours"
        mean, half = row["reward"], row["reward_interval"]
        note = f"{row['first_reward']:.3f} at the start"
        low, high = (mean - half, mean + half) if math.isfinite(half) else (None, None)
        yield Figure(case, "reward", mean, "", low, high, ours, True, note)
        yield Figure(case, "seconds to the worse side's reward", row["seconds_to_worse"], "s")


def kernel(row: Json) -> Iterator[Figure]:
    """A row of `kernels.harness`."""
    if row["median_ms"] is None:
        return
    case, ours = f"{row['case']}, {row['contender']}", bool(row["ours"])
    notes = []
    if row.get("gain"):
        notes.append(f"{row['gain']:.2f}x the fastest peer")
    if row.get("of_matmul"):
        notes.append(f"{row['of_matmul']:.0%} of matmul")
    elif row.get("of_bandwidth"):
        notes.append(f"{row['of_bandwidth']:.0%} of bandwidth")
    extra = row.get("extra_mib")
    if extra is not None:
        notes.append(f"{extra:.1f} MiB extra")
    low, high = (row["p20_ms"], row["p80_ms"]) if row["repeats"] > 1 else (None, None)
    yield Figure(case, "time", row["median_ms"], "ms", low, high, ours, False, ", ".join(notes))
    if extra is not None:
        yield Figure(case, EXTRA, extra, "MiB", ours=ours)


def generation(row: Json) -> Iterator[Figure]:
    """A row of `engine.bench_generate`."""
    workload = f"{row['shape']}, {row['batch']} rows, {row['lengths']}"
    for side, rate in row["tokens_per_second"].items():
        ours = side == "engine"
        rates = [row["tokens"] / seconds for seconds in row.get("seconds", {}).get(side, [])]
        ratios = [f"{times:.1f}x {peer}" for peer, times in row["times_faster"].items()]
        note = ", ".join([*ratios, f"{row['roofline']:.0%} of roofline"]) if ours else ""
        low, high = spread(rates)
        yield Figure(
            f"{workload}, {side}", "tokens per second", rate, "/s", low, high, ours, True, note
        )


def ranks(row: Json) -> Iterator[Figure]:
    """A row of `distributed.bench_step`."""
    case = f"{row['ranks']} ranks, {row['view']}"
    for phase, value in row["seconds"].items():
        low, high = spread([step[phase] for step in row.get("samples", [])])
        yield Figure(case, f"seconds: {phase}", value, "s", low, high)
    for phase, size in row["received"].items():
        yield Figure(case, f"received: {phase}", size / MIB, "MiB")
    yield Figure(case, "parameters held", row["parameter_bytes"] / MIB, "MiB")


def timed(row: Json) -> Iterator[Figure]:
    """A row that has a contender and a median, no more."""
    yield Figure(f"{row['case']}, {row['contender']}", "time", row["median_ms"], "ms")


def growth(row: Json) -> Iterator[Figure]:
    """A row of `complexity.bench_complexity`: the largest size, and the slopes."""
    case = f"{row['subject']} by {row['axis']}"
    low, high = spread(row["milliseconds"][-1])
    note = f"order {row['time_order']:.2f}, expected at most {row['expected_time']:g}"
    yield Figure(
        f"{case}, {row['sizes'][-1]}", "time", statistics.median(row["milliseconds"][-1]), "ms",
        low, high, note=note,
    )  # fmt: skip


def replaced(row: Json) -> Iterator[Figure]:
    """A row of `integrations.bench_functions` or `bench_update_step`: theirs beside ours."""
    for side in ("theirs", "ours"):
        case, ours = f"{row['peer']} {row['name']}, {side}", side == "ours"
        low, high = spread(row.get(f"{side}_samples_ms", []))
        note = f"{row['gain']:.2f}x theirs" if ours else ""
        yield Figure(case, "time", row[f"{side}_ms"], "ms", low, high, ours, note=note)
        yield Figure(case, EXTRA, row[f"{side}_mib"], "MiB", ours=ours)


def trainer_steps(row: Json) -> Iterator[Figure]:
    """A row of `integrations.bench_trl_runs`: a step of one side."""
    case, ours = f"{row['peer']} {row['kind']}, {row['side']}", row["side"] != "theirs"
    low, high = spread(row["samples"])
    note = f"{row['gain']:.2f}x theirs" if ours else ""
    yield Figure(case, "seconds: step", row["seconds"], "s", low, high, ours, note=note)
    yield Figure(case, EXTRA, row["mib"], "MiB", ours=ours)


Reader = Callable[[Json], Iterator[Figure]]
READERS: Sequence[tuple[set[str], Reader]] = (
    ({"contender", "median_ms", "p20_ms", "ours"}, kernel),
    ({"tokens_per_second", "times_faster", "shape"}, generation),
    ({"ranks", "view", "received"}, ranks),
    ({"subject", "axis", "milliseconds"}, growth),
    ({"peer", "theirs_ms", "ours_ms"}, replaced),
    ({"peer", "kind", "side", "samples"}, trainer_steps),
    ({"contender", "median_ms"}, timed),
)
