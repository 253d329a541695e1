"""The page of a run of benches: what it draws of which rows."""

from __future__ import annotations

from pathlib import Path

from bench import figures, page
from tests.bench.test_command import FACTS, RESULTS, kernel_row, report
from tests.report.pages import Page


def test_the_page_draws_all_committed_results_and_loads_nothing(tmp_path: Path) -> None:
    reports = {path.stem: figures.read_report(path) for path in RESULTS.glob("*.json")}
    reports["growth"] = report(
        {
            "subject": "op", "axis": "rows", "sizes": [1, 2, 4], "time_order": 1.0,
            "milliseconds": [[1.0], [2.0], [4.0]], "expected_time": 1.0, "bytes": [None] * 3,
        }
    )  # fmt: skip
    memory = {"load": {"actor": 3 << 20}, "update": {"actor": 9 << 20, "critic": 1 << 20}}
    split = {"generate": 1.0, "update": 2.0, "step": 3.0}
    reports["steps"] = report({"case": "1b", "phases": split, "memory": memory})
    statuses = [(name, "kernels", "ok", 1.0) for name in reports] + [("x", "step", "<b>", 0.0)]
    out = page.build_page(reports, statuses, FACTS, "cpu", tmp_path / "report.html")
    shown = Page(out.read_text(encoding="utf-8"))
    for heading in (
        *("roofline", "share of the machine", "Generation by batch", "where the time goes"),
        *(
            "Reward against time",
            "Memory by phase and role",
            "Ranks",
            "Growth",
            "Figures",
            "Machine",
        ),
    ):
        assert heading in shown.text, heading
    assert "a <processor>" in shown.text
    assert "actor: 9 MiB" in shown.text
    assert "generate: 1.0 s" in shown.text
    assert "<b>" in shown.cells


def test_a_page_of_nothing_is_a_page(tmp_path: Path) -> None:
    out = page.build_page(
        {}, [("x", "step", "failed", 0.0)], FACTS, "cpu", tmp_path / "report.html"
    )
    assert "failed" in Page(out.read_text(encoding="utf-8")).text


def test_bars_name_what_binds_an_op_and_who_of_ours_it_was(tmp_path: Path) -> None:
    rows = [
        kernel_row(1, 1, 1, contender=name, of_matmul=None, of_bandwidth=0.1, tflops=rate, gain=2.0)
        for name, rate in (("cpu", 0.06), ("in place", 0.01))
    ]
    rates = {"read_gb_per_s": 20.0, "matmul_fp32_tflop_per_s": 0.2}
    found = report(*rows, calibration_before=rates, calibration_after=rates)
    alone = report(kernel_row(1, 1, 1, of_matmul=0.9, of_bandwidth=0.1, tflops=1.0))
    out = page.build_page({"op": found, "one": alone}, [], FACTS, "cpu", tmp_path / "report.html")
    shown = Page(out.read_text(encoding="utf-8")).text
    assert "[4, 8] fp32: cpu" in shown
    assert "30% of matmul, 2.0x" in shown
    assert "[4, 8] fp32: in place" in shown
    assert "10% of bandwidth, 2.0x" in shown
    assert "90% of matmul" in shown
