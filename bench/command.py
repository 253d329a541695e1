"""`rlhf-fast bench`: runs benches one after the other, keeps their reports, ends with a table.

Each bench is a process of its own under a time limit, so that one that fails or hangs takes nothing
along; what it prints goes to OUT/logs, what it measured to OUT/<bench>.json, how all ended to
OUT/summary.json and the page to OUT/report.html.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from rlhf_fast.errors import EXIT_INTERRUPTED, ConfigError, EnvironmentFault
from rlhf_fast.stages.progress import ProgressBar, ProgressDisplay

from .compare import compare, print_comparison
from .figures import EXTRA, Figure, figures_of
from .kernels import limited
from .kernels.environment import environment
from .kernels.tables import print_environment
from .page import build_page
from .registry import PRESETS, Bench, chosen

PAGE_NAME = "report.html"
SUMMARY_NAME = "summary.json"
FOLLOW_SECONDS = 1.0
OK, GATE, ABSENT = "ok", "ERROR GATE", "not in this version"


@dataclass
class Ended:
    """How a bench ended; `report` is what it had measured until then."""

    name: str
    group: str
    status: str
    seconds: float = 0.0
    command: list[str] = field(default_factory=list)
    report: dict[str, Any] | None = None

    @property
    def bad(self) -> bool:
        """It was to measure and did not, or what it measured was wrong."""
        return self.status not in (OK, ABSENT) and not self.status.startswith("no part in")


def run(
    group: str,
    preset: str,
    out: Path,
    *,
    names: Sequence[str] = (),
    threads: int | None = None,
    trl_python: str | None = None,
    resume: bool = False,
) -> int:
    """Run the benches of a group and show what they found.

    Args:
        group: one of `registry.GROUPS`, or `all`.
        preset: one of `registry.PRESETS`.
        out: folder of the reports and of the page; made if missing.
        names: benches of the group to run, all if empty.
        threads: of torch on the CPU; the bench's own choice if None.
        trl_python: interpreter of the environment that has TRL; this one if None.
        resume: benches that ended well in `out`, with the same arguments, are not run again.

    Returns:
        The exit code: 1 if a bench failed or an error gate did, 130 after Ctrl-C, otherwise 0.

    Raises:
        ConfigError: RF1070, no bench of that name in the group; RF1072, no such interpreter.
        EnvironmentFault: RF7030, the preset needs a GPU; RF7901, `out` cannot be written.
    """
    benches = _chosen(group, names)
    _require_program(trl_python)
    _require_device(preset)
    _require_folder(out / "logs")
    before = _ended_well(out) if resume else {}
    device = torch.device(PRESETS[preset].device)
    facts = environment(threads or torch.get_num_threads(), device)
    print_environment(facts)
    print(f"{len(benches)} benches, preset {preset}: {PRESETS[preset].about}", flush=True)
    ended: list[Ended] = []
    stopped = False
    try:
        with ProgressDisplay().bar("bench", len(benches)) as bar:
            for bench in benches:
                arguments = _arguments(bench, preset, threads, trl_python)
                again = before.get(bench.name)
                if again is not None and again.command == arguments:
                    ended.append(again)
                    print(f"{bench.name}: kept", flush=True)
                else:
                    ended.append(_run_one(bench, preset, out, arguments, bar))
                    print(
                        f"{bench.name}: {ended[-1].status}, {ended[-1].seconds:.0f} s", flush=True
                    )
                bar.advance()
                _write_summary(out, preset, facts, ended)
    except KeyboardInterrupt:
        stopped = True  # what was measured until now is shown
    print_table(ended)
    if preset == "tiny":
        print("\npreset tiny: every bench ran at its smallest; no figure above means anything")
    reports = {one.name: one.report for one in ended if one.report is not None}
    statuses = [(one.name, one.group, one.status, one.seconds) for one in ended]
    page = build_page(reports, statuses, facts, preset, out / PAGE_NAME)
    print(f"\nreports: {out}\npage:    {page}", flush=True)
    if stopped:
        print(f"interrupted: {len(benches) - len(ended)} of {len(benches)} benches did not run")
        return EXIT_INTERRUPTED
    return 1 if any(one.bad for one in ended) else 0


def show_comparison(before: Path, after: Path) -> int:
    """`--compare`: print what changed; returns 0.

    Raises:
        ConfigError: RF1071, one of them holds no report.
    """
    print_comparison(compare(before, after))
    return 0


def _chosen(group: str, names: Sequence[str]) -> list[Bench]:
    benches = chosen(group, names)
    unknown = [name for name in names if name not in {bench.name for bench in benches}]
    if unknown:
        raise ConfigError(
            "RF1070",
            f"no bench {unknown[0]} in {group}",
            where="--only",
            expected=", ".join(bench.name for bench in chosen(group)),
            remedy="correct the name",
        )
    return benches


def _require_program(trl_python: str | None) -> None:
    if trl_python is not None and shutil.which(trl_python) is None:
        raise ConfigError(
            "RF1072",
            f"no program {trl_python}",
            where="--trl-python",
            expected="a Python interpreter, for example trl-env/bin/python",
            remedy="correct the path",
        )


def _require_device(preset: str) -> None:
    if PRESETS[preset].device == "cuda" and not torch.cuda.is_available():
        raise EnvironmentFault(
            "RF7030",
            f"the preset {preset} needs a GPU that torch can use",
            where="--preset",
            expected="a CUDA build of torch, a driver and a GPU",
            remedy="see `rlhf-fast env`, or take --preset cpu",
        )


def _require_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EnvironmentFault(
            "RF7901",
            f"cannot write the reports: {error.strerror or error}",
            where=str(folder),
            remedy="name another folder with --out",
        ) from error


def _ended_well(out: Path) -> dict[str, Ended]:
    """Of an earlier run into this folder, by name, with what they measured."""
    summary = _report(out / SUMMARY_NAME) or {}
    found = {}
    for one in summary.get("benches", []):
        report = _report(out / f"{one['name']}.json")
        if one["status"] == OK and report is not None:
            found[one["name"]] = Ended(**one, report=report)
    return found


def _arguments(bench: Bench, preset: str, threads: int | None, trl_python: str | None) -> list[str]:
    """Of the interpreter; none if the bench is not to be run."""
    if not bench.present or preset not in bench.arguments:
        return []
    arguments = bench.command(preset, __package__)
    if threads is not None and bench.threads:
        arguments += ["--threads", str(threads)]
    if trl_python is not None and bench.trl:
        arguments += ["--trl-python", trl_python]
    return arguments


def _run_one(bench: Bench, preset: str, out: Path, arguments: list[str], bar: ProgressBar) -> Ended:
    ended = Ended(bench.name, bench.group, OK, command=arguments)
    if not bench.present:
        ended.status = ABSENT
    elif not arguments:
        ended.status = f"no part in {preset}"
    if ended.status != OK:
        return ended
    log = out.resolve() / "logs" / f"{bench.name}.log"
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, *ended.command, "--json", str(report)]
        given = {**limited.python_path(), **PRESETS[preset].environment}
        with log.open("wb") as stream, _following(log, bench.name, bar):
            outcome = limited.run(command, bench.limit, log=stream, environment=given)
        ended.report = _report(report)
        if ended.report is not None:
            shutil.copyfile(report, out / f"{bench.name}.json")
    ended.seconds = outcome.seconds
    if outcome.exit_code is None:
        ended.status = f"stopped after {bench.limit:.0f} s"
    elif outcome.exit_code != 0:
        wrong = gate_failed(ended.report)
        ended.status = GATE if wrong else f"failed, exit code {outcome.exit_code}, see {log}"
    return ended


@contextmanager
def _following(log: Path, name: str, bar: ProgressBar) -> Iterator[None]:
    """Show beside the bar what the bench printed last."""
    stop, start = threading.Event(), time.monotonic()

    def follow() -> None:
        while not stop.wait(FOLLOW_SECONDS):
            bar.note(now=name, seconds=round(time.monotonic() - start), at=_last_line(log))

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _last_line(log: Path) -> str:
    with log.open("rb") as stream:
        stream.seek(max(0, os.fstat(stream.fileno()).st_size - 400))
        lines = stream.read().decode(errors="replace").split("\n")
    return next((line.strip()[:60] for line in reversed(lines) if line.strip()), "")


def _report(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # none, or cut off in the middle
        return None
    return found if isinstance(found, dict) else None


def gate_failed(report: Mapping[str, Any] | None) -> bool:
    """Whether a result of ours was wrong: a row without its time, a side that learned otherwise."""
    found = report or {}
    rows = any(
        row.get("ours") and row.get("median_ms", 0.0) is None for row in found.get("rows", [])
    )
    # Trainers that did not learn the same: reasons by side.
    return rows or any(any(case["gate"].values()) for case in found.get("cases", []))


def _write_summary(
    out: Path, preset: str, facts: Mapping[str, Any], ended: Sequence[Ended]
) -> None:
    kept = [{k: v for k, v in asdict(one).items() if k != "report"} for one in ended]
    text = json.dumps({"preset": preset, "machine": facts, "benches": kept}, indent=1)
    (out / SUMMARY_NAME).write_text(text + "\n", encoding="utf-8")


def print_table(ended: Sequence[Ended]) -> None:
    """Status of every bench, then one line for each figure of ours."""
    print("\n==== summary ====")
    for one in ended:
        print(f"{one.name:<20}{one.group:<13}{one.seconds:>7.0f} s  {one.status}")
    found = [(one.name, figure) for one in ended for figure in figures_of(one.report or {})]
    lines = [(name, figure) for name, figure in found if figure.ours and figure.what != EXTRA]
    labels = [f"{name}: {figure.case}" for name, figure in lines]
    width = max((len(label) for label in labels), default=0) + 2
    print(f"\n{'':<{width}}{'what':<20}{'median':>12}{'p20':>11}{'p80':>11}")
    for label, (_, figure) in zip(labels, lines, strict=True):
        print(f"{label:<{width}}{_cells(figure)}")
    for bench in ended:
        if gate_failed(bench.report):
            print(f"{bench.name}: a result of ours is WRONG, so it has no speed; see its log")


def _cells(figure: Figure) -> str:
    values = ("" if end is None else f"{end:.4g}" for end in (figure.low, figure.high))
    ends = "".join(f"{value:>11}" for value in values)
    value = f"{figure.value:.4g} {figure.unit}"
    return f"{figure.what:<20}{value:>12}{ends}  {figure.note}".rstrip()
