"""Every piece of the engine's GPU suite runs at its smallest, and a cut run goes on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bench.engine import gpu_checks, gpu_suite


def test_all_pieces_run_and_a_second_run_has_nothing_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert gpu_suite.main([str(tmp_path), "--tiny"]) == 0
    setup = gpu_suite.Setup(torch.device("cpu"), True)
    names = list(gpu_suite.pieces(setup))
    assert sorted(p.stem for p in tmp_path.iterdir()) == sorted(names)
    for name in names:
        record = json.loads((tmp_path / f"{name}.json").read_text())
        assert record["result"]["passed"], name
        assert record["tiny"]
        assert record["environment"]["torch"] == torch.__version__
    graphs = json.loads((tmp_path / "graphs.json").read_text())["result"]["rows"]
    assert all(row["graphs"]["replays"] > row["graphs"]["eager"] > 0 for row in graphs)
    assert capsys.readouterr().out.count("passed") == len(names)
    monkeypatch.setattr(gpu_suite, "run_piece", lambda *_: pytest.fail("ran again"))
    assert gpu_suite.main([str(tmp_path), "--tiny"]) == 0


def test_a_piece_that_fails_is_written_and_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_checks, "FP32_GAP", 0.0)
    assert gpu_suite.main([str(tmp_path), "--tiny", "--only", "paths"]) == 1
    assert not json.loads((tmp_path / "paths.json").read_text())["result"]["passed"]
    monkeypatch.setattr(gpu_checks, "ops", lambda _: 1 / 0)
    assert gpu_suite.main([str(tmp_path), "--tiny", "--only", "ops"]) == 1
    assert "ZeroDivisionError" in capsys.readouterr().out


def test_nothing_starts_beyond_the_budget_and_unknown_pieces_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert gpu_suite.main([str(tmp_path), "--tiny", "--budget", "-1"]) == 0
    assert "left for the next run: ops, paths" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())
    with pytest.raises(SystemExit):
        gpu_suite.main([str(tmp_path), "--tiny", "--only", "nothing"])
