"""Settings of every test."""

import gc
import os

import pytest
import torch

if not torch.cuda.is_available():
    # Before anything imports triton: its kernels then run on CPU tensors, by name only.
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """The models are tiny: a second thread costs more in barriers than it computes.

    Where another process competes for the core, each barrier waits for a time slice: minutes become
    hours. Tests of threading set their own number.
    """
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="module")
def cheap_collections() -> None:
    """Collections leave out what was there before the module: packages, and thousands of tests.

    Looking at those takes 0.1 s and more, and transformers' continuous batching and the benches
    collect before every measurement. Garbage is freed first, so none is kept.
    """
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    """At exit extensions look for objects that were never freed."""
    gc.unfreeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Among several workers, begin with the files that hold slow tests.

    A worker that has nothing left takes over the second half of what another one has: of short
    tests the shares come out even, and no slow fixture is built in both.
    """
    if "PYTEST_XDIST_WORKER" in os.environ:
        slow = {item.path for item in items if item.get_closest_marker("slow")}
        items.sort(key=lambda item: item.path not in slow)
