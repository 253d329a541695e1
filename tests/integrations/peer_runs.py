"""A step of another trainer's own code, once as it is and once on our functions: the comparison."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

TIGHT = {"rtol": 1e-5, "atol": 1e-5}
# AdamW's first step is lr x sign(gradient) wherever the gradient is far from eps: where it is 0 but
# for rounding, the step is not. lr is 1e-3, and this is what such a parameter may differ by.
STEPPED = {"rtol": 1e-5, "atol": 2e-5}


def compare_runs(
    make: Callable[[], Any], patched: Callable[[], AbstractContextManager[Any]]
) -> dict[str, Any]:
    """One step of a trainer's own code and one on our functions: numbers, gradients, weights.

    Args:
        make: a `Run` of `bench.integrations`, the same at every call.
        patched: the adapter's scope.

    Returns:
        What the trainer's own step computed.
    """
    own = make()
    expected = own.step()
    with patched():
        ours = make()
        found = ours.step()
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        if isinstance(value, Tensor):
            torch.testing.assert_close(found[name], value, **TIGHT, msg=_named(name))
        else:
            _compare_numbers(value, found[name])
    _compare_tensors(own.gradients(), ours.gradients(), TIGHT)
    _compare_tensors(own.weights(), ours.weights(), STEPPED)
    return expected


def _compare_numbers(expected: dict[str, float], found: dict[str, float]) -> None:
    assert list(expected) == list(found)
    for name, value in expected.items():
        a, b = torch.tensor(value), torch.tensor(found[name])
        torch.testing.assert_close(b, a, **TIGHT, msg=_named(name))


def _compare_tensors(
    expected: dict[str, Tensor], found: dict[str, Tensor], tolerance: dict[str, float]
) -> None:
    assert expected.keys() == found.keys()
    assert any(x.any() for x in expected.values())
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, **tolerance, msg=_named(name))


def _named(name: str) -> Callable[[str], str]:
    return lambda message: f"{name}: {message}"
