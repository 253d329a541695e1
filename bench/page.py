"""The page of a run of benches: one HTML file that holds its pictures and loads nothing."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from rlhf_fast.report import html
from rlhf_fast.report.plots import (
    Axis,
    Bar,
    Part,
    Series,
    bars_figure,
    line_chart,
    number_text,
    seconds_text,
    stacked_chart,
)

from .figures import Json, figures_of

Reports = Mapping[str, Json]
Status = tuple[str, str, str, float]
# Of the environment: what stands at the top of the page.
MACHINE = ("gpu", "driver", "cuda", "cpu", "cpu_mhz", "cores", "threads", "core_module", "system")
VERSIONS = ("commit", "version", "python", "torch", "triton", "transformers")
MIB = 1 << 20


def build_page(
    reports: Reports, statuses: Sequence[Status], facts: Json, preset: str, out: Path
) -> Path:
    """Write the page and return its path.

    Args:
        reports: by bench, those that measured anything.
        statuses: (bench, group, how it ended, seconds), of all.
        facts: of the machine, `kernels.environment.environment`.
        preset: what was asked for.
        out: path of the HTML file.

    Raises:
        EnvironmentFault: RF7901, `out` cannot be written.
    """
    modified = " (modified)" if facts.get("modified") else ""
    title = f"Benchmarks: {facts.get('gpu') or facts.get('cpu') or 'unknown machine'}"
    subtitle = (
        f"commit {facts.get('commit') or 'unknown'}{modified}, {facts.get('time', '')}, preset "
        f"{preset}; medians, with the 20th to 80th percentile of the samples"
    )
    text = html.page(
        title,
        subtitle,
        html.section("How the benches ended", _statuses(statuses)),
        html.section("Ops: roofline", html.charts(_roofline(reports))),
        html.section("Ops: share of the machine's limit", html.charts(_limits(reports))),
        html.section("Generation by batch", html.charts(_generation(reports))),
        html.section("A PPO step: where the time goes", html.charts(_steps(reports))),
        html.section("Memory by phase and role", html.charts(_memory(reports))),
        html.section("Reward against time", html.charts(_learning(reports))),
        html.section("Ranks", html.charts(_ranks(reports))),
        html.section("Growth", html.charts(_growth(reports), small=True)),
        html.section("Figures", *_tables(reports)),
        html.section("Machine", _machine(facts, reports)),
    )
    return html.write_page(out, text)


def _statuses(statuses: Sequence[Status]) -> str:
    rows = [(name, group, status, seconds_text(s)) for name, group, status, s in statuses]
    return html.table(("bench", "group", "status", "took"), rows, ("code", "", "", "number"))


def _rows(reports: Reports, *keys: str) -> Iterator[Json]:
    """Rows of any report that have all of these keys."""
    for report in reports.values():
        yield from (row for row in report.get("rows", []) if set(keys) <= row.keys())


# ---- ops ----------------------------------------------------------------------------------------


def _roofline(reports: Reports) -> list[str]:
    """FLOPs a byte against FLOP/s: of ours where both are known, under what the probes reached."""
    points: dict[str, list[tuple[float, float, str]]] = {}
    best: list[tuple[float, float]] = []
    for name, report in reports.items():
        for row in report.get("rows", []):
            rate, bandwidth = row.get("tflops"), row.get("gb_per_s")
            if not (row.get("ours") and rate and bandwidth):
                continue
            points.setdefault(name, []).append((1e3 * rate / bandwidth, rate, row["case"]))
        best += list(_rates(report))
    if not points or not best:
        return []
    bandwidth, rate = (statistics.median(values) for values in zip(*best, strict=True))
    ridge = 1e3 * rate / bandwidth
    low = min(ridge, *(x for group in points.values() for x, _, _ in group)) / 2
    high = max(ridge, *(x for group in points.values() for x, _, _ in group)) * 2
    roof = [(low, low * bandwidth / 1e3), (ridge, rate), (high, rate)]
    series = [Series("measured bandwidth and fp32 matmul", roof, 6, dashed=True)]
    for index, (name, group) in enumerate(points.items()):
        for number, (x, y, case) in enumerate(group):
            legend = name if number == 0 else ""
            series.append(Series(legend, [(x, y)], index % 5 + 1, markers=True, labels=[case]))
    return [
        line_chart(
            "Roofline: what the op must compute over what it must move",
            series,
            Axis("FLOPs a byte", log=True),
            Axis("TFLOP/s", log=True),
        )
    ]


def _rates(report: Json) -> Iterator[tuple[float, float]]:
    """GB/s and TFLOP/s of a report's calibrations."""
    for when in ("calibration_before", "calibration_after"):
        found = report["environment"].get(when) or {}
        bandwidth = found.get("read_gb_per_s") or found.get("copy_gb_per_s")
        rate = found.get("matmul_fp32_tflop_per_s") or found.get("matmul_bf16_tflop_per_s")
        if bandwidth and rate:
            yield bandwidth, rate


