"""All that a machine with a GPU can tell, in pieces of minutes, the most important first.

    python -m bench.gpu_suite OUT [--budget 570] [--only ops,tests ...] [--archs 90] [--again]
        [--archive FILE.tar.gz]
    python -m bench.gpu_suite OUT --tiny          every piece at its smallest, on a CPU

    facts                GPU, driver, compilers, packages
    build                the compiled module with its CUDA part, for the architectures named
    ops                  every kernel against its reference on the device
    paths, graphs        fused forward against the modules; replayed steps against the same steps
    tests                `pytest -m gpu`, where there is pytest-xdist in several processes
    kernel-OP            each op beside its peers and the limits of the device
    decode-SHAPE-BATCH   tokens per second beside `generate`, `generate_batch` and vLLM, roofline
    step-1b-full         a PPO step by phase, memory by phase and role, predicted and held
    step-8b-lora         the same with adapters on one trunk
    attention, switch    each attention backend; from training to generation and back
    memory-lora          bytes of a trunk with four roles, at rest and at the peak of a rollout
    leaks                200 steps of training and generation: live tensors, allocated bytes

Every piece is a process with a time limit and a log, so one that fails, hangs or loses the device
takes nothing along. Results are written as they come: OUT/<piece>.json, OUT/summary.json. The same
command goes on where the last one ended: what passed is not run again, what failed is; no piece is
started that the budget (seconds of this command) leaves no time for. Returns 0 if all passed.
`--archive` keeps all of OUT in one file as well, written anew after each piece: for a machine from
which few files can be fetched.

Nothing here imports torch, so a broken installation is found out and not stumbled over. Where the
sources have no git history, BENCH_COMMIT names the commit.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
import tarfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .kernels import limited
from .registry import BENCHES, PRESETS

BUDGET = 570.0
LEAST = 20.0  # seconds that must be left for a piece to start
PASSED = "passed"
SUMMARY = "summary.json"
FACTS = """
nvidia-smi; nvcc --version; c++ --version; cmake --version
git rev-parse HEAD; git status --short
{python} --version; {python} -m pip list
{python} -c "import torch, triton; print(torch.__version__, torch.version.cuda, triton.__version__)"
"""
# A package that the machine lacks ends the collection of its own files, not of the others.
# Each test is named as it ends: a run that hangs says where.
TESTS = ("--continue-on-collection-errors", "--durations=10", "-rs", "-v")
COLLECT = ("--collect-only", "-q", "tests/kernels/test_sample_gpu.py")


@dataclass(frozen=True)
class Piece:
    """A command under a limit; `{json}` in it is where its result goes."""

    name: str
    command: tuple[str, ...]
    limit: float
    environment: dict[str, str] = field(default_factory=dict)


def pieces(archs: str = "90", tiny: bool = False) -> list[Piece]:
    """All of them, in the order of their importance."""
    python = sys.executable
    build = {
        "RLHF_FAST_BUILD": "require",
        "RLHF_FAST_CUDA_ARCHS": archs,
        "MAX_JOBS": str(os.cpu_count() or 1),
    }
    setup = (python, "setup.py", *(("--version",) if tiny else ("build_ext", "--inplace")))

    def of(name: str, limit: float) -> Piece:
        flags = ("--tiny",) if tiny else ()
        command = (python, "-m", f"{__package__}.gpu_piece", name, "--json", "{json}", *flags)
        return Piece(name, command, limit)

    decoding = [of(f"decode-{shape}-{n}", 400) for n in (64, 1, 256) for shape in ("1b", "8b")]
    return [
        Piece("facts", ("sh", "-c", FACTS.format(python=python)), 60),
        Piece("build", setup, 300, build),
        of("ops", 120),
        of("paths", 120),
        of("graphs", 120),
        Piece(
            "tests", (python, "-m", "pytest", "-m", "gpu", *(COLLECT if tiny else _tests())), 300
        ),
        *_kernels(tiny),
        *decoding[:2],
        of("step-1b-full", 400),
        of("step-8b-lora", 500),
        of("attention", 120),
        *decoding[2:],
        of("leaks", 400),
        of("memory-lora", 300),
        of("switch", 200),
    ]


def _tests() -> tuple[str, ...]:
    """Arguments of pytest: the files with tests for a GPU, as collecting all others takes a minute.

    Compiling the kernels, one core each, is most of their time.
    """
    folder = limited.ROOT / "tests"
    named = (path for path in folder.rglob("test_*.py") if "mark.gpu" in path.read_text("utf-8"))
    files = sorted(str(path.relative_to(limited.ROOT)) for path in named)
    workers = min(8, os.cpu_count() or 1) if importlib.util.find_spec("xdist") else 0
    return (*TESTS, *(("-n", str(workers)) if workers > 1 else ()), *files)


def _kernels(tiny: bool) -> list[Piece]:
    """A table of each op; short, so that all of them fit a few minutes."""
    preset = "tiny" if tiny else "h200"
    extra = () if tiny else ("--quick",)
    return [
        Piece(
            f"kernel-{bench.name}",
            (
                *(sys.executable, "-m", f"{__package__}.{bench.module}"),
                *(*bench.arguments[preset], *extra, "--json", "{json}"),
            ),
            180,
            dict(PRESETS[preset].environment),
        )
        for bench in BENCHES
        if bench.group == "kernels" and "h200" in bench.arguments
    ]


def run(
    todo: Sequence[Piece],
    out: Path,
    budget: float,
    again: bool = False,
    archive: Path | None = None,
) -> bool:
    """Run what has not passed before; returns whether all that was asked for has passed."""
    end = time.monotonic() + budget
    found = _read(out)
    left = []
    for piece in todo:
        if found.get(piece.name, {}).get("status") == PASSED and not again:
            continue
        room = end - time.monotonic()
        if room < LEAST:
            left.append(piece.name)
            continue
        found[piece.name] = _run_one(piece, out, min(piece.limit, room))
        _write(out, found)
        if archive is not None:
            _pack(out, archive)
    if left:
        print(f"left for the next run: {', '.join(left)}", flush=True)
    return all(found.get(piece.name, {}).get("status") == PASSED for piece in todo)


def _run_one(piece: Piece, out: Path, limit: float) -> dict[str, Any]:
    log = out / f"{piece.name}.log"
    target = str(out / f"{piece.name}.json")
    command = [word.replace("{json}", target) for word in piece.command]
    print(f"{piece.name}: up to {limit:.0f} s ...", end=" ", flush=True)
    with log.open("wb") as stream:
        given = limited.python_path() | piece.environment
        outcome = limited.run(command, limit, log=stream, environment=given)
    status = PASSED
    if outcome.exit_code is None:
        status = f"stopped at its limit of {limit:.0f} s"
    elif outcome.exit_code != 0:
        status = f"FAILED, exit code {outcome.exit_code}, see {log.name}"
    print(f"{status}, {outcome.seconds:.0f} s", flush=True)
    return {"status": status, "seconds": outcome.seconds, "command": command, "time": _now()}


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def _read(out: Path) -> dict[str, dict[str, Any]]:
    """How the pieces ended so far."""
    path = out / SUMMARY
    if not path.exists():
        return {}
    found: dict[str, dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["pieces"]
    return found


def _write(out: Path, found: dict[str, dict[str, Any]]) -> None:
    text = json.dumps({"commit": os.environ.get("BENCH_COMMIT"), "pieces": found}, indent=1)
    partial = out / f"{SUMMARY}.partial"
    partial.write_text(text + "\n", encoding="utf-8")
    os.replace(partial, out / SUMMARY)


def _pack(out: Path, archive: Path) -> None:
    partial = archive.with_name(f"{archive.name}.partial")
    with tarfile.open(partial, "w:gz") as target:
        for path in sorted(out.iterdir()):
            if path not in (archive, partial):
                target.add(path, path.name)
    os.replace(partial, archive)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="everything that needs a GPU")
    parser.add_argument("out", type=Path, help="folder for logs and results")
    parser.add_argument("--only", type=lambda text: text.split(","), default=[])
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds of this command")
    parser.add_argument("--archs", default="90", help="CUDA architectures to build, such as 80;90")
    parser.add_argument("--again", action="store_true", help="also pieces that have passed")
    parser.add_argument("--tiny", action="store_true", help="at the smallest, on a CPU")
    parser.add_argument("--archive", type=Path, help="one .tar.gz of all of OUT, kept up to date")
    options = parser.parse_args(arguments)
    todo = pieces(options.archs, options.tiny)
    unknown = set(options.only) - {piece.name for piece in todo}
    if unknown:
        names = ", ".join(piece.name for piece in todo)
        parser.error(f"no piece {', '.join(sorted(unknown))}; there are {names}")
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    todo = [piece for piece in todo if not options.only or piece.name in options.only]
    archive = options.archive and options.archive.resolve()
    return 0 if run(todo, out, options.budget, options.again, archive) else 1


if __name__ == "__main__":
    sys.exit(main())
