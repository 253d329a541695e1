"""The suite of the ops: nothing that fails or hangs takes the rest along."""

from __future__ import annotations

import ast
import json
import os
import sys
import time
from pathlib import Path

import pytest

from bench.kernels import limited, suite

ROOT = Path(__file__).resolve().parents[2]

REPORT = """
import json, sys, time
rows = [{{"case": "c", "contender": "x", "ours": {ours}, "median_ms": {ms}, "error": 1.0}}]
with open(sys.argv[sys.argv.index("--json") + 1], "w") as file:
    json.dump({{"environment": {{"arguments": sys.argv[1:]}}, "rows": rows}}, file)
"""
SCRIPTS = {
    "sample": REPORT.format(ours=True, ms=0.25),
    "gae": "raise RuntimeError('no such op')",
    "logprobs": REPORT.format(ours=True, ms=2.0) + "time.sleep(60)",
    "another": REPORT.format(ours=False, ms=None),
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of bench scripts in the place of bench/kernels."""
    found = tmp_path / "work" / "bench" / "kernels"
    found.mkdir(parents=True)
    for package in (found, found.parent):
        (package / "__init__.py").write_text("", encoding="utf-8")
    for op, text in SCRIPTS.items():
        (found / f"bench_{op}.py").write_text(text, encoding="utf-8")
    monkeypatch.setattr(limited, "ROOT", tmp_path / "work")
    monkeypatch.setattr(suite, "HERE", found)
    return found


@pytest.mark.usefixtures("folder")
def test_the_important_scripts_come_first() -> None:
    assert suite.scripts() == ["logprobs", "gae", "sample", "another"]


def test_a_script_that_fails_or_hangs_does_not_stop_the_suite(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "results"
    start = time.monotonic()
    code = suite.main(["--out", str(out), "--limit", "3", "--quick", "--threads", "1"])
    assert time.monotonic() - start < 30
    assert code == 2
    lines = capfd.readouterr().out.partition("==== summary")[2].splitlines()
    status = {line.split()[0]: line for line in lines if line and line.split()[0] in SCRIPTS}
    assert "stopped after 3 s" in status["logprobs"]
    assert "failed, exit code 1" in status["gae"]
    assert " ok " in status["sample"]
    assert {path.name for path in out.iterdir()} == {"logprobs.json", "sample.json", "another.json"}
    report = json.loads((out / "sample.json").read_text(encoding="utf-8"))
    assert report["environment"]["arguments"][2:] == ["--quick", "--threads", "1"]
    assert any("sample: c, x" in line and "0.25" in line for line in lines)


def test_an_error_gate_of_ours_is_exit_code_1(folder: Path, tmp_path: Path) -> None:
    text = REPORT.format(ours=True, ms=None) + "sys.exit(1)"
    (folder / "bench_sample.py").write_text(text, encoding="utf-8")
    only = ["--out", str(tmp_path), "--only", "sample", "another"]
    assert suite.main(only) == 1


def test_results_of_a_gpu_have_names_of_their_own(folder: Path, tmp_path: Path) -> None:
    only = ["--out", str(tmp_path), "--only", "sample", "--device", "cuda:0"]
    assert suite.main(only) == 0
    assert (tmp_path / "sample_cuda.json").exists()


def test_a_failed_run_leaves_the_last_result_alone(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "gae.json").write_text("{}", encoding="utf-8")
    assert suite.main(["--out", str(tmp_path), "--only", "gae"]) == 2
    assert (tmp_path / "gae.json").read_text(encoding="utf-8") == "{}"


def test_scripts_without_time_left_are_listed(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert suite.main(["--out", str(tmp_path), "--total", "0"]) == 2
    assert capfd.readouterr().out.count("not run: no time left") == len(SCRIPTS)


def test_what_a_stopped_command_started_is_stopped(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    child = f"import os, time; open({str(pid)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    outcome = limited.run([sys.executable, "-c", parent], 3.0)
    assert outcome.exit_code is None
    time.sleep(0.2)
    status = Path(f"/proc/{pid.read_text()}/status")
    assert not status.exists() or "zombie" in status.read_text()


@pytest.mark.parametrize("path", sorted((ROOT / "bench/kernels").glob("bench_*.py")), ids=str)
def test_every_script_can_be_run_by_the_suite(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    functions = {x.name: x for x in ast.parse(text).body if isinstance(x, ast.FunctionDef)}
    assert "harness.parser(" in text, "the options of the suite are those of harness.parser"
    assert len(functions["main"].args.args) == 1


def test_kernels_are_compiled_and_not_interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    found = limited.python_path()
    assert "TRITON_INTERPRET" not in found
    assert found["PYTHONPATH"].split(os.pathsep) == [
        str(limited.ROOT),
        str(limited.ROOT / "kernels"),
        "/elsewhere",
    ]
