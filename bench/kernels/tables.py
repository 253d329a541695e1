"""Tables of measured rows, and the lines that must stand above them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .harness import Row

# Heading and attribute, in the order of the table; a column that no row fills is left out.
COLUMNS = (
    ("median ms", "median_ms"),
    ("p20", "p20_ms"),
    ("p80", "p80_ms"),
    ("cpu ms", "cpu_ms"),
    ("wall ms", "wall_ms"),
    ("graph ms", "graph_ms"),
    ("GB/s", "gb_per_s"),
    ("of limit", "of_bandwidth"),
    ("TFLOP/s", "tflops"),
    ("of matmul", "of_matmul"),
    ("extra MiB", "extra_mib"),
    ("max error", "error"),
    ("gain", "gain"),
    ("on eager", "gain_over_eager"),
)
FORMS = {
    "gb_per_s": ".1f",
    "of_bandwidth": ".0%",
    "tflops": ".3g",
    "of_matmul": ".0%",
    "extra_mib": ".1f",
    "error": ".1e",
}
ALWAYS = {"median_ms", "error"}


def print_environment(facts: Mapping[str, Any]) -> None:
    """The lines that must stand above every table."""
    dirty = " (modified)" if facts["modified"] else ""
    versions = f"torch {facts['torch']}, triton {facts.get('triton') or 'absent'}"
    print(f"commit {facts['commit'] or 'unknown'}{dirty}, {versions}, {facts['time']}")
    if "gpu" in facts:
        print(f"{facts['gpu']}, driver {facts['driver'] or 'unknown'}, CUDA {facts['cuda']}")
    clock = f" at {facts['cpu_mhz']:.0f} MHz" if facts.get("cpu_mhz") else ""
    print(f"{facts['cpu']}{clock}, {facts['core_module']}, load average {facts['load_average']}")
    print(f"{facts['threads']} threads\n")


def print_calibration(when: str, found: Mapping[str, float]) -> None:
    """One line of what the machine can do; `when` is before or after the tables."""
    values = ", ".join(f"{name} {value:.4g}" for name, value in found.items())
    print(f"calibration {when}: {values}\n", flush=True)


def print_absent(absent: Mapping[str, str]) -> None:
    """Peers that took no part, and why."""
    for name, reason in absent.items():
        print(f"not measured: {name}: {reason}")


def print_rows(rows: Sequence[Row]) -> None:
    """One case as a table."""
    print(rows[0].case)
    columns = [
        (heading, key)
        for heading, key in COLUMNS
        if key in ALWAYS or any(getattr(row, key) is not None for row in rows)
    ]
    width = max(30, *(len(row.contender) + 2 for row in rows))
    print(f"  {'':<{width}}" + "".join(f"{heading:>11}" for heading, _ in columns))
    for row in rows:
        cells = "".join(f"{_cell(row, key):>11}" for _, key in columns)
        print(f"  {row.contender:<{width}}{cells}")
    print(flush=True)


def _cell(row: Row, key: str) -> str:
    value = getattr(row, key)
    if value is None:
        return "error gate" if key == "median_ms" else ""
    if key in {"gain", "gain_over_eager"}:
        return f"{value:.1f}x"
    return format(value, FORMS[key]) if key in FORMS else _milliseconds(value)


def _milliseconds(value: float) -> str:
    """Three digits at least: ops of microseconds and of seconds stand in the same table."""
    return f"{value:.2f}" if value >= 1 else f"{value:.4f}"
