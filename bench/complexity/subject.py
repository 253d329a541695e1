"""What is made larger and larger."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Run = Callable[[], Any]


@dataclass(frozen=True)
class Subject:
    """Work of a size along one axis.

    Attributes:
        make: from a size to a call; a call that returns a dict gives seconds by name.
        sizes: by preset, ascending.
        expected_time: highest order that is right, by the names of the call ("" for the call).
        expected_memory: the same of the bytes of a call.
    """

    name: str
    axis: str
    make: Callable[[int], Run]
    sizes: Mapping[str, Sequence[int]]
    expected_time: Mapping[str, float] = field(default_factory=lambda: {"": 1.0})
    expected_memory: float = 1.0


def powers(first: int, count: int, tiny: int = 4) -> dict[str, list[int]]:
    """Sizes that double, of the three presets."""
    return {
        "tiny": [tiny << k for k in range(3)],
        "quick": [first << k for k in range(max(3, count - 2))],
        "cpu": [first << k for k in range(count)],
    }
