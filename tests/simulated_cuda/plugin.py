"""pytest plugin: the tests run with a simulated CUDA device (`-p tests.simulated_cuda.plugin`)."""

from __future__ import annotations

from tests.simulated_cuda.loading import load

load()


def pytest_report_header() -> str:
    """Nobody should take these results for those of a GPU."""
    return "CUDA: simulated"
