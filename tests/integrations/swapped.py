"""pytest plugin: another trainer's own tests, unchanged, on our functions.

    export PYTHONPATH=$PROJECT:$PROJECT/kernels:$PROJECT/tests/integrations
    RLHF_FAST_SWAP=trl python -m pytest -p swapped tests/test_utils.py

in a checkout of the trainer's tests, which is likely to have a package `tests` of its own. Installs
the adapter `rlhf_fast.integrations.<name>` before a test module is imported, says what it replaced,
and fails the session if at its end ours are no longer where they were put.
"""

from __future__ import annotations

import importlib
import os
from typing import Any

import pytest

_REPORT: dict[str, Any] = {}


def _adapter() -> Any:
    name = os.environ.get("RLHF_FAST_SWAP", "")
    if not name:
        raise pytest.UsageError("set RLHF_FAST_SWAP to an adapter of rlhf_fast.integrations")
    return importlib.import_module(f"rlhf_fast.integrations.{name}")


def pytest_configure() -> None:
    """Install the adapter."""
    _REPORT["at start"] = _adapter().install()


def pytest_report_header() -> list[str]:
    """Every place that holds one of our functions."""
    return str(_REPORT["at start"]).splitlines()


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Tests that put the trainer's own functions back would prove nothing of ours."""
    before, now = set(_REPORT["at start"].replaced), set(_adapter().install().replaced)
    if not before <= now:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
        raise pytest.UsageError(f"no longer replaced: {', '.join(sorted(before - now))}")