def _limits(reports: Reports) -> list[str]:
    """One chart an op: part of the matrix products' or the memory's rate, whichever binds it."""
    figures = []
    for name, report in reports.items():
        rows = [row for row in report.get("rows", []) if row.get("ours")]
        cases = [row["case"] for row in rows]
        bars: list[Bar] = []
        for row in rows:
            products, traffic = _share_of_products(row, report), row.get("of_bandwidth") or 0.0
            part = max(products, traffic)
            if part > 0.0:
                bound = products >= traffic
                behind = f"{part:.0%} of {'matmul' if bound else 'bandwidth'}"
                if row.get("gain"):
                    behind += f", {row['gain']:.1f}x"
                alone = cases.count(row["case"]) == 1
                label = row["case"] if alone else f"{row['case']}: {row['contender']}"
                bars.append((label, [Part(label, part, 1 if bound else 3)], behind))
        if bars:
            figures.append(bars_figure(f"{name}: share of the limit, gain on the best peer", bars))
    return figures


def _share_of_products(row: Json, report: Json) -> float:
    """Of the rate of matrix products beside the row or, without a probe there, before and after."""
    if row.get("of_matmul"):
        return float(row["of_matmul"])
    rates = [rate for _, rate in _rates(report)]
    return (row.get("tflops") or 0.0) / statistics.median(rates) if rates else 0.0


# ---- generation, steps, memory, ranks -----------------------------------------------------------


def _generation(reports: Reports) -> list[str]:
    """Tokens per second by batch, a chart for each model and kind of lengths."""
    lines: dict[str, dict[str, dict[int, float]]] = {}
    for row in _rows(reports, "tokens_per_second", "shape", "batch", "lengths"):
        sides = lines.setdefault(f"{row['shape']}, {row['lengths']} lengths", {})
        for side, rate in row["tokens_per_second"].items():
            sides.setdefault(side, {})[row["batch"]] = rate
    return [
        line_chart(
            f"{title}: tokens per second by batch",
            [
                Series(side, sorted(points.items()), index % 6 + 1, markers=True)
                for index, (side, points) in enumerate(sides.items())
            ],
            Axis("rows", log=True),
            Axis("tokens/s", log=True),
        )
        for title, sides in lines.items()
    ]


def _steps(reports: Reports) -> list[str]:
    """Seconds by phase of every report that has them."""
    figures = []
    for name, report in reports.items():
        bars = []
        for row in report.get("rows", []):
            split = row.get("phases") or row.get("seconds")
            if isinstance(split, dict) and all(isinstance(v, int | float) for v in split.values()):
                bars.append((_label(row), {k: v for k, v in split.items() if k != "step"}))
        for case in report.get("cases", []):
            for side, row in case["rows"].items():
                split = {k: v for k, v in row["seconds"].items() if k != "step"}
                bars.append((f"{case['case']['lengths']}, {side}", split))
        if bars:
            figures.append(stacked_chart(f"{name}: seconds by phase", bars, seconds_text))
    return figures


def _label(row: Json) -> str:
    """What tells a row from the others of its report."""
    keys = ("side", "contender", "mode", "case", "ranks", "view", "lengths")
    return ", ".join(str(row[key]) for key in keys if key in row)


def _memory(reports: Reports) -> list[str]:
    """Bytes by role, a bar a phase, of rows with `memory`: phase -> role -> bytes."""
    figures = []
    for name, report in reports.items():
        for row in report.get("rows", []):
            if isinstance(row.get("memory"), dict):
                bars = list(row["memory"].items())
                title = f"{name}, {_label(row)}: bytes held by role"
                figures.append(stacked_chart(title, bars, bytes_text))
        for case in report.get("cases", []):
            figures.append(_extra(name, case))
        for mode in report.get("modes", []):
            phases: dict[str, dict[str, float]] = {}
            for row in mode["rows"]:
                roles = phases.setdefault(row["phase"], {})
                roles[row["role"]] = roles.get(row["role"], 0) + row["held"]
            title = f"{name}, {mode['mode']}: bytes held by role"
            figures.append(stacked_chart(title, list(phases.items()), bytes_text))
    return figures


def _extra(name: str, case: Json) -> str:
    """Peak beyond the models in each phase, a bar for each side."""
    sides = list(case["rows"])
    bars: list[Bar] = [
        (f"{side}: {phase}", [Part(phase, size, index % 6 + 1)], bytes_text(size * MIB))
        for index, side in enumerate(sides)
        for phase, size in case["rows"][side]["extra_mib"].items()
        if size > 0.0
    ]
    return bars_figure(f"{name}, {case['case']['lengths']} lengths: peak beyond the models", bars)


