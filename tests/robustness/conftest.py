from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.robustness.workshop import Workshop, build_inputs


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    build_inputs(folder)
    return folder


@pytest.fixture
def workshop(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Iterator[Workshop]:
    # Tiny models gain nothing from threads, and lose much to them on a busy machine.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield Workshop(inputs, tmp_path / "w", capsys)
    torch.set_num_threads(threads)
