"""Pages go with the run that used them, not when Python next collects its circles.

On a GPU they are most of its memory, and scoring comes right after.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest

from rlhf_fast.engine.hybrid import HybridEngine
from rlhf_fast.engine.requests import Request
from rlhf_fast.engine.settings import EngineSettings
from rlhf_fast.types import SamplingParams
from tests.engine.test_decode_graphs import FailingRecorder
from tests.models.tiny import build

REQUESTS = [
    Request((5, 6, 7), SamplingParams(8), (1, 2, 3)),
    Request((9,), SamplingParams(4, temperature=0.0), (4,)),
]


@pytest.fixture(autouse=True)
def _no_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def engine(path: str, *, graphs: bool = False) -> tuple[HybridEngine, Any]:
    made = HybridEngine(build(), eos_ids=[2], settings=EngineSettings(path=path, max_batch=2))
    runner: Any = made._runner
    if graphs:
        runner.recorder = FailingRecorder  # a recorder that repeats the step would hold it
    return made, runner


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("path", ["fused", "modules"])
def test_nothing_holds_the_pages_of_a_rollout(path: str, graphs: bool) -> None:
    made, runner = engine(path, graphs=graphs)
    made.complete(REQUESTS)
    pages = weakref.ref(runner.cache)
    runner.release()  # what ends a rollout on a GPU
    assert pages() is None


@pytest.mark.parametrize("path", ["fused", "modules"])
def test_nor_those_of_a_rollout_that_failed(path: str) -> None:
    made, runner = engine(path)
    seen = []

    def fail(*_: object) -> None:
        seen.append(weakref.ref(runner.cache))
        raise ZeroDivisionError

    made.on_finished = fail
    with pytest.raises(ZeroDivisionError):
        made.complete(REQUESTS)
    assert seen[0]() is None
