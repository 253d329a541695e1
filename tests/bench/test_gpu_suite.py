"""Every piece of the GPU suite runs at its smallest; nothing that fails or hangs takes the rest
along, and the same command goes on where the last one ended."""

from __future__ import annotations

import json
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import gpu_piece, gpu_steps, gpu_suite
from bench.engine import gpu_checks, gpu_pieces
from bench.kernels import limited

SETUP = gpu_pieces.Setup(torch.device("cpu"), True)


@pytest.mark.parametrize("name", list(gpu_piece.pieces(SETUP)))
def test_the_smallest_of_every_piece_passes(name: str, tmp_path: Path) -> None:
    path = tmp_path / "found.json"
    assert gpu_piece.main([name, "--tiny", "--json", str(path)]) == 0
    record = json.loads(path.read_text())
    assert record["result"]["passed"]
    assert record["tiny"]
    assert record["environment"]["torch"] == torch.__version__
    if name == "graphs":
        graphs = record["rows"]
        assert all(row["graphs"]["replays"] > row["graphs"]["eager"] > 0 for row in graphs)
    if name.startswith("step-"):
        (row,) = record["rows"]
        assert set(row["phases"]) == {"generate", "score", "prepare", "update", "step"}
        assert row["memory"]["update"]["actor"] > row["memory"]["load"]["actor"] > 0
        # Four models or one trunk: who holds the weights.
        assert ("trunk" in row["memory"]["load"]) == ("lora" in name)


def test_a_piece_that_fails_is_written_and_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "found.json"
    monkeypatch.setattr(gpu_checks, "FP32_GAP", 0.0)
    assert gpu_piece.main(["paths", "--tiny", "--json", str(path)]) == 1
    assert not json.loads(path.read_text())["result"]["passed"]
    monkeypatch.setattr(gpu_checks, "ops", lambda _: 1 / 0)
    assert gpu_piece.main(["ops", "--tiny", "--json", str(path)]) == 1
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_only_steps_need_what_configs_are_read_with() -> None:
    assert set(gpu_piece.STEPS) == set(gpu_steps.pieces(SETUP))
    code = "import sys; sys.modules['omegaconf'] = None; from bench import gpu_piece"
    done = limited.run([sys.executable, "-c", code], 120, environment=limited.python_path())
    assert done.exit_code == 0


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([9, 5, 5, 6, 5, 5, 6, 5, 6, 5, 5, 6, 5, 6, 5, 6], False),  # settled, then up and down
        ([5, 5, 5, 6, 5, 5, 6, 5, 6, 5, 7, 7, 7, 8, 8, 8], True),  # lifted for good
        ([0] * 16, False),
    ],
)
def test_growth_is_told_from_ups_and_downs(values: list[int], expected: bool) -> None:
    assert gpu_steps.grows(values) == expected


def test_a_leak_of_one_tensor_a_step_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = []
    honest = gpu_steps.one_step

    def leaking(trainer: Any) -> int:
        kept.append(torch.zeros(1))
        return honest(trainer)

    monkeypatch.setattr(gpu_steps, "SETTLED", 2)
    monkeypatch.setattr(gpu_steps, "one_step", leaking)
    assert not gpu_steps.leaks(SETUP)["passed"]


# ---- the suite ----------------------------------------------------------------------------------


def test_every_piece_has_a_command_that_exists_and_fits_ten_minutes() -> None:
    for tiny in (False, True):
        pieces = gpu_suite.pieces(tiny=tiny)
        names = [piece.name for piece in pieces]
        assert names[:6] == ["facts", "build", "ops", "paths", "graphs", "tests"]
        assert len(names) == len(set(names))
        assert all(piece.limit <= gpu_suite.BUDGET < 600 - limited.GRACE for piece in pieces)
        here = {piece.command[3] for piece in pieces if "bench.gpu_piece" in piece.command}
        assert here == set(gpu_piece.pieces(SETUP))
    tests = next(piece.command for piece in gpu_suite.pieces() if piece.name == "tests")
    assert "tests/kernels/test_sample_gpu.py" in tests
    assert "tests/robustness/test_devices.py" in tests
    assert "tests/kernels/test_linear_small.py" not in tests
    modules = {p.command[2] for p in gpu_suite.pieces() if p.name.startswith("kernel-")}
    scripts = (Path(gpu_suite.__file__).parent / "kernels").glob("bench_*.py")
    of_gpus = {f"bench.kernels.{path.stem}" for path in scripts} - {
        f"bench.kernels.bench_{name}" for name in ("linear_small", "matmul", "decoder_layer")
    }
    assert modules == of_gpus
    assert gpu_suite.pieces("90a")[1].environment["RLHF_FAST_CUDA_ARCHS"] == "90a"


