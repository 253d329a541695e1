"""`rlhf-fast bench`: what it runs, keeps, compares and draws."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import command, compare, figures, page, registry
from bench.figures import Figure
from rlhf_fast import cli
from tests.report.pages import Page

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results"
FACTS = {"commit": "abc", "cpu": "a <processor>", "threads": 2, "torch": "2", "time": "now"}


def kernel_row(median: float, low: float, high: float, **more: Any) -> dict[str, Any]:
    return {
        "case": "[4, 8] fp32",
        "contender": "ours",
        "ours": True,
        "median_ms": median,
        "p20_ms": low,
        "p80_ms": high,
        "repeats": 5,
    } | more


def report(*rows: dict[str, Any], **facts: Any) -> dict[str, Any]:
    return {"environment": FACTS | facts, "rows": list(rows)}


def write(path: Path, content: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


# ---- comparison ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "after", "more_is_better", "drift", "verdict"),
    [
        ((10, 9, 11), (5, 4, 6), False, 0.0, compare.BETTER),
        ((5, 4, 6), (10, 9, 11), False, 0.0, compare.WORSE),
        ((5, 4, 6), (10, 9, 11), True, 0.0, compare.BETTER),
        ((10, 9, 11), (5, 4, 6), True, 0.0, compare.WORSE),
        ((10, 8, 12), (9, 7, 11), False, 0.0, compare.SAME),  # ranges overlap
        ((10, 9.9, 10.1), (9, 8.9, 9.1), False, 0.05, compare.BETTER),
        ((10, 9.9, 10.1), (9, 8.9, 9.1), False, 0.25, compare.SAME),  # as the machine drifted
        ((10, 9.9, 10.1), (11, 10.9, 11.1), False, 0.25, compare.SAME),
        ((10, None, None), (5, 4, 6), False, 0.0, compare.UNKNOWN),
        ((10, None, None), (10, None, None), False, 0.0, compare.SAME),
    ],
)
def test_a_change_counts_beyond_both_spreads_and_the_drift(
    before: Any, after: Any, more_is_better: bool, drift: float, verdict: str
) -> None:
    def of(values: Any) -> Figure:
        value, low, high = values
        return Figure("c", "time", value, "ms", low, high, more_is_better=more_is_better)

    assert compare.judge(of(before), of(after), drift) == verdict


def test_two_files_are_compared_whatever_their_names(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    peer = kernel_row(7.0, 6.9, 7.1, contender="peer", ours=False)
    gone = kernel_row(1.0, 1.0, 1.0, case="another")
    old = write(tmp_path / "a.json", report(kernel_row(10.0, 9.0, 11.0), peer, gone, threads=1))
    new = write(tmp_path / "b.json", report(kernel_row(4.0, 3.9, 4.1), peer))
    assert cli.main(["bench", "--compare", str(old), str(new)]) == 0
    out = capsys.readouterr().out
    (line,) = [line for line in out.splitlines() if "time [ms]" in line]
    assert line.startswith("b: [4, 8] fp32, ours")
    assert "-60.0%" in line
    assert line.endswith("better")
    assert "threads: 1 | 2" in out
    assert f"b: another, ours: only in {old}" in out
    assert "ours: 1 better, 0 WORSE" in out
    assert "peer" not in out.replace("a peer", "")


def test_the_drift_of_the_machine_is_that_of_its_calibrations() -> None:
    calm = report(calibration_before={"read_gb_per_s": 10.0}, calibration_after={})
    fast = report(calibration_before={"read_gb_per_s": 12.0, "sm_mhz": 9.0})
    assert compare.drift(calm, calm) == 0.0
    assert compare.drift(calm, fast) == pytest.approx(0.2)


def test_folders_are_compared_bench_by_bench(tmp_path: Path) -> None:
    for name, median in (("a", 10.0), ("b", 11.0)):
        write(tmp_path / name / "gae.json", report(kernel_row(median, median, median + 0.5)))
        write(tmp_path / name / "summary.json", {"preset": "tiny"})
    write(tmp_path / "a" / "gone.json", report())
    found = compare.compare(tmp_path / "a", tmp_path / "b")
    assert [(c.bench, c.verdict) for c in found.changes] == [("gae", compare.WORSE)]
    assert found.only == [f"gone: only in {tmp_path / 'a'}"]


@pytest.mark.parametrize("text", ["{", "[]", '{"rows": []}'])
def test_what_is_no_report_is_said(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.json").write_text(text, encoding="utf-8")
    assert cli.main(["bench", "--compare", str(tmp_path / "a.json"), str(tmp_path)]) == 2
    assert "RF1071" in capsys.readouterr().err


# ---- figures and page ---------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda p: p.stem)
def test_every_committed_result_is_understood(path: Path) -> None:
    found = figures.figures_of(figures.read_report(path))
    assert any(figure.ours for figure in found)
    keys = [figure.key for figure in found]
    assert len(keys) == len(set(keys)), "two figures of one name could not be compared"


def test_a_single_sample_has_no_spread() -> None:
    (figure,) = figures.figures_of(report(kernel_row(1.0, 1.0, 1.0, repeats=1)))
    assert (figure.low, figure.high) == (None, None)


def test_rounds_of_generation_become_rates_with_their_spread() -> None:
    row = {
        "shape": "small", "batch": 4, "lengths": "uniform", "tokens": 100,
        "tokens_per_second": {"engine": 50.0, "generate": 10.0},
        "seconds": {"engine": [1.0, 2.0, 4.0], "generate": [10.0]},
        "times_faster": {"generate": 5.0}, "roofline": 0.5,
    }  # fmt: skip
    ours, peer = figures.figures_of(report(row))
    assert (ours.low, ours.value, ours.high) == (25.0, 50.0, 100.0)
    assert ours.more_is_better
    assert "5.0x generate" in ours.note
    assert not peer.ours
    assert peer.low is None


TRAINERS = {
    "environment": FACTS,
    "cases": [
        {
            "case": {"lengths": "fixed"},
            "gate": {"ours": []},
            "rows": {
                side: {
                    "seconds": {"generate": 0.25 * slow, "update": 0.75 * slow, "step": slow},
                    "p20": 0.9 * slow,
                    "p80": 1.2 * slow,
                    "tokens_per_second": 100.0,
                    "extra_mib": {"generate": 5.0, "step": 40.0},
                }
                for side, slow in (("ours", 1.0), ("trl", 3.0))
            },
        }
    ],
}


def test_steps_of_trainers_have_figures_a_gate_and_pictures(tmp_path: Path) -> None:
    steps = [f for f in figures.figures_of(TRAINERS) if f.what == "seconds: step"]
    assert [(f.case, f.value, f.high, f.ours) for f in steps] == [
        ("fixed lengths, ours", 1.0, 1.2, True),
        ("fixed lengths, trl", 3.0, pytest.approx(3.6), False),
    ]
    assert not command.gate_failed(TRAINERS)
    wrong = json.loads(json.dumps(TRAINERS))
    wrong["cases"][0]["gate"]["ours"] = ["kl differs by 3"]
    assert command.gate_failed(wrong)
    out = page.build_page({"step": TRAINERS}, [], FACTS, "cpu", tmp_path / "report.html")
    shown = Page(out.read_text(encoding="utf-8")).text
    assert "update: 2.2 s" in shown
    assert "fixed lengths: peak beyond the models" in shown


SLOTS = (("actor", "weights", 2), ("actor", "moments", 3), ("critic", "weights", 1))


def test_modes_of_memory_have_figures_and_a_picture(tmp_path: Path) -> None:
    rows = [
        {"phase": "update", "role": role, "part": part, "predicted": 2 << 20, "held": size << 20}
        for role, part, size in (
            ("actor", "weights", 2),
            ("actor", "moments", 3),
            ("critic", "weights", 1),
        )
    ]
    peaks = {"resident_peak": {"update": 9 << 20}, "predicted_peak": {"update": 8 << 20}}
    found = {"environment": FACTS, "modes": [{"mode": "naive", "rows": rows, **peaks}]}
    all_roles, peak = figures.figures_of(found)
    assert (all_roles.value, all_roles.note) == (6.0, "predicted 6 MiB")
    assert (peak.value, peak.note) == (9.0, "predicted 8 MiB")
    out = page.build_page({"memory": found}, [], FACTS, "cpu", tmp_path / "report.html")
    assert "actor: 5 MiB" in Page(out.read_text(encoding="utf-8")).text


def test_figures_that_a_report_brings_itself_are_taken() -> None:
    own = {"case": "c", "what": "seconds", "value": 1.5, "unit": "s"}
    (figure,) = figures.figures_of({"environment": {}, "figures": [own]})
    assert figure == Figure("c", "seconds", 1.5, "s")


# ---- the run ------------------------------------------------------------------------------------

SCRIPT = """
import json, sys, time
print("working on it", flush=True)
row = {row}
with open(sys.argv[sys.argv.index("--json") + 1], "w") as file:
    json.dump({{"environment": {{"arguments": sys.argv[1:]}}, "rows": [row]}}, file)
