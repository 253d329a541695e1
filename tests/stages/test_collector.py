"""Old objects stand apart from collections while a run lasts, and no longer."""

from __future__ import annotations

import gc
import weakref

import pytest

from rlhf_fast.stages.collector import old_objects_apart


class Node:
    def __init__(self) -> None:
        self.itself = self


@pytest.fixture(autouse=True)
def _nothing_apart() -> None:
    gc.unfreeze()  # what the tests' own fixture has put apart


def test_what_existed_is_apart_and_what_comes_is_collected() -> None:
    old = Node()
    with old_objects_apart():
        apart = weakref.ref(old)
        del old
        new = weakref.ref(Node())
        gc.collect()
        assert new() is None
        assert apart() is not None
        assert gc.get_freeze_count() > 0
    assert gc.get_freeze_count() == 0
    gc.collect()
    assert apart() is None


def test_it_returns_after_an_error() -> None:
    with pytest.raises(KeyError), old_objects_apart():
        raise KeyError
    assert gc.get_freeze_count() == 0


def test_objects_that_somebody_else_put_apart_stay_so() -> None:
    gc.freeze()
    try:
        with old_objects_apart():
            pass
        assert gc.get_freeze_count() > 0
    finally:
        gc.unfreeze()
