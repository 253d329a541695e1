"""Charts: well-formed SVG, true positions, no number that cannot be drawn."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_fast.report.plots import (
    HEIGHT,
    MAX_POINTS,
    WIDTH,
    Axis,
    Series,
    bar_chart,
    line_chart,
    log_ticks,
    number_text,
    seconds_text,
    stacked_chart,
    ticks,
)

numbers = st.floats(allow_nan=True, allow_infinity=True, width=32)


def parse(figure: str) -> ElementTree.Element:
    return ElementTree.fromstring(figure)


def draw(*series: Series, small: bool = False) -> ElementTree.Element:
    return parse(line_chart("title", series, Axis("x"), Axis("y"), small=small))


@given(points=st.lists(st.tuples(numbers, numbers), max_size=30), small=st.booleans())
def test_any_points_give_well_formed_svg_inside_its_box(
    points: list[tuple[float, float]], small: bool
) -> None:
    figure = draw(Series("a<b>&\"'", points, markers=True), small=small)
    text = ElementTree.tostring(figure, encoding="unicode")
    assert "nan" not in text.replace("n/a", "")
    assert not re.search(r'="[^"]*\binf\b', text)
    box = [0.0, 0.0, WIDTH, HEIGHT]
    for svg in figure.iter("svg"):
        box = [float(v) for v in svg.attrib["viewBox"].split()]
    for dot in figure.iter("circle"):
        assert 0 <= float(dot.attrib["cx"]) <= box[2]
        assert 0 <= float(dot.attrib["cy"]) <= box[3]


def test_small_charts_do_not_repeat_their_title_along_the_axis() -> None:
    rotated = {
        small: [t.text for t in draw(Series("", [(0, 0), (1, 1)]), small=small).iter("text")]
        for small in (True, False)
    }
    assert "y" in rotated[False]
    assert "y" not in rotated[True]
    assert "x" in rotated[True]


def test_positions_are_affine_in_the_data_and_up_is_up() -> None:
    figure = draw(Series("", [(0.0, 0.0), (1.0, 5.0), (2.0, 10.0)], markers=True))
    dots = [(float(d.attrib["cx"]), float(d.attrib["cy"])) for d in figure.iter("circle")]
    assert dots[0][0] < dots[1][0] < dots[2][0]
    assert dots[0][1] > dots[1][1] > dots[2][1]
    assert dots[1][0] == pytest.approx((dots[0][0] + dots[2][0]) / 2, abs=0.11)
    assert dots[1][1] == pytest.approx((dots[0][1] + dots[2][1]) / 2, abs=0.11)


def test_points_that_are_not_finite_interrupt_the_line() -> None:
    figure = draw(Series("", [(0, 1), (1, 2), (2, math.nan), (3, 4), (4, 5)], markers=True))
    lines = [line.attrib["points"].split() for line in figure.iter("polyline")]
    assert [len(line) for line in lines] == [2, 2]
    assert len(list(figure.iter("circle"))) == 4


def test_constant_and_single_points_are_drawn() -> None:
    assert len(list(draw(Series("", [(3.0, 7.0)])).iter("circle"))) == 1
    assert len(list(draw(Series("", [(1.0, 7.0), (2.0, 7.0)])).iter("polyline"))) == 1


def test_no_finite_point_is_said_in_words() -> None:
    figure = draw(Series("a", [(0.0, math.nan)]), Series("b", []))
    assert not list(figure.iter("svg"))
    assert "no data" in ElementTree.tostring(figure, encoding="unicode")


def test_long_lines_are_averaged_not_cut() -> None:
    figure = draw(Series("", [(float(i), float(i % 2)) for i in range(10_000)]))
    (line,) = (line.attrib["points"].split() for line in figure.iter("polyline"))
    assert MAX_POINTS / 2 < len(line) <= MAX_POINTS
    xs = [float(pair.split(",")[0]) for pair in line]
    # Averages of neighbours: evenly spread from edge to edge.
    assert xs[0] < 80
    assert xs[-1] > WIDTH - 40


def test_error_bars_hover_texts_dashes_and_legend() -> None:
    line = Series(
        "gold", [(0, 1), (1, 2)], 3, True, True, labels=["step 1", "step 2"], errors=[0.5, 0.0]
    )
    figure = draw(line, Series("other", [(0, 0), (1, 1)]))
    titles = [title.text for title in figure.iter("title")]
    assert titles == ["gold step 1: x 0, y 1", "gold step 2: x 1, y 2"]
    bars = [e for e in figure.iter("line") if "thin" in e.attrib["class"]]
    assert len(bars) == 1
    dashes = [e.attrib.get("stroke-dasharray") for e in figure.iter("polyline")]
    assert dashes == ["6 4", None]
    legend = [span.text for span in figure.iter("span")]
    assert legend == ["gold", "other"]


def test_bars_are_proportional_and_carry_shares() -> None:
    figure = parse(bar_chart("t", [("a", 1.0), ("b", 3.0), ("none", 0.0), ("bad", math.nan)]))
    widths = [float(e.attrib["width"]) for e in figure.iter("rect")]
    assert widths[1] == pytest.approx(3 * widths[0], rel=0.01)
    text = "".join(figure.itertext())
    assert "25%" in text
    assert "75%" in text
    assert "none" not in text
    assert "no data" in bar_chart("t", [])


def test_stacked_bars_share_a_scale_and_a_part_keeps_its_colour() -> None:
    bars = [("one", {"a": 1.0, "b": 3.0}), ("two", {"b": 2.0, "bad": math.nan}), ("none", {})]
    figure = parse(stacked_chart("t", bars, lambda v: f"{v:g} MiB"))
    rects = list(figure.iter("rect"))
    widths = [float(e.attrib["width"]) for e in rects]
    assert widths[1] == pytest.approx(3 * widths[0], rel=0.01)
    assert widths[2] == pytest.approx(2 * widths[0], rel=0.01)
    assert float(rects[1].attrib["x"]) == pytest.approx(174 + widths[0], abs=0.11)
    assert float(rects[2].attrib["x"]) == 174
    assert rects[1].attrib["class"] == rects[2].attrib["class"] != rects[0].attrib["class"]
    assert [e.text for e in figure.iter("title")] == ["a: 1 MiB", "b: 3 MiB", "b: 2 MiB"]
    labels = [e.text for e in figure.iter("text")]
    assert "4 MiB" in labels
    assert "none" not in labels


def test_long_names_stand_above_their_bars_in_full() -> None:
    name = "[1024, 256] x [32000, 256] fp32 forward + backward"
    figure = parse(stacked_chart("t", [(name, {"a": 1.0}), ("b", {"a": 2.0})], str))
    (first, _), (rect, _) = list(figure.iter("text"))[::2], list(figure.iter("rect"))
    assert first.text == name
    assert float(first.attrib["y"]) < float(rect.attrib["y"])
    assert float(rect.attrib["x"]) == 4


def test_logarithmic_axes_give_equal_room_to_equal_ratios() -> None:
    points = [(1.0, 1e-3), (10.0, 1e-1), (100.0, 10.0), (0.0, 1.0), (5.0, -1.0)]
    line = Series("", points, markers=True, errors=[0.5, 0.05, 0.0, 0.0, 0.0])
    figure = parse(line_chart("t", [line], Axis("x", log=True), Axis("y", log=True)))
    dots = [(float(e.attrib["cx"]), float(e.attrib["cy"])) for e in figure.iter("circle")]
    assert len(dots) == 3
    assert dots[1][0] - dots[0][0] == pytest.approx(dots[2][0] - dots[1][0], abs=0.2)
    assert dots[0][1] - dots[1][1] == pytest.approx(dots[1][1] - dots[2][1], abs=0.2)
    assert len([e for e in figure.iter("line") if "thin" in e.attrib["class"]]) == 1


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0.0, 2.0, [1, 2, 5, 10, 20, 50, 100]), (-3.0, 3.0, [1e-3, 1e-2, 0.1, 1, 10, 100, 1000])],
)
def test_ticks_of_a_logarithmic_axis(low: float, high: float, expected: list[float]) -> None:
    assert log_ticks(low, high) == pytest.approx(expected)
    assert 2 <= len(log_ticks(-9.0, 9.0)) <= 7


@given(low=st.floats(-1e6, 1e6), width=st.floats(1e-3, 1e6))
def test_ticks_are_round_even_and_within_the_range(low: float, width: float) -> None:
    values = ticks(low, low + width)
    assert 2 <= len(values) <= 13
    slack = 1e-6 * max(width, abs(low) * 1e-6)
    assert low - slack <= values[0]
    assert values[-1] <= low + width + slack
    step = values[1] - values[0]
    mantissa = step / 10 ** math.floor(math.log10(step) + 1e-9)
    assert min(abs(mantissa - m) for m in (1, 2, 5, 10)) < 1e-2


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (1.0, "1"), (0.12346, "0.1235"), (5e-4, "0.0005"), (1e-6, "1e-6"),
     (1.26e-6, "1.3e-6"), (2.5e7, "2.5e7"), (math.nan, "n/a"), (-3.0, "-3"),
     (5e4, "50000"), (12344.0, "12340")],
)  # fmt: skip
def test_number_text(value: float, text: str) -> None:
    assert number_text(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.34, "340 ms"), (12.34, "12.3 s"), (245.0, "4 min 05 s"), (7500.0, "2 h 05 min"),
     (math.nan, "n/a")],
)  # fmt: skip
def test_seconds_text(value: float, text: str) -> None:
    assert seconds_text(value) == text
