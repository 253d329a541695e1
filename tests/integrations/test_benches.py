"""The smallest form of every bench against another trainer runs, so that none rots."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from bench import figures

ROOT = Path(__file__).resolve().parents[2]
# Module, arguments, the package that it needs.
BENCHES = (
    ("bench_functions", "--peer areal", "areal"),
    ("bench_functions", "--peer openrlhf", "openrlhf"),
    ("bench_functions", "--peer trl", "trl"),
    ("bench_functions", "--peer verl", "verl"),
    ("bench_update_step", "--peer openrlhf", "openrlhf"),
    ("bench_update_step", "--peer verl", "verl"),
    ("bench_trl_runs", "--kind GRPO", "trl"),
)


@pytest.mark.parametrize(
    ("module", "arguments", "peer"), BENCHES, ids=[f"{b[0]}-{b[2]}" for b in BENCHES]
)
def test_it_runs_and_its_report_has_figures(
    module: str, arguments: str, peer: str, tmp_path: Path
) -> None:
    if importlib.util.find_spec(peer) is None:
        pytest.skip(f"{peer} is not installed here: make test-integrations")
    path = tmp_path / "report.json"
    command = [sys.executable, "-m", f"bench.integrations.{module}", *arguments.split()]
    done = subprocess.run(
        [*command, "--quick", "--threads", "1", "--json", str(path)],
        cwd=ROOT, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = figures.figures_of(figures.read_report(path))
    assert {figure.ours for figure in found} == {True, False}
    keys = [figure.key for figure in found]
    assert len(keys) == len(set(keys)), "two figures of one name could not be compared"