@pytest.fixture
def pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[gpu_suite.Piece]:
    """Quick ones of every kind; `good` and `failing` count their runs."""
    monkeypatch.setattr(gpu_suite, "LEAST", 0.5)

    def python(text: str) -> tuple[str, ...]:
        return (sys.executable, "-c", text, "{json}")

    count = f"open({str(tmp_path / 'runs')!r}, 'a').write("
    return [
        gpu_suite.Piece("absent", ("/no/such/program",), 5),
        gpu_suite.Piece("failing", python(f"{count}'f'); print('why'); raise SystemExit(7)"), 10),
        gpu_suite.Piece("hanging", python("import time; time.sleep(60)"), 1),
        gpu_suite.Piece(
            "good",
            python(f"import os, sys; {count}'g'); open(sys.argv[1], 'w').write(os.environ['X'])"),
            10,
            {"X": "seen"},
        ),
    ]


def test_pieces_do_not_depend_on_each_other_and_failed_ones_are_run_again(
    tmp_path: Path, pieces: list[gpu_suite.Piece], capsys: pytest.CaptureFixture[str]
) -> None:
    assert not gpu_suite.run(pieces, tmp_path, 40)
    summary = json.loads((tmp_path / "summary.json").read_text())["pieces"]
    assert list(summary) == ["absent", "failing", "hanging", "good"]
    assert summary["failing"]["status"] == "FAILED, exit code 7, see failing.log"
    assert "stopped at its limit of 1 s" in summary["hanging"]["status"]
    assert summary["good"]["status"] == "passed"
    assert (tmp_path / "good.json").read_text() == "seen"
    assert "why" in (tmp_path / "failing.log").read_text()
    assert "stopped" in capsys.readouterr().out
    assert not gpu_suite.run(pieces[1:2] + pieces[3:], tmp_path, 40)
    assert (tmp_path / "runs").read_text() == "fgf"
    assert gpu_suite.run(pieces[3:], tmp_path, 40, again=True)
    assert (tmp_path / "runs").read_text() == "fgfg"


def test_one_file_holds_all_that_was_written(tmp_path: Path, pieces: list[gpu_suite.Piece]) -> None:
    out = tmp_path / "out"
    out.mkdir()
    archive = out / "all.tar.gz"
    for piece in pieces[1:4:2]:
        gpu_suite.run([piece], out, 40, archive=archive)
        with tarfile.open(archive) as found:
            names = found.getnames()
        assert names == sorted(path.name for path in out.iterdir() if path != archive)
    assert names == ["failing.log", "good.json", "good.log", "summary.json"]


@pytest.mark.slow
def test_a_command_that_is_stopped_tells_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limited, "GRACE", 120.0)  # beside other tests pytest takes its time to end
    script = tmp_path / "test_slow.py"
    script.write_text("import time\ndef test_a(): assert 0\ndef test_b(): time.sleep(60)\n")
    log = tmp_path / "log"
    with log.open("wb") as stream:
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(script)]
        assert limited.run(command, 15.0, log=stream).exit_code is None
    assert "test_slow.py:2: AssertionError" in log.read_text()


def test_a_backend_that_raises_leaves_the_others_their_figures(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    choose = gpu_checks.choose_attention

    def broken(*sizes: Any, wish: str) -> Any:
        return None if wish == "flash_attn" else choose(*sizes, wish=wish)

    monkeypatch.setattr(gpu_checks, "choose_attention", broken)
    found = gpu_checks.attention(torch.device("cpu"), tiny=True)
    assert not found["passed"]
    assert "AttributeError" in found["backends"]["flash_attn"]["error"]
    assert found["backends"]["rlhf_fast"]["passed"]


def test_nothing_starts_beyond_the_budget_and_unknown_pieces_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert gpu_suite.main([str(tmp_path), "--tiny", "--budget", "-1"]) == 1
    assert "left for the next run: facts, build, ops" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())
    with pytest.raises(SystemExit):
        gpu_suite.main([str(tmp_path), "--tiny", "--only", "nothing"])


@pytest.mark.slow
def test_the_suite_runs_its_pieces_as_processes(tmp_path: Path) -> None:
    only = "facts,build,ops,kernel-linear_logprobs"
    assert gpu_suite.main([str(tmp_path), "--tiny", "--only", only]) == 0
    assert json.loads((tmp_path / "ops.json").read_text())["result"]["passed"]
    rows = json.loads((tmp_path / "kernel-linear_logprobs.json").read_text())["rows"]
    assert any(row["ours"] for row in rows)
