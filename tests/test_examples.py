"""The examples of "Your own loop": they run without a download, they learn, the page shows them."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
NAMES = ("kernels_only", "generator_only", "engine_only")


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", NAMES)
def test_scores_rise(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    load(name).main()
    scores = [float(x) for x in re.findall(r"step \d+: score (\d\.\d+)", capsys.readouterr().out)]
    assert len(scores) == 10
    assert sum(scores[-3:]) / 3 > scores[0] + 0.15


@pytest.mark.parametrize("name", NAMES)
def test_the_page_shows_lines_of_the_example(name: str) -> None:
    """Each line of code under the example's link is one of the file's, in the same order."""
    page = (ROOT / "docs" / "integrations.md").read_text()
    shown = re.search(rf"examples/{name}\.py\).*?```python\n(.*?)```", page, re.DOTALL)
    assert shown is not None
    lines = [line.strip() for line in shown[1].splitlines() if line.strip()]
    assert 8 <= len(lines) <= 16
    code = iter((ROOT / "examples" / f"{name}.py").read_text().splitlines())
    for line in lines:
        assert any(line == own.strip() for own in code), line
