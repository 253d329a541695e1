"""The table of arguments and results in docs/kernels.md against the signatures."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import pytest

import rlhf_fast_kernels

PAGE = Path(__file__).parents[2] / "docs" / "kernels.md"


def rows() -> dict[str, tuple[str, str]]:
    """Name -> (arguments, result)."""
    section = PAGE.read_text(encoding="utf-8").split("## Arguments and results\n")[1]
    lines = [line for line in section.split("\n## ")[0].splitlines() if line.startswith("| `")]
    cells = [line.strip("| ").split(" | ") for line in lines]
    return {row[0].strip("`"): (row[1], row[2]) for row in cells}


def test_no_public_name_is_missing() -> None:
    assert sorted(rows()) == sorted(rlhf_fast_kernels.__all__)


@pytest.mark.parametrize("name", rlhf_fast_kernels.__all__)
def test_the_arguments_are_those_of_the_signature(name: str) -> None:
    """What has no default stands there, and nothing that does not exist."""
    public: Any = getattr(rlhf_fast_kernels, name)
    arguments, result = rows()[name]
    needed, _, optional = arguments.partition("(")
    parameters = inspect.signature(public).parameters
    required = [p.name for p in parameters.values() if p.default is inspect.Parameter.empty]
    assert re.findall(r"`(\w+)`", needed) == required
    named = set(re.findall(r"`(\w+)`", optional)) - set(parameters)
    assert named <= set(rlhf_fast_kernels.__all__) | {"x"}
    if isinstance(public, type) and issubclass(public, tuple):
        return
    returned = re.findall(r"`(\w+)`", result)
    annotation = str(inspect.signature(public).return_annotation)
    for other in returned:
        assert other in annotation or other in parameters, other
