"""Every Triton kernel compiles ahead of time for three generations, and none that is hot spills."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench.kernels.triton_resources import few_of
from rlhf_fast_kernels import triton_support
from rlhf_fast_kernels.triton_support import AotCase

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.skipif(not triton_support.installed(), reason="triton is not installed")


OPS = triton_support.ops_with_kernels()
ARCHITECTURES = (80, 90, 100)


def resources(report: Path, *arguments: str) -> list[dict[str, Any]]:
    """The rows of the command; all kernels compile and none that is hot spills, or it fails.

    In a process of its own: here the kernels may already be loaded for the interpreter.
    """
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    command = [sys.executable, "-m", "bench.kernels.triton_resources", *arguments]
    done = subprocess.run(
        [*command, "--json", str(report)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    rows: list[dict[str, Any]] = json.loads(report.read_text(encoding="utf-8"))
    assert all(row["registers"] > 0 for row in rows)
    return rows


def kernels_of(op: str) -> set[tuple[str, str, int]]:
    """Every kernel of an op with every architecture."""
    names = {case.kernel.__name__ for case in triton_support.kernels(op).AOT_CASES}
    return {(op, name, arch) for name in names for arch in ARCHITECTURES}


@pytest.mark.slow
@pytest.mark.parametrize("ops", [OPS[::2], OPS[1::2]], ids=["half", "other half"])
def test_every_kernel_compiles_without_spills(ops: tuple[str, ...], tmp_path: Path) -> None:
    rows = resources(tmp_path / "resources.json", "--few", "--op", *ops)
    wanted = set.union(*(kernels_of(op) for op in ops))
    assert {(row["op"], row["kernel"], row["arch"]) for row in rows} == wanted


@pytest.mark.long
@pytest.mark.parametrize("op", OPS)
def test_every_case_compiles_without_spills(op: str, tmp_path: Path) -> None:
    rows = resources(tmp_path / "resources.json", "--op", op)
    assert {(row["op"], row["kernel"], row["arch"]) for row in rows} == kernels_of(op)


def test_few_leaves_out_no_case_and_no_kernel_on_any_architecture() -> None:
    def plain() -> None: ...

    def newer() -> None: ...

    old = [AotCase(plain, {"x": name}) for name in ("a", "b", "c", "d")]
    new = [AotCase(newer, {"x": name}, oldest=90) for name in ("e", "f")]
    found = [(case.signature["x"], arch) for case, arch in few_of([*old, *new], ARCHITECTURES)]
    assert found == [
        *[("a", 80), ("a", 90), ("a", 100), ("b", 90), ("c", 100), ("d", 80)],
        *[("e", 90), ("e", 100), ("f", 100)],
    ]
