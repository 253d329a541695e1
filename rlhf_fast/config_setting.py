"""`setting`: a documented leaf of a config dataclass; and what may be wrong with its value."""

from __future__ import annotations

import dataclasses
import math
import os
from dataclasses import field
from typing import Any

LARGEST_INT = 2**63 - 1
LARGEST_FLOAT = 3.4028234e38  # of float32


def setting(
    default: Any,
    doc: str,
    *,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    choices: tuple[str, ...] | None = None,
) -> Any:
    """A config leaf: default, documentation, inclusive bounds, exclusive lower bound, choices."""
    metadata = {"doc": doc, "low": low, "high": high, "above": above, "choices": choices}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


_TYPES: dict[str, tuple[type, ...]] = {
    "bool": (bool,),
    "int": (int,),
    "float": (int, float),
    "str": (str, os.PathLike),
    "list[int]": (list, tuple),
    "list[str]": (list, tuple),
}


def type_violation(key: str, value: Any, leaf: dataclasses.Field[Any]) -> str | None:
    """What is wrong with the type of a leaf's value; None if nothing is."""
    kind = str(leaf.type)
    if isinstance(value, _TYPES[kind]) and (kind == "bool" or not isinstance(value, bool)):
        return None
    return f"{key}={value!r}: expected {kind}, got {type(value).__name__}"


def leaf_violation(key: str, value: Any, rules: Any) -> str | None:
    """What is wrong with a leaf's value by the `rules` that `setting` noted; None if nothing is."""
    if isinstance(value, float) and not math.isfinite(value):
        return f"{key}={value}: expected a finite number"
    low, high, above, choices = (rules.get(k) for k in ("low", "high", "above", "choices"))
    if choices is not None and value not in choices:
        return f"{key}={value!r}: expected one of {', '.join(choices)}"
    if above is not None and not value > above:
        return f"{key}={value}: expected more than {above}"
    if low is not None and value < low:
        return f"{key}={value}: expected at least {low}"
    if high is not None and value > high:
        return f"{key}={value}: expected at most {high}"
    return None if high is not None else _size_violation(key, value)


def _size_violation(key: str, value: Any) -> str | None:
    """A number that neither tensors nor C++ can hold."""
    for kind, most in ((int, LARGEST_INT), (float, LARGEST_FLOAT)):
        if isinstance(value, kind) and abs(value) > most:
            return f"{key}={value}: expected at most {most} in size"
    return None
