"""What a stage tells its user: plain lines, reports of the data, warnings nobody overlooks."""

from __future__ import annotations

import sys
from collections.abc import Iterable

from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from rlhf_fast.data import DataReport
from rlhf_fast.stages.progress import printable


def say(lines: Iterable[str]) -> None:
    """Print plain text; control characters in it (file names, model output) are dropped."""
    for text in lines:
        for line in text.split("\n"):
            print(printable(line), flush=True)


def show_reports(*reports: DataReport) -> None:
    """Print what happened to the rows of each data source."""
    for report in reports:
        say(report.lines())


def warn_loudly(title: str, text: str) -> None:
    """A panel on standard error that nobody overlooks."""
    console = Console(file=sys.stderr, highlight=False)
    console.print(Panel(Text(text), title=Text(f"WARNING: {title}"), border_style="bold red"))
