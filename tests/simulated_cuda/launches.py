"""Launches of Triton's kernels, in its interpreter."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import simulated_cuda


@contextmanager
def inside_a_kernel() -> Iterator[None]:
    """What happens here is a kernel's: it is not recorded op by op, and nobody waits for it."""
    mode = simulated_cuda.sync_mode()
    simulated_cuda.pause_recording(1)
    simulated_cuda.set_sync_mode(0)
    try:
        yield
    finally:
        simulated_cuda.set_sync_mode(mode)
        simulated_cuda.pause_recording(-1)


def as_kernel(function: Callable[..., None]) -> Callable[..., None]:
    """A function that writes into its arguments, as a launch that a capture records."""

    def launch(*arguments: Any, **options: Any) -> None:
        def run() -> None:
            with inside_a_kernel():
                function(*arguments, **options)

        if simulated_cuda.recording():
            simulated_cuda.record_call(run)
        run()

    return launch


def install() -> None:
    """Launches read and write the memory of the device."""
    if importlib.util.find_spec("triton") is None:
        return
    executor = importlib.import_module("triton.runtime.interpreter").GridExecutor
    executor.__call__ = as_kernel(executor.__call__)
