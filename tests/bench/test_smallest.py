"""The smallest preset of every bench runs, so that none rots; commands that pages name exist."""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import command
from bench.figures import figures_of
from bench.kernels import harness, kv_pages_calls, probes
from bench.registry import BENCHES, GROUPS, PRESETS, Bench, chosen
from rlhf_fast import cli

ROOT = Path(__file__).resolve().parents[2]
PRESENT = [bench for bench in BENCHES if bench.present]
# The first is in test_distributed.py, the second below, the others in test_ppo.py.
ELSEWHERE = {"distributed_step", "vocab_parallel", "step", "memory", "learning"}
HERE = [
    pytest.param(bench, id=bench.name, marks=[pytest.mark.slow] * (bench.name == "complexity"))
    for bench in PRESENT
    if bench.name not in ELSEWHERE
]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


class SmallProbe:
    """In the place of a read of 384 MiB: no figure of this preset means anything."""

    name = "of read"
    device = torch.device("cpu")
    bytes = 4 << 20

    def __init__(self) -> None:
        self.x = torch.ones(1 << 20)

    def run(self, k: int) -> Any:
        return self.x.sum()

    def gb_per_s(self, repeats: int = 9) -> float:
        return 1.0


@pytest.fixture
def small_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in PRESETS["tiny"].environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(harness, "bandwidth_probe", lambda device: SmallProbe())
    monkeypatch.setattr(probes, "CPU_PRODUCT", (32, 32, 32))


@pytest.mark.usefixtures("small_machine")
@pytest.mark.parametrize("bench", HERE)
def test_the_smallest_preset_runs_and_its_report_has_figures(bench: Bench, tmp_path: Path) -> None:
    module = importlib.import_module(f"bench.{bench.module}")
    path = tmp_path / "report.json"
    arguments = [*bench.arguments["tiny"], "--json", str(path)]
    threads = torch.get_num_threads()
    try:
        assert module.main([*arguments, "--threads", "1"] if bench.threads else arguments) == 0
    finally:
        torch.set_num_threads(threads)
    report = json.loads(path.read_text(encoding="utf-8"))
    assert report["environment"]["torch"] == torch.__version__
    assert any(figure.ours for figure in figures_of(report))


@pytest.mark.slow
def test_the_smallest_preset_of_what_torchrun_starts(tmp_path: Path) -> None:
    assert command.run("distributed", "tiny", tmp_path, names=["vocab_parallel"]) == 0
    text = (tmp_path / "vocab_parallel.json").read_text(encoding="utf-8")
    found = figures_of(json.loads(text))
    assert any(figure.ours for figure in found)


def test_calls_of_the_page_allocator_are_timed(capsys: pytest.CaptureFixture[str]) -> None:
    assert not kv_pages_calls.main(["--sequences", "4", "--calls", "20"])
    assert capsys.readouterr().out


@pytest.mark.parametrize("bench", PRESENT, ids=lambda b: b.name)
def test_every_preset_gives_arguments_that_the_bench_has(bench: Bench) -> None:
    text = (ROOT / "bench" / Path(*bench.module.split("."))).with_suffix(".py").read_text()
    text += (ROOT / "bench/kernels/harness.py").read_text() if "harness.parser" in text else ""
    known = set(re.findall(r'add_argument\(\s*"(--[\w-]+)"', text))
    assert "--json" in known
    assert not bench.threads or "--threads" in known
    for preset, arguments in bench.arguments.items():
        assert preset in PRESETS
        assert {word for word in arguments if word.startswith("--")} <= known, preset


def test_every_script_has_its_place() -> None:
    scripts = (ROOT / "bench").rglob("bench_*.py")
    modules = {".".join(path.relative_to(ROOT / "bench").with_suffix("").parts) for path in scripts}
    # These run where the other trainers are installed: `make test-integrations`.
    with_peers = {module for module in modules if module.startswith("integrations.")}
    assert {bench.module for bench in PRESENT} == modules - with_peers
    assert len({bench.name for bench in BENCHES}) == len(BENCHES)
    assert {bench.group for bench in BENCHES} == set(GROUPS)
    assert chosen("all") == list(BENCHES)


def test_folders_with_scripts_are_packages_or_the_wheel_would_not_have_them() -> None:
    folders = {path.parent for path in (ROOT / "bench").rglob("*.py")}
    assert [folder for folder in folders if not (folder / "__init__.py").exists()] == []


def test_the_command_line_offers_what_there_is() -> None:
    assert (*GROUPS, "all") == cli.BENCH_GROUPS
    assert tuple(PRESETS) == cli.BENCH_PRESETS


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_commands_that_a_page_names_exist(page: Path) -> None:
    """Every figure of a page stands beside its command."""
    text = page.read_text(encoding="utf-8").replace("`\n`", " ")
    for module in re.findall(r"-m\s+((?:bench|tests)\.[\w.]+\w)", text):
        assert importlib.util.find_spec(module) is not None, module
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for target in re.findall(r"`make ([a-z]+)[ `]", text):
        assert target in targets, target
    for group in re.findall(r"rlhf-fast bench ([a-z]+)", text):
        assert group in cli.BENCH_GROUPS, group