"""


@pytest.fixture
def benches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package of benches: one good, one wrong, one that breaks, one that hangs, one absent."""
    folder = tmp_path / "work" / "fakes"
    folder.mkdir(parents=True)
    scripts = {
        "": "",
        "good": SCRIPT.format(row=kernel_row(0.25, 0.2, 0.3)),
        "wrong": SCRIPT.format(row=kernel_row(1, 1, 1) | {"median_ms": None}) + "sys.exit(1)",
        "broken": "raise RuntimeError('no such op')",
        "hanging": "import time; time.sleep(60)",
    }
    for name, text in scripts.items():
        (folder / f"{name or '__init__'}.py").write_text(text, encoding="utf-8")
    arguments = {"tiny": ("--small",)}
    found = [
        registry.Bench(name, "kernels", name, arguments, limit=20)
        for name in ("good", "wrong", "broken", "absent")
    ]
    found.append(registry.Bench("hanging", "step", "hanging", arguments, limit=1))
    found.append(registry.Bench("elsewhere", "step", "good", {"h200": ()}))
    monkeypatch.setattr(registry, "BENCHES", tuple(found))
    monkeypatch.setattr(registry, "HERE", folder)
    monkeypatch.setattr(command, "__package__", "fakes")
    monkeypatch.setattr(command.limited, "ROOT", tmp_path / "work")
    return tmp_path / "out"


