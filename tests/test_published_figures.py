"""The figures of the pages against the reports in bench/results that they are from."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
MIB = 2**20
_NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?")


@cache
def report(name: str) -> Any:
    return json.loads((ROOT / "bench" / "results" / f"{name}.json").read_text(encoding="utf-8"))


def page(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def table(name: str, header: str) -> list[list[str]]:
    """Cells of the rows of the one table of a page whose first line begins with `header`."""
    _, found, rest = page(name).partition(f"\n{header}")
    assert found, f"{name} has no table {header!r}"
    lines = rest.splitlines()[2:]
    end = next((i for i, line in enumerate(lines) if line[:1] != "|"), len(lines))
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[:end]]


def shows(text: str, value: float) -> bool:
    """Whether a number as it is printed is `value` rounded to the digits that are printed."""
    plain = text.replace(",", "")
    zeros = len(plain) - len(plain.rstrip("0")) if "." not in plain else 0
    unit = 10.0 ** (zeros - len(plain.partition(".")[2]))
    return abs(float(plain) - value) <= unit / 2 * (1 + 1e-9)


def wrong(cell: str, values: Iterable[float]) -> list[str]:
    """What a cell prints other than `values`, in their order."""
    expected, printed = list(values), _NUMBER.findall(re.sub(r"\([^)]*\)", "", cell))
    assert len(printed) == len(expected), f"{cell!r} prints {printed}, the report has {expected}"
    pairs = zip(printed, expected, strict=True)
    return [f"{text} in {cell!r} is {value:.6g}" for text, value in pairs if not shows(text, value)]


def hold(rows: Sequence[Sequence[str]], expected: Sequence[Sequence[float | None]]) -> None:
    """The last cells of each row print these numbers; None: a cell without one."""
    assert len(rows) == len(expected)
    faults = []
    for cells, values in zip(rows, expected, strict=True):
        for cell, value in zip(cells[-len(values) :], values, strict=True):
            faults += wrong(cell, [] if value is None else [value])
    assert faults == []


def test_a_printed_number_is_the_rounded_one() -> None:
    assert shows("5.5", 5.549)
    assert shows("42,727", 42727.3)
    assert shows("320", 316)
    assert not shows("5.5", 5.551)
    assert not shows("0.13", 0.114)
    assert not shows("14", 13.48)


# ---- the engine, ranks --------------------------------------------------------------------------


def test_generation() -> None:
    hold(
        table("docs/engine.md", "| Llama | batch | lengths |"),
        [
            (
                row["tokens_per_second"]["engine"],
                row["ms_per_step"],
                row["floor"]["ms_per_step"],
                row["times_faster"]["generate"],
                row["most"]["generate"],
            )
            for row in report("engine_generate_cpu")["rows"]
        ],
    )


def test_continuous_batching() -> None:
    hold(
        table("docs/engine.md", "| Llama | batch | ms a step |"),
        [
            (
                row["ms_per_step"],
                row["floor"]["ms_per_step"],
                row["times_faster"]["generate_batch"],
                row["most"]["generate_batch"],
                row["times_faster"]["continuous_batching"],
                row["most"]["continuous_batching"],
            )
            for row in report("engine_continuous_batching_cpu")["rows"]
        ],
    )


def test_a_step_on_several_ranks() -> None:
    phases = ("generate", "score", "update")
    hold(
        table("docs/distributed.md", "| ranks, view |"),
        [
            (
                row["parameter_bytes"] / MIB,
                *(row["received"][phase] / MIB for phase in phases),
                *(row["seconds"][phase] for phase in phases),
            )
            for row in report("distributed_step_cpu")["rows"]
        ],
    )


# ---- a PPO step ---------------------------------------------------------------------------------


def test_a_ppo_step_beside_trl() -> None:
    expected = []
    for case in report("ppo_step_cpu")["cases"]:
        for side in ("ours", "ours, rollout", "trl"):
            row = case["rows"][side]
            seconds = [row["seconds"][k] for k in ("step", "generate", "score", "update")]
            gc = row["seconds"].get("gc")
            expected.append((*seconds, gc, row["extra_mib"]["step"]))
    hold(table("docs/benchmarking.md", "| | step | generate |"), expected)


def test_learning_beside_trl() -> None:
    rows = table("docs/benchmarking.md", "| | reward, ours |")
    algorithms = report("ppo_learning_cpu")["algorithms"]
    assert [row[0] for row in rows] == [case["algorithm"].upper() for case in algorithms]
    for cells, case in zip(rows, algorithms, strict=True):
        ours, trl = case["rows"]["ours"], case["rows"]["trl"]
        faults = [
            *wrong(cells[1], (ours["reward"], ours["reward_interval"])),
            *wrong(cells[2], (trl["reward"], trl["reward_interval"])),
            *wrong(cells[3], [ours["seconds"]]),
            *wrong(cells[4], [trl["seconds"]]),
            *wrong(cells[5], [ours["seconds_to_worse"]]),
            *wrong(cells[6], [trl["seconds_to_worse"]]),
        ]
        assert faults == []


# ---- other trainers -----------------------------------------------------------------------------


def test_functions_of_other_trainers() -> None:
    rows = table("docs/integrations.md", "| trainer | function |")
    measured = report("integrations_functions_cpu")["rows"]
    assert [row[0] for row in rows] == [row["peer"] for row in measured]
    for cells, row in zip(rows, measured, strict=True):
        assert ("backward" in cells[1]) == ("backward" in row["name"])
        faults = [
            *wrong(cells[2], [row["theirs_ms"]]),
            *wrong(cells[3], [row["ours_ms"]]),
            *wrong(cells[4], [row["gain"]]),
            *wrong(cells[5], (row["theirs_mib"], row["ours_mib"])),
        ]
        assert faults == []


def test_steps_of_other_trainers() -> None:
    expected = []
    for name in ("integrations_update_verl_cpu", "integrations_update_openrlhf_cpu"):
        (row,) = report(name)["rows"]
        theirs, ours = row["theirs_ms"] / 1e3, row["ours_ms"] / 1e3
        expected.append((theirs, ours, row["gain"], row["theirs_mib"], row["ours_mib"]))
    runs = {(row["kind"], row["side"]): row for row in report("integrations_trl_runs_cpu")["rows"]}
    for kind in ("GRPO", "RLOO"):
        theirs = runs[kind, "theirs"]
        for side in ("logprobs", "ours"):
            ours = runs[kind, side]
            seconds = (theirs["seconds"], ours["seconds"], ours["gain"])
            expected.append((*seconds, theirs["mib"], ours["mib"]))
    rows = table("docs/integrations.md", "| step | theirs |")
    for cells, values in zip(rows, expected, strict=True):
        faults = [
            *(f for cell, v in zip(cells[1:4], values, strict=False) for f in wrong(cell, [v])),
            *wrong(cells[4], values[3:]),
        ]
        assert faults == []


# ---- ops ----------------------------------------------------------------------------------------


def op(name: str, case: str, contender: str) -> dict[str, Any]:
    """The row of a bench of an op: the case of this name, or the only one that begins with it."""
    rows = [row for row in report(name)["rows"] if row["contender"] == contender]
    exact = [row for row in rows if row["case"] == case]
    (row,) = exact or [row for row in rows if row["case"].startswith(case)]
    return dict(row)


def test_products_on_tiles() -> None:
    rows = table("docs/kernels/matmul.md", "| product |")
    measured = report("matmul")["rows"]
    assert [row[0].strip("`") for row in rows] == [r["case"] for r in measured if r["ours"]]
    expected = []
    for cells in rows:
        case = cells[0].strip("`")
        ours = op("matmul", case, "cpu")
        expected.append((ours["median_ms"], op("matmul", case, "torch.mm")["median_ms"]))
        assert wrong(cells[3], [ours["gain"]]) == []
    hold([row[:3] for row in rows], expected)


def test_a_decoder_layer() -> None:
    rows = table("docs/kernels/decoder_layer.md", "| segments x length")
    measured = report("decoder_layer")["rows"]
    sides = ("cpu", "parts", "transformers")
    assert [(r["case"], r["contender"]) for r in measured] == [
        (case, side) for case in dict.fromkeys(r["case"] for r in measured) for side in sides
    ]
    for cells, first in zip(rows, range(0, len(measured), 3), strict=True):
        three = measured[first : first + 3]
        faults = [
            f for c, r in zip(cells[1:4], three, strict=True) for f in wrong(c, [r["median_ms"]])
        ]
        assert faults + wrong(cells[4], [r["extra_mib"] for r in three]) == []


def test_ops_from_hidden_states() -> None:
    rows = table("docs/kernels.md", "| from hidden states")
    for cells, case in zip(rows, ("[1024, 256]", "[1024, 1024]", "[512, 4096]"), strict=True):
        ours = op("linear_ppo_loss", case, "rlhf_fast")
        faults = wrong(cells[1], [ours["median_ms"]])
        peers = ("recomputing", "all logits", "compile all logits")
        for cell, peer in zip(cells[2:5], peers, strict=True):
            gain = op("linear_ppo_loss", case, peer)["median_ms"] / ours["median_ms"]
            faults += wrong(cell, [gain])
        eager = op("linear_ppo_loss", case, "all logits")["extra_mib"]
        assert faults + wrong(cells[5], (ours["extra_mib"], eager)) == []


def test_ops_from_logits() -> None:
    wide, narrow, both = "[512, 151936]", "[4096, 32000]", "forward + backward"
    cases = [
        *(f"{s} {d} log-prob + entropy" for s in (wide, narrow) for d in ("fp32", "bf16")),
        *(f"{s} {d} log-prob" for s in (wide, narrow) for d in ("fp32", "bf16")),
    ]
    measured = [("logprobs", case, "rlhf_fast cpu") for case in cases]
    for dtype in ("fp32", "bf16"):
        case = f"{wide} {dtype} log-prob + entropy, {both}"
        measured += [("logprobs", case, f"rlhf_fast cpu{way}") for way in (", in place", "")]
    measured += [("kl", f"[256, 151936] {d} forward", "rlhf_fast cpu") for d in ("fp32", "bf16")]
    measured += [("kl", f"[256, 151936] fp32 {both}", "rlhf_fast cpu, in place")]
    expected = []
    for name, case, contender in measured:
        (row,) = [
            r for r in report(name)["rows"] if (r["case"], r["contender"]) == (case, contender)
        ]
        share = None if "backward" in case else 100 * row["of_bandwidth"]
        expected.append((row["median_ms"], share, row["gain"], row["gain_over_eager"]))
    hold(table("docs/kernels.md", "| from logits |"), expected)


def test_ops_on_tokens() -> None:
    rows = table("docs/kernels.md", "| on tokens |")
    loop = {"gae [64": "eager loop", "long: gae": "eager loop", "fused: ": "eager loop"}
    measured = [
        *(("gae", case) for case in (*loop, "whiten [64")),
        *(("ppo_loss", f"131072 tokens {dtype}") for dtype in ("fp32", "bf16")),
    ]
    for cells, (name, case) in zip(rows, measured, strict=True):
        ours = op(name, case, "rlhf_fast cpu" if name == "ppo_loss" else "cpu")
        slow = ours["gain_over_eager"]
        if case in loop:
            slow = op(name, case, loop[case])["median_ms"] / ours["median_ms"]
        share = [100 * ours["of_bandwidth"]] if "%" in cells[1] else []
        faults = wrong(cells[1], [ours["median_ms"], *share])
        assert faults + wrong(cells[2], [ours["gain"]]) + wrong(cells[3], [slow]) == []


def test_sampling() -> None:
    settings = ("plain", "top-k 50, top-p 0.9")
    measured = [
        f"{s}, {way}" for s in ("[256, 151936] fp32", "[8, 151936] bf16") for way in settings
    ]
    expected = []
    for case in measured:
        row = op("sample", case, "cpu")
        expected.append((row["median_ms"], row["gain"]))
    hold(table("docs/kernels.md", "| sampling |"), expected)


# ---- the README ---------------------------------------------------------------------------------


def readme_figures() -> list[tuple[list[float], list[float]]]:
    """What the second and the third cell of each row print."""
    logprobs = op("logprobs", "[512, 151936] fp32 log-prob + entropy", "rlhf_fast cpu")
    loss, gae = op("linear_ppo_loss", "[1024, 256]", "rlhf_fast"), op("gae", "gae [64", "cpu")
    rows = {
        (r["shape"], r["batch"], r["lengths"]): r for r in report("engine_generate_cpu")["rows"]
    }
    figures = [
        ([logprobs["median_ms"]], [logprobs["gain"], logprobs["gain_over_eager"]]),
        ([loss["median_ms"], loss["extra_mib"]], [loss["gain"]]),
        ([gae["median_ms"]], [gae["gain"]]),
    ]
    for lengths in ("uniform", "long-tailed"):
        row = rows["small", 64, lengths]
        figures.append(([row["tokens_per_second"]["engine"]], [row["times_faster"]["generate"]]))
    fixed, tailed = report("ppo_step_cpu")["cases"]
    for case in (tailed, fixed):
        ours, trl = case["rows"]["ours"], case["rows"]["trl"]
        seconds = [ours["seconds"]["step"], trl["seconds"]["step"]]
        extra = [ours["extra_mib"]["step"], trl["extra_mib"]["step"]]
        gains = [seconds[1] / seconds[0], 1, extra[1] / extra[0]]
        figures.append(([seconds[0], extra[0]], gains))
    both = [case["rows"] for case in report("ppo_learning_cpu")["algorithms"]]
    times = [(rows["ours"]["seconds_to_worse"], rows["trl"]["seconds_to_worse"]) for rows in both]
    figures.append(([times[0][0]], [theirs / ours for ours, theirs in times]))
    return figures


@pytest.mark.parametrize("row", range(8))
def test_readme(row: int) -> None:
    cells = table("README.md", "| | ours | beside |")[row]
    ours, beside = readme_figures()[row]
    text = cells[2].replace("TRL 1.12.0", "TRL")
    assert wrong(cells[1], ours) + wrong(text, beside) == []
