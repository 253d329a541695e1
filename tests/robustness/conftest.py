from __future__ import annotations

from pathlib import Path

import pytest

from tests.robustness.workshop import Workshop, build_inputs


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    build_inputs(folder)
    return folder


@pytest.fixture
def workshop(inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Workshop:
    return Workshop(inputs, tmp_path / "w", capsys)
