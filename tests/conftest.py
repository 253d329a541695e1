"""Settings of every test."""

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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Among several workers, begin with the files that hold slow tests.

    A worker that has nothing left takes over the second half of what another one has: of short
    tests the shares come out even, and no slow fixture is built in both.
    """
    if "PYTEST_XDIST_WORKER" in os.environ:
        slow = {item.path for item in items if item.get_closest_marker("slow")}
        items.sort(key=lambda item: item.path not in slow)
