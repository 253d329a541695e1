"""What changed between two runs, and whether it exceeds the noise.

A change counts when the two ranges from the 20th to the 80th percentile do not overlap, and when it
is larger than the drift of the machine: the largest change of its calibrations (bandwidth, matrix
product) within either run or between them. Figures whose samples were not kept get no verdict.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_fast.errors import ConfigError

from .figures import Figure, Json, figures_of, read_report

# Of the environment: what must be the same for a difference to be of the code.
MACHINE = ("cpu", "gpu", "cores", "threads", "core_module", "torch", "triton", "driver", "device")
BETTER, WORSE, SAME, UNKNOWN = "better", "WORSE", "within noise", "no spread recorded"


@dataclass(frozen=True)
class Change:
    """One figure in both runs; `part` is the change over the former value."""

    bench: str
    before: Figure
    after: Figure
    verdict: str

    @property
    def part(self) -> float:
        """Change over the former value."""
        old, new = self.before.value, self.after.value
        return (new - old) / abs(old) if old else float(new != old)


@dataclass(frozen=True)
class Comparison:
    """All changes, and what else is different."""

    changes: list[Change]
    machine: list[str]
    drift: Mapping[str, float]
    only: list[str]


def reports_at(path: Path) -> dict[str, Json]:
    """Reports by bench: of a folder all, of a file the one that it is.

    Raises:
        ConfigError: RF1071, there is none.
    """
    if not path.is_dir():
        return {path.stem: read_report(path)}
    found = {}
    for file in sorted(path.glob("*.json")):
        try:
            found[file.stem] = read_report(file)
        except ConfigError:
            continue  # a folder may hold other things
    return found or {path.stem: read_report(path)}


def compare(before: Path, after: Path) -> Comparison:
    """Match the figures of two files or folders by bench and case."""
    old, new = reports_at(before), reports_at(after)
    if before.is_file() and after.is_file():
        # Two files are two runs of one bench, whatever their names.
        (one,), (other,) = old.values(), new.values()
        old, new = {after.stem: one}, {after.stem: other}
    changes, machine, only = [], [], []
    drifts = {}
    for bench in [*old, *(name for name in new if name not in old)]:
        if bench not in old or bench not in new:
            only.append(f"{bench}: only in {before if bench in old else after}")
            continue
        machine += [line for line in _differences(old[bench], new[bench]) if line not in machine]
        drifts[bench] = drift(old[bench], new[bench])
        former = {figure.key: figure for figure in figures_of(old[bench])}
        latter = {figure.key: figure for figure in figures_of(new[bench])}
        only += [f"{bench}: {case}: only in {before}" for case, _ in former.keys() - latter.keys()]
        only += [f"{bench}: {case}: only in {after}" for case, _ in latter.keys() - former.keys()]
        for key in former:
            if key in latter:
                verdict = judge(former[key], latter[key], drifts[bench])
                changes.append(Change(bench, former[key], latter[key], verdict))
    return Comparison(changes, machine, drifts, sorted(set(only)))


def judge(before: Figure, after: Figure, drift: float) -> str:
    """Whether the change exceeds the noise, and which way it goes."""
    old_low, old_high, new_low, new_high = before.low, before.high, after.low, after.high
    if old_low is None or old_high is None or new_low is None or new_high is None:
        return SAME if before.value == after.value else UNKNOWN
    more = new_low > old_high and after.value > before.value * (1.0 + drift)
    less = new_high < old_low and after.value < before.value / (1.0 + drift)
    if not (more or less):
        return SAME
    return BETTER if more == after.more_is_better else WORSE


def drift(before: Json, after: Json) -> float:
    """Largest ratio minus one of what the machine could do: during the runs and between them."""
    by_probe: dict[str, list[float]] = {}
    for report in (before, after):
        for name, value in _calibrations(report):
            by_probe.setdefault(name, []).append(value)
    ratios = [max(values) / min(values) for values in by_probe.values() if min(values) > 0]
    return max(ratios, default=1.0) - 1.0


def _calibrations(report: Json) -> Iterator[tuple[str, float]]:
    facts: Mapping[str, Any] = report["environment"]
    for found in (
        facts.get("calibration_before"),
        facts.get("calibration_after"),
        report.get("calibration"),
    ):
        yield from ((k, v) for k, v in (found or {}).items() if k.endswith("_per_s"))


def _differences(before: Json, after: Json) -> list[str]:
    one, other = before["environment"], after["environment"]
    return [
        f"{key}: {one.get(key)} | {other.get(key)}"
        for key in MACHINE
        if one.get(key) != other.get(key)
    ]


def print_comparison(found: Comparison) -> None:
    """Ours in full, peers where they changed; then what cannot be compared."""
    if found.machine:
        print("not the same machine or versions, so a difference may be theirs:")
        for line in found.machine:
            print(f"  {line}")
    shown = [c for c in found.changes if c.after.ours or c.verdict in (BETTER, WORSE)]
    width = max((len(_label(change)) for change in shown), default=0) + 2
    print(f"{'':<{width}}{'before':>12}{'after':>12}{'change':>9}  verdict")
    for change in shown:
        print(
            f"{_label(change):<{width}}{change.before.value:>12.4g}{change.after.value:>12.4g}"
            f"{change.part:>+9.1%}  {change.verdict}{'' if change.after.ours else ' (a peer)'}"
        )
    for line in found.only:
        print(line)
    counts = dict.fromkeys((BETTER, WORSE, SAME, UNKNOWN), 0)
    for change in found.changes:
        counts[change.verdict] += change.after.ours
    print("\nours: " + ", ".join(f"{count} {kind}" for kind, count in counts.items()))
    worst = max(found.drift.values(), default=0.0)
    if worst > 0.25:
        print(
            f"the machine itself changed by up to {worst:.0%}: repeat both runs on an idle one",
            flush=True,
        )


def _label(change: Change) -> str:
    figure = change.after
    return f"{change.bench}: {figure.case}: {figure.what} [{figure.unit}]"
