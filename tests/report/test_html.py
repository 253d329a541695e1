"""Escaping and page parts."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_fast.errors import EnvironmentFault
from rlhf_fast.report import html
from tests.report.pages import Page


@pytest.mark.parametrize(
    ("raw", "shown"),
    [
        ("\x1b[31mred\x1b[0m", "red"),
        ("\x1b[38;5;196mdeep\x1b[m", "deep"),
        ("\x1b]8;;http://x\x07link\x1b]8;;\x07", "link"),
        ("\x1b]0;title\x1b\\text", "text"),
        ("a\x00b\x07c\x7fd\x85e", "abcde"),
        ("two\r\nlines\tkept", "two\nlines\tkept"),
        ("safe \u202egnp.exe", "safe gnp.exe"),
        ("cut \x1b[", "cut "),
        (3.5, "3.5"),
    ],
)
def test_clean_removes_what_is_not_text(raw: object, shown: str) -> None:
    assert html.clean(raw) == shown


def test_escape_covers_content_and_attributes() -> None:
    assert html.escape("<a href=\"x\" b='y'>&") == (
        "&lt;a href=&quot;x&quot; b=&#x27;y&#x27;&gt;&amp;"
    )
    # A lone surrogate cannot be written as UTF-8.
    html.escape("\ud800").encode("utf-8")


@given(text=st.text(alphabet=st.characters(), max_size=40))
def test_any_text_stays_in_its_cell(text: str) -> None:
    page = Page(html.table(["t"], [[text], ["<script>x</script>"]]))
    expected = html.clean(text).encode("utf-8", "replace").decode()
    assert page.cells == ["t", expected, "<script>x</script>"]


def test_empty_parts_leave_nothing_behind() -> None:
    assert html.section("title") == html.section("title", "", "") == ""
    assert html.table(["a"], []) == ""
    assert html.charts([]) == ""
    assert html.details("more", "") == ""


def test_page_is_complete_and_written_atomically(tmp_path: Path) -> None:
    out = tmp_path / "new" / "report.html"
    assert html.write_page(out, html.page("t & u", "s", html.paragraph("p"))) == out
    page = Page(out.read_text("utf-8"))
    assert "t & u" in page.text
    assert [entry.name for entry in out.parent.iterdir()] == ["report.html"]
    metas = [attrs for tag, attrs in page.tags if tag == "meta"]
    assert any("default-src 'none'" in (attrs.get("content") or "") for attrs in metas)


def test_a_place_that_cannot_be_written_is_one_message(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(EnvironmentFault, match="RF7901"):
        html.write_page(tmp_path / "file" / "report.html", "x")