def bytes_text(size: float) -> str:
    """`3.2 GiB`, `140 MiB`."""
    return f"{size / 2**30:.3g} GiB" if size >= 2**30 else f"{size / MIB:.3g} MiB"


def _learning(reports: Reports) -> list[str]:
    """A chart an algorithm: rewards of the batches of each side, means over the seeds."""
    return [
        line_chart(
            f"{found['algorithm']}: mean reward of a batch over {len(runs)} seeds",
            [
                Series(side, _mean_curve(found["runs"][side]), index % 6 + 1)
                for index, side in enumerate(found["rows"])
            ],
            Axis("seconds of training"),
            Axis("reward"),
        )
        for report in reports.values()
        for found in report.get("algorithms", [])
        for runs in [next(iter(found["runs"].values()))]
    ]


def _mean_curve(runs: Sequence[Json]) -> list[tuple[float, float]]:
    """Seconds and reward of the batches of the same number, means over the runs."""
    batches = zip(*(run["points"] for run in runs), strict=True)
    return [
        (statistics.mean(p[0] for p in batch), statistics.mean(p[2] for p in batch))
        for batch in batches
    ]


def _ranks(reports: Reports) -> list[str]:
    """Step, bytes received and parameters held by number of ranks, a line for each view."""
    kinds = {
        "seconds a step": lambda row: row["seconds"]["step"],
        "MiB received a step, of the rank that receives most": lambda row: (
            sum(row["received"].values()) / MIB
        ),
        "MiB of parameters held by a rank": lambda row: row["parameter_bytes"] / MIB,
    }
    rows = list(_rows(reports, "ranks", "view", "received", "parameter_bytes"))
    alone = [row for row in rows if row["ranks"] == 1]
    views = dict.fromkeys(row["view"] for row in rows if row["ranks"] > 1)
    figures = []
    for title, value in kinds.items():
        series = [
            Series(
                view,
                [(r["ranks"], value(r)) for r in (*alone, *rows) if r["view"] in (view, "alone")],
                index % 6 + 1,
                markers=True,
            )
            for index, view in enumerate(views)
        ]
        if series:
            figures.append(line_chart(title, series, Axis("ranks"), Axis(title.split(",")[0])))
    return figures


# ---- growth -------------------------------------------------------------------------------------


def _growth(reports: Reports) -> list[str]:
    """Time by size, and the order that was expected, through the last point."""
    figures = []
    for row in _rows(reports, "subject", "axis", "sizes", "milliseconds"):
        points = [
            (size, statistics.median(samples))
            for size, samples in zip(row["sizes"], row["milliseconds"], strict=True)
        ]
        last_size, last = points[-1]
        expected = [(size, last * (size / last_size) ** row["expected_time"]) for size, _ in points]
        figures.append(
            line_chart(
                f"{row['subject']} by {row['axis']}: order {row['time_order']:.2f}",
                [
                    Series("measured", points, 1, markers=True),
                    Series(f"order {row['expected_time']:g}", expected, 6, dashed=True),
                ],
                Axis(row["axis"], log=True),
                Axis("ms", log=True),
                small=True,
            )
        )
    return figures


# ---- tables -------------------------------------------------------------------------------------


def _tables(reports: Reports) -> list[str]:
    tables = []
    for name, report in reports.items():
        rows = [
            (
                figure.case,
                figure.what,
                f"{number_text(figure.value)} {figure.unit}",
                "" if figure.low is None else number_text(figure.low),
                "" if figure.high is None else number_text(figure.high),
                figure.note,
            )
            for figure in figures_of(report)
            if math.isfinite(figure.value)
        ]
        header = ("case", "what", "median", "p20", "p80", "beside")
        body = html.table(header, rows, ("", "", "number", "number", "number", ""))
        absent = report.get("absent") or {}
        left_out = [f"{peer}: {reason}" for peer, reason in absent.items()]
        if left_out:
            body += html.paragraph("Not measured:") + html.bullets(left_out)
        tables.append(html.details(f"{name}, {len(rows)} figures", body))
    return tables


def _machine(facts: Json, reports: Reports) -> str:
    rows = [(key, facts[key]) for key in (*VERSIONS, *MACHINE) if facts.get(key) is not None]
    for name, report in reports.items():
        for when in ("calibration_before", "calibration_after"):
            found = report["environment"].get(when) or {}
            values = ", ".join(f"{key} {number_text(value)}" for key, value in found.items())
            if values:
                rows.append((f"{name}, {when.partition('_')[2]}", values))
    return html.table(("of the machine", "value"), rows, ("code", ""))
