"""pytest plugin: besides, what a test makes without naming a device is on the simulated one.

For tests that were written for CPU tensors: the same tests, on CUDA tensors.
"""

from __future__ import annotations

from typing import Any

from tests.simulated_cuda.loading import load

load()

import torch  # noqa: E402

_generator = torch.Generator


class _OnDefaultDevice(torch.Generator):
    """Generators follow no default device; tensors that are drawn with them do."""

    def __new__(cls, device: Any = "cuda") -> Any:
        return _generator(device)


torch.Generator = _OnDefaultDevice  # type: ignore[misc]
torch.set_default_device("cuda")
