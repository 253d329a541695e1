"""Slopes are those of the data, and work that grows too fast is found."""

from __future__ import annotations

import pytest

from bench.complexity import bench_complexity
from bench.complexity.subject import Subject, powers

SIZES = [10, 20, 40, 80, 160]


@pytest.mark.parametrize("order", [0.0, 1.0, 1.5, 2.0])
def test_the_order_of_a_power_is_its_exponent(order: float) -> None:
    values = [3.0 * size**order for size in SIZES]
    assert bench_complexity.time_order(SIZES, values) == pytest.approx(order)


def test_fixed_costs_of_small_sizes_do_not_hide_the_order() -> None:
    values = [1000.0 + size**2 for size in SIZES]
    assert bench_complexity.time_order(SIZES, values) > 1.0


def test_memory_counts_where_there_is_enough_of_it() -> None:
    mib = 1 << 20
    assert bench_complexity.memory_order([1, 2, 4], [0, 2 * mib, 4 * mib]) == pytest.approx(1.0)
    assert bench_complexity.memory_order([1, 2, 4], [0, mib // 2, 4 * mib]) is None
    assert bench_complexity.memory_order([1, 2], [None, None]) is None


@pytest.mark.parametrize(("order", "more"), [(1, False), (2, True)])
def test_what_grows_faster_than_expected_is_marked(
    order: int, more: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 0.0

    def work(size: int) -> bench_complexity.Run:
        def run() -> None:
            nonlocal now
            now += 1e-3 * size**order

        return run

    monkeypatch.setattr(bench_complexity.time, "process_time", lambda: now)
    monkeypatch.setattr(bench_complexity.time, "perf_counter", lambda: now)
    (row,) = bench_complexity.measure(Subject("work", "size", work, powers(8, 4)), "quick")
    assert row.time_order == pytest.approx(order)
    assert row.more == more
    assert len(row.milliseconds[0]) == bench_complexity.ROUNDS["quick"]
    bench_complexity.print_row(row)
    assert ("MORE than 1" in capsys.readouterr().out) == more


def test_phases_of_a_call_are_rows_of_their_own() -> None:
    def make(size: int) -> bench_complexity.Run:
        return lambda: {"fast": 1.0 * size, "slow": 1.0 * size**2}

    expected = {"fast": 1.0, "slow": 1.0}
    subject = Subject("step", "rows", make, powers(8, 3), expected)
    fast, slow = bench_complexity.measure(subject, "tiny")
    assert (fast.subject, fast.more) == ("step: fast", False)
    assert (slow.subject, slow.more) == ("step: slow", True)