def test_nothing_that_fails_or_hangs_takes_the_rest_along(
    benches: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["bench", "--preset", "tiny", "--threads", "1", "--out", str(benches)]
    assert cli.main(arguments) == 1
    out = capsys.readouterr().out
    table = {
        line.split()[0]: line for line in out.partition("==== summary")[2].splitlines() if line
    }
    assert table["good"].endswith(" ok")
    assert table["wrong"].endswith("ERROR GATE")
    assert "failed, exit code 1" in table["broken"]
    assert "stopped after 1 s" in table["hanging"]
    assert table["absent"].endswith("not in this version")
    assert table["elsewhere"].endswith("no part in tiny")
    assert "0.25 ms" in table["good:"]
    assert "a result of ours is WRONG" in out
    assert "no such op" in (benches / "logs" / "broken.log").read_text()
    kept = json.loads((benches / "good.json").read_text())
    assert kept["environment"]["arguments"][:3] == ["--small", "--threads", "1"]
    summary = json.loads((benches / "summary.json").read_text())
    assert [one["name"] for one in summary["benches"]] == [b.name for b in registry.BENCHES]
    assert summary["machine"]["torch"] == torch.__version__
    assert "good" in Page((benches / "report.html").read_text()).text


def test_what_was_measured_before_an_interrupt_is_kept_and_shown(
    benches: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    inner = command._run_one

    def interrupted(bench: registry.Bench, *rest: Any) -> command.Ended:
        if bench.name == "broken":
            raise KeyboardInterrupt
        return inner(bench, *rest)

    monkeypatch.setattr(command, "_run_one", interrupted)
    assert cli.main(["bench", "kernels", "--preset", "tiny", "--out", str(benches)]) == 130
    out = capsys.readouterr().out
    assert "good                kernels" in out
    assert "2 of 4 benches did not run" in out
    assert (benches / "report.html").exists()


def test_a_group_and_names_choose_and_a_good_run_is_exit_code_0(benches: Path) -> None:
    chosen = ["bench", "kernels", "--preset", "tiny", "--out", str(benches), "--only", "good"]
    assert cli.main(chosen) == 0
    assert {path.name for path in benches.glob("*.json")} == {"good.json", "summary.json"}


def test_what_went_well_is_kept_and_the_rest_is_run_again(
    benches: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = ["bench", "kernels", "--preset", "tiny", "--out", str(benches), "--only"]
    assert cli.main([*chosen, "good", "broken"]) == 1
    shutil.copyfile(registry.HERE / "good.py", registry.HERE / "broken.py")
    (registry.HERE / "good.py").write_text("raise RuntimeError('run again')", encoding="utf-8")
    capsys.readouterr()
    assert cli.main([*chosen, "good", "broken", "--resume"]) == 0
    out = capsys.readouterr().out
    assert "good: kept" in out
    assert "good: [4, 8] fp32, ours" in out  # its figures stand in the table
    assert "broken: ok" in out
    assert cli.main([*chosen, "good", "--resume", "--threads", "1"]) == 1, "other arguments"


def test_the_interpreter_of_trl_goes_to_the_benches_that_take_it(
    benches: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    taking = tuple(replace(bench, trl=True) for bench in registry.BENCHES)
    monkeypatch.setattr(registry, "BENCHES", taking)
    chosen = ["bench", "kernels", "--preset", "tiny", "--out", str(benches), "--only", "good"]
    assert cli.main([*chosen, "--trl-python", sys.executable]) == 0
    kept = json.loads((benches / "good.json").read_text())
    assert kept["environment"]["arguments"][1:3] == ["--trl-python", sys.executable]
    assert cli.main([*chosen, "--trl-python", "no/such/python"]) == 2
    assert "RF1072: no program no/such/python" in capsys.readouterr().err


def test_a_name_of_another_group_is_refused(
    benches: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = ["bench", "kernels", "--preset", "tiny", "--out", str(benches), "--only", "hanging"]
    assert cli.main(chosen) == 2
    message = capsys.readouterr().err
    assert "RF1070: no bench hanging in kernels" in message
    assert "good, wrong, broken, absent" in message


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_preset_for_a_gpu_says_that_there_is_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["bench", "--preset", "h200", "--out", str(tmp_path)]) == 3
    assert "RF7030" in capsys.readouterr().err


def test_a_place_that_cannot_be_written_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert cli.main(["bench", "--preset", "tiny", "--out", str(tmp_path / "file" / "x")]) == 3
    assert "RF7901" in capsys.readouterr().err


def test_benches_of_another_place_are_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Somebody else's package `bench`, or the checkout of another version."""
    monkeypatch.setattr(cli.rlhf_fast, "__file__", str(tmp_path / "rlhf_fast" / "__init__.py"))
    assert cli.main(["bench", "--preset", "tiny", "--out", str(tmp_path)]) == 3
    message = capsys.readouterr().err
    assert "RF7032" in message
    assert str(tmp_path) in message


def test_a_checkout_has_them_wherever_it_is_called_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from rlhf_fast.cli import _bench_command as c; print(c())"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(elsewhere(tmp_path))},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert str(ROOT / "bench" / "command.py") in done.stdout


def elsewhere(folder: Path) -> Path:
    """A folder of links to the two packages, as an installation in place makes them."""
    for path in (ROOT / "rlhf_fast", ROOT / "kernels" / "rlhf_fast_kernels"):
        (folder / path.name).symlink_to(path)
    return folder


def test_an_installation_has_them_under_their_own_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(
        ROOT / "bench", tmp_path / "rlhf_fast_bench", ignore=shutil.ignore_patterns("*.json")
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(cli.rlhf_fast, "__file__", str(tmp_path / "rlhf_fast" / "__init__.py"))
    before = set(sys.modules)
    try:
        assert cli._bench_command().__name__ == "rlhf_fast_bench.command"
        for path in sorted((tmp_path / "rlhf_fast_bench").rglob("*.py")):
            parts = path.relative_to(tmp_path).with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            importlib.import_module(name)
    finally:
        for name in set(sys.modules) - before:
            if name.startswith("rlhf_fast_bench"):
                del sys.modules[name]
