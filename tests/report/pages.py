"""What the tests ask of every page: it parses, loads nothing and runs nothing."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

VOID = {"meta", "br", "hr", "img", "link", "input"}
LOADING = {"src", "href", "srcset", "data", "action", "poster", "xlink:href"}
RUNNING = {"script", "iframe", "object", "embed", "link", "img", "form", "base"}


class Page(HTMLParser):
    """A strict reader: every tag closed in order, text collected per element."""

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.stack: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.cells: list[str] = []
        self.text = ""
        self.feed(source)
        self.close()
        assert self.stack == [], f"left open: {self.stack}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        assert tag not in RUNNING, f"<{tag}> on the page"
        for name, value in attrs:
            assert name not in LOADING, f"{name}={value} on <{tag}>"
            assert not name.startswith("on"), f"{name} on <{tag}>"
        if tag in {"td", "th"}:
            self.cells.append("")
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.stack.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.stack, f"</{tag}> without start"
        assert self.stack.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" in self.stack:
            assert "url(" not in data
            assert "@import" not in data
            return
        self.text += data
        if self.cells and self.stack and self.stack[-1] in {"td", "th"}:
            self.cells[-1] += data

    def count(self, tag: str) -> int:
        """How many elements of a kind there are."""
        return sum(name == tag for name, _ in self.tags)


def read(path: Path) -> Page:
    """Parse a report and hold it to the rules above."""
    source = path.read_text("utf-8")
    assert source.startswith("<!doctype html>")
    return Page(source)
