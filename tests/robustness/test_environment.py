"""The machine says no: output directory, disk, device, signals from outside, a real process."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rlhf_fast.cli import main
from rlhf_fast.distributed import load, steps
from rlhf_fast.distributed.checkpoint_directory import unfinished
from tests.robustness.workshop import Workshop, digest, require_refused
from tests.stages.tiny_runs import metric_lines

REPOSITORY = Path(__file__).parents[2]
STAGES = ("sft", "rm", "ppo", "eval")


@pytest.mark.parametrize("stage", STAGES)
def test_output_directory_is_a_file(stage: str, workshop: Workshop) -> None:
    workshop.out.write_text("notes")
    require_refused(workshop.run(stage), "RF8205", 2, str(workshop.out))
    assert workshop.out.read_text() == "notes"


@pytest.mark.parametrize("stage", STAGES)
def test_output_directory_cannot_be_written(stage: str, workshop: Workshop) -> None:
    # Refused whoever asks; permissions do not stop the superuser.
    outcome = workshop.run(stage, "run.output_dir=/proc/rlhf_fast")
    require_refused(outcome, "RF7101", 3, "/proc/rlhf_fast")


@pytest.mark.parametrize("stage", ["sft", "rm", "ppo"])
def test_too_little_room_is_refused_with_both_numbers(
    stage: str, workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    little = shutil._ntuple_diskusage(100, 99, 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: little)
    require_refused(workshop.run(stage), "RF7102", 3, "MiB are free", "keep fewer checkpoints")
    assert not list(workshop.out.glob("*.json"))


def full_disk(monkeypatch: pytest.MonkeyPatch, part_of_name: str) -> None:
    """Every write to a file with this in its path fails as on a full disk."""
    original = os.write

    def write(descriptor: int, data: Any) -> int:
        if part_of_name in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(descriptor, data)

    monkeypatch.setattr(os, "write", write)


@pytest.mark.parametrize("stage", ["sft", "rm", "ppo"])
def test_a_full_disk_during_a_checkpoint(
    stage: str, workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        full_disk(patch, "step-00000002")
        outcome = workshop.run(stage)
    require_refused(outcome, "RF7101", 3, "No space left", "free some disk space")
    root = workshop.out / "checkpoints"
    assert steps(root) == [1]
    assert unfinished(root) == []
    assert load(root).step == 1
    assert workshop.run(stage).code == 0
    whole = workshop.path / "whole"
    assert workshop.run(stage, f"run.output_dir={whole}").code == 0
    assert metric_lines(workshop.out) == metric_lines(whole)
    ours, theirs = (load_file(out / "model" / "model.safetensors") for out in (workshop.out, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_full_disk_during_the_export(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr("rlhf_fast.models.export.os.fsync", _only(".model.exporting", no_room))
        outcome = workshop.run("sft")
    require_refused(outcome, "RF7201", 3, "No space left")
    assert not list(workshop.out.glob("*model*"))
    assert workshop.run("sft").code == 0


def _only(part_of_name: str, instead: Any) -> Any:
    original = os.fsync

    def fsync(descriptor: int) -> None:
        named = part_of_name in os.readlink(f"/proc/self/fd/{descriptor}")
        (instead if named else original)(descriptor)

    return fsync


@pytest.mark.parametrize("name", ["samples.jsonl", "eval.json"])
def test_a_full_disk_for_results(
    name: str, workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        full_disk(patch, name)
        outcome = workshop.run("eval")
    require_refused(outcome, "RF7101", 3, "No space left")
    assert not (workshop.out / name).exists()


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("command", [[], ["check"]])
def test_a_gpu_that_is_not_there(
    command: list[str], stage: str, workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    outcome = workshop.call(*command, stage, *workshop.arguments(stage, "run.device=cuda"))
    require_refused(outcome, "RF7030", 3, "run.device=cpu", torch.__version__)
    assert not workshop.out.exists()


def test_an_unknown_implementation_of_the_ops(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RLHF_FAST_OPS", "fortran")
    outcome = workshop.run("sft")
    require_refused(outcome, "RF7040", 3, "RLHF_FAST_OPS", "fortran", "reference")
    assert not workshop.out.exists()


def test_a_missing_logger_is_said_before_training(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    outcome = workshop.run("sft", "run.sinks=[wandb]")
    require_refused(outcome, outcome.message[:6], 3, "wandb", "pip install")
    assert not (workshop.out / "run.json").exists()


def test_report_of_a_folder_that_is_no_run(workshop: Workshop) -> None:
    before = digest(workshop.path)
    require_refused(workshop.call("report", str(workshop.path)), "RF8901", 2, str(workshop.path))
    nowhere = workshop.path / "nowhere"
    require_refused(workshop.call("report", str(nowhere)), "RF8901", 2, str(nowhere))
    assert digest(workshop.path) == before


def test_report_that_cannot_be_written(workshop: Workshop) -> None:
    assert workshop.run("sft").code == 0
    outcome = workshop.call("report", str(workshop.out), "--out", "/proc/report.html")
    require_refused(outcome, "RF7901", 3, "/proc/report.html")


def test_report_of_a_run_that_was_cut_short(workshop: Workshop) -> None:
    assert workshop.run("ppo").code == 0
    for name in ("metrics.jsonl", "samples.jsonl"):
        with (workshop.out / name).open("ab") as file:
            file.write(b'{"step": 3, "obj')
    outcome = workshop.call("report", str(workshop.out))
    assert outcome.code == 0, outcome.err
    assert (workshop.out / "report.html").stat().st_size > 1000


@pytest.mark.parametrize("words", [[], ["train"], ["sft", "--gpu"], ["check"], ["check", "dpo"]])
def test_command_lines_that_make_no_sense(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    code: Any = None
    try:
        code = main(words)
    except SystemExit as leaving:  # argparse leaves by itself
        code = leaving.code
    error = capsys.readouterr().err
    assert code == 2
    assert error.startswith("RF1006: ")
    assert "to do:" in error


def process(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "kernels")])
    return subprocess.run(
        [sys.executable, "-m", "rlhf_fast", *words],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_a_real_process_ends_with_the_exit_code_and_one_message(workshop: Workshop) -> None:
    arguments = workshop.arguments("sft", f"model={workshop.path}/nowhere")
    plain = process("sft", *arguments)
    assert plain.returncode == 2
    assert plain.stderr.startswith("RF3010: ")
    assert "Traceback" not in plain.stderr
    debug = process("sft", "--debug", *arguments)
    assert debug.returncode == 2
    assert "Traceback" in debug.stderr
    assert debug.stderr.count("\nRF3010: ") == 1


def test_a_real_process_without_a_gpu(workshop: Workshop) -> None:
    arguments = workshop.arguments("ppo", "run.device=cuda")
    found = process("check", "ppo", *arguments, CUDA_VISIBLE_DEVICES="")
    assert found.returncode == 3
    assert found.stderr.startswith("RF7030: ")


@pytest.mark.parametrize("size", ["abc", "0", "-1", "2.0"])
def test_a_number_of_ranks_that_is_none(
    size: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", size)
    assert main(["sft", "--print-config"]) == 3
    assert f"RF7055: WORLD_SIZE='{size}'" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "")  # as good as none
    assert main(["sft", "--print-config"]) == 0
