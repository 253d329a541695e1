"""What the stages show and log of their generator."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest

from rlhf_fast.config import (
    DataConfig,
    EvalConfig,
    LoraConfig,
    RewardConfig,
    RunConfig,
    SamplingConfig,
)
from rlhf_fast.engine.hybrid import HybridEngine
from rlhf_fast.engine.progress import GenerationSummary, Progress, ProgressReports
from rlhf_fast.metrics import read_metrics
from rlhf_fast.stages import generation
from rlhf_fast.stages.evaluate import run_evaluate
from rlhf_fast.stages.generation import engine_of, generation_fields, generation_metrics
from rlhf_fast.stages.progress import ProgressBar, ProgressDisplay
from tests.ppo.synthetic import NoGenerator
from tests.stages.test_ppo import settings, tokenizer, trainer
from tests.stages.tiny_runs import demonstrations, model_directory, write_rows

__all__ = ["tokenizer"]


def test_fields_are_there_while_samples_are_missing() -> None:
    progress = Progress(3, 8, 120, running=4, waiting=1, cache_use=0.256, tokens_per_second=1234.5)
    assert generation_fields(progress) == {"tok/s": 1234, "running": 4, "waiting": 1, "kv": "26%"}
    assert generation_fields(progress._replace(finished=8)) == {}


def test_a_report_costs_nothing_before_it_is_due(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("rlhf_fast.engine.progress.time.perf_counter", lambda: now[0])
    made, seen = [], []

    def progress() -> Progress:
        made.append(now[0])
        return Progress(0, 1, 0)

    reports = ProgressReports(seen.append, 0.25)
    for _ in range(11):
        reports.give(progress, last=False)
        now[0] += 0.1
    reports.give(progress, last=True)
    assert made == pytest.approx([100.0, 100.3, 100.6, 100.9, 101.1])
    assert len(seen) == len(made)


def test_metrics_of_a_rollout(tokenizer: Any, tmp_path: Path) -> None:
    assert generation_metrics(NoGenerator()) == {}
    assert engine_of(NoGenerator()) is None
    generator = trainer(tmp_path, tokenizer).roles.generator
    engine = engine_of(generator)
    assert isinstance(engine, HybridEngine)
    assert generation_metrics(generator) == {}
    assert engine._runner is not None
    engine._runner.last = GenerationSummary(300, 2.0, 3, 0.5)
    assert generation_metrics(generator) == {
        "rollout/tokens_per_second": 150.0,
        "rollout/preemptions": 3.0,
        "rollout/peak_kv_use": 0.5,
    }
    engine._runner.last = GenerationSummary(300, 2.0)
    assert "rollout/peak_kv_use" not in generation_metrics(generator)


@pytest.fixture
def notes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, object]]]:
    """What is shown beside which bar, every report of it."""
    found: list[tuple[str, dict[str, object]]] = []
    note = ProgressBar.note

    def noted(bar: ProgressBar, **fields: object) -> None:
        found.append((bar.description, fields))
        note(bar, **fields)

    monkeypatch.setattr(ProgressBar, "note", noted)
    monkeypatch.setattr(generation, "SECONDS_BETWEEN_REPORTS", 0.0)
    return found


def check_notes(found: list[tuple[str, dict[str, object]]], bar: str) -> None:
    assert {description for description, _ in found} == {bar}
    shown = [fields for _, fields in found if fields]
    assert shown
    assert all(fields.keys() == {"tok/s", "running", "waiting", "kv"} for fields in shown)
    assert any(fields["running"] for fields in shown)
    assert found[-1][1] == {}  # nothing stands there when all samples are drawn


@pytest.mark.parametrize("lora", [False, True])
def test_a_ppo_step_shows_and_logs_how_it_generates(
    tmp_path: Path, tokenizer: Any, notes: list[Any], lora: bool
) -> None:
    more = {"lora": LoraConfig(rank=4)} if lora else {}
    trainer(tmp_path, tokenizer, settings(tmp_path, total_steps=2, **more)).train()
    check_notes(notes, "PPO")
    for row in read_metrics(tmp_path):
        assert float(row["rollout/tokens_per_second"] or 0) > 0
        assert row["rollout/preemptions"] == 0
        assert 0 < float(row["rollout/peak_kv_use"] or 0) <= 1


def test_an_evaluation_shows_how_it_generates(tmp_path: Path, notes: list[Any]) -> None:
    model_directory(tmp_path / "policy")
    rows = [{"prompt": row["prompt"]} for row in demonstrations(6)]
    (tmp_path / "judge.py").write_text(
        "def words(prompts, completions):\n    return [float(len(c)) for c in completions]\n",
        encoding="utf-8",
    )
    run_evaluate(
        EvalConfig(
            model=str(tmp_path / "policy"),
            run=RunConfig(output_dir=str(tmp_path / "out"), threads=1),
            data=DataConfig(
                eval=str(write_rows(tmp_path / "p.jsonl", rows)),
                max_prompt_length=16,
                max_length=64,
            ),
            sampling=SamplingConfig(max_new_tokens=6),
            reward=RewardConfig(function=f"{tmp_path}/judge.py:words"),
            samples_per_prompt=2,
            max_batch=4,
        ),
        quiet=True,
    )
    check_notes(notes, "evaluate")


def test_a_terminal_shows_the_note_as_a_field_of_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")
    stream = Terminal()
    display = ProgressDisplay(stream=stream)
    with display.bar("PPO", 3) as bar:
        bar.advance(1, score=0.5)
        display.note(**{"tok/s": 900, "running": 7})
    assert "score=0.5 tok/s=900 running=7" in stream.getvalue()
