"""What the engine's tests share."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module", autouse=True)
def cheap_collections() -> Iterator[None]:
    """transformers' continuous batching collects garbage twice a run: 0.3 s each in this process.

    Objects that are frozen are not looked at.
    """
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
