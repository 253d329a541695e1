"""All that a machine with a GPU can tell, in one command and under ten minutes.

    python -m bench.kernels.gpu_check OUT [--total 570] [--archs 90] [--only build check ...]

In this order, each with a time limit and a log file in OUT, whatever became of the one before:

    facts   GPU, driver, compilers, packages
    build   the compiled module with its CUDA part, for the architectures named
    check   as `rlhf-fast check --ops`: parity of every implementation with its reference
    tests   `pytest -m gpu`
    bench   the suite, quick, on the GPU; takes the time that the others left

`summary.json` says how each ended; the reports of the suite carry GPU, driver, versions and commit.
Where the sources have no git history, BENCH_COMMIT names the commit. Returns 0 if all went well.
Nothing here needs torch, so a broken installation is found out and not stumbled over.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from . import limited

TOTAL = 570.0
FACTS = """
nvidia-smi; nvcc --version; c++ --version; cmake --version
git rev-parse HEAD; git status --short
{python} --version; {python} -m pip list
{python} -c "import torch, triton; print(torch.__version__, torch.version.cuda, triton.__version__)"
"""
# What `rlhf-fast check --ops` calls; the command line itself needs more packages than the ops do.
CHECK = """
import sys
from rlhf_fast.environment import check_ops
text, passed = check_ops()
print(text)
sys.exit(not passed)
"""
# A package that the machine lacks ends the collection of its own files, not of the others.
TESTS = ("--continue-on-collection-errors", "--durations=10", "-rs")


@dataclass(frozen=True)
class Step:
    """A command; the steps before it leave `least` seconds of the total for it."""

    name: str
    command: tuple[str, ...]
    limit: float
    least: float = 0.0
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Ended:
    """How a step ended; exit_code None: it was stopped at its limit, or had no time at all."""

    name: str
    command: tuple[str, ...]
    exit_code: int | None
    seconds: float
    limit: float
    log: str


def steps(out: Path, archs: str) -> list[Step]:
    """The steps in their order; `bench` is limited by the time left alone."""
    python = sys.executable
    build = {
        "RLHF_FAST_BUILD": "require",
        "RLHF_FAST_CUDA_ARCHS": archs,
        "MAX_JOBS": str(os.cpu_count() or 1),
    }
    suite = ("-m", f"{__package__}.suite", "--device", "cuda", "--quick", "--out", str(out))
    return [
        Step("facts", ("sh", "-c", FACTS.format(python=python)), 40, 20),
        Step("build", (python, "setup.py", "build_ext", "--inplace"), 240, 100, build),
        Step("check", (python, "-c", CHECK), 90, 40),
        Step("tests", (python, "-m", "pytest", "-m", "gpu", *TESTS), 180, 60),
        Step("bench", (python, *suite, "--limit", "120"), TOTAL, 150),
    ]


def run_steps(todo: Sequence[Step], out: Path, total: float) -> list[Ended]:
    """Run them all, write their logs and, after each, the summary."""
    end = time.monotonic() + total
    ended: list[Ended] = []
    for position, step in enumerate(todo):
        later = sum(other.least for other in todo[position + 1 :])
        limit = max(0.0, min(step.limit, end - time.monotonic() - later))
        command = step.command
        if step.name == "bench":  # it must still print its summary
            command = (*command, "--total", str(max(limit - 15.0, 0.0)))
        log = out / f"{step.name}.log"
        print(f"{step.name}: up to {limit:.0f} s ...", flush=True)
        with log.open("wb") as stream:
            outcome = limited.run(
                command,
                limit,
                log=stream,
                environment=limited.python_path() | step.environment,
            )
        ended.append(Ended(step.name, command, *outcome, limit, log.name))
        print(f"{step.name}: {verdict(ended[-1])}, {outcome.seconds:.0f} s", flush=True)
        summary = {
            "commit": os.environ.get("BENCH_COMMIT"),
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "steps": [asdict(one) for one in ended],
        }
        text = json.dumps(summary, indent=1)
        (out / "summary.json").write_text(text + "\n", encoding="utf-8")
    return ended


def verdict(one: Ended) -> str:
    if one.exit_code is None:
        return f"STOPPED at its limit of {one.limit:.0f} s"
    return "ok" if one.exit_code == 0 else f"FAILED, exit code {one.exit_code}, see {one.log}"


def main(arguments: Sequence[str] | None = None) -> int:
    names = [step.name for step in steps(Path(), "")]
    parser = argparse.ArgumentParser(description="everything that needs a GPU")
    parser.add_argument("out", type=Path, help="folder for logs and results")
    parser.add_argument("--total", type=float, default=TOTAL, help="seconds in all")
    parser.add_argument("--archs", default="90", help="CUDA architectures to build, such as 80;90")
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    options = parser.parse_args(arguments)
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    todo = [step for step in steps(out, options.archs) if step.name in options.only]
    ended = run_steps(todo, out, options.total)
    bench = out / "bench.log"
    if bench.exists():
        print(bench.read_text(encoding="utf-8", errors="replace").partition("==== summary")[2])
    return 0 if all(one.exit_code == 0 for one in ended) else 1


if __name__ == "__main__":
    sys.exit(main())
