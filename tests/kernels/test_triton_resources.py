"""Every Triton kernel compiles ahead of time for three generations, and none that is hot spills."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf_fast_kernels import triton_support

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.skipif(not triton_support.installed(), reason="triton is not installed")


@pytest.mark.parametrize("op", triton_support.ops_with_kernels())
def test_kernels_compile_without_spills(op: str, tmp_path: Path) -> None:
    # In a process of its own: here the kernels may already be loaded for the interpreter.
    report = tmp_path / "resources.json"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    done = subprocess.run(
        [sys.executable, "-m", "bench.kernels.triton_resources", "--op", op, "--json", str(report)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(report.read_text(encoding="utf-8"))
    assert {row["arch"] for row in rows} == {80, 90, 100}
    assert all(row["registers"] > 0 for row in rows)
