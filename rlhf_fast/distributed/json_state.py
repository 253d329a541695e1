"""Python values as JSON and back, without losing a bit and without pickle.

JSON knows no tuple, no NaN, no key but a string. Values that need one of these are wrapped in an
object whose first key is `$`; everything else is written as itself, so the file stays readable.
Floats are written by `repr`, the shortest text that reads back as the same IEEE-754 double.
"""

from __future__ import annotations

import collections
import json
import math
from typing import Any

import numpy as np

from rlhf_fast.errors import CheckpointError

_TAG = "$"


def to_json(value: Any, where: str = "state") -> Any:
    """Turn a tree of plain values into one that `json` writes exactly.

    Args:
        value: None, bool, int, float (NaN and infinities too), str, list, tuple, dict, Counter, and
            NumPy scalars (which come back as Python ones). Tensors belong in tensor files.
        where: name of the tree's root in messages.

    Raises:
        CheckpointError: a value of another type (RF8004), with its path in the tree.
    """
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        number = float(value)
        return number if math.isfinite(number) else {_TAG: "float", "value": repr(number)}
    if isinstance(value, list):
        return [to_json(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if type(value) is tuple:
        return {_TAG: "tuple", "value": to_json(list(value), where)}
    if isinstance(value, dict):
        return _dict_to_json(value, where)
    raise CheckpointError(
        "RF8004",
        f"a value of type {type(value).__name__} cannot be stored as JSON",
        where=where,
        expected="None, bool, int, float, str, list, tuple or dict",
        remedy="store tensors in a tensor file and other objects as their plain fields",
    )


def _dict_to_json(value: dict[Any, Any], where: str) -> Any:
    counter = isinstance(value, collections.Counter)
    plain = not counter and all(isinstance(key, str) for key in value) and _TAG not in value
    if plain:
        return {key: to_json(item, f"{where}.{key}") for key, item in value.items()}
    pairs = [
        [to_json(key, f"{where} key"), to_json(item, f"{where}[{key!r}]")]
        for key, item in value.items()
    ]
    return {_TAG: "counter" if counter else "dict", "value": pairs}


def checked(value: Any, where: str) -> Any:
    """Return `value` as it is; raise CheckpointError (RF8004) if `to_json` could not store it."""
    to_json(value, where)
    return value


def from_json(value: Any) -> Any:
    """Undo `to_json`.

    Raises:
        ValueError: a `$` object that `to_json` never writes.
    """
    if isinstance(value, list):
        return [from_json(item) for item in value]
    if not isinstance(value, dict):
        return value
    if _TAG not in value:
        return {key: from_json(item) for key, item in value.items()}
    tag, inner = value[_TAG], value.get("value")
    if tag == "float" and inner in ("nan", "inf", "-inf"):
        return float(inner)
    if tag == "tuple" and isinstance(inner, list):
        return tuple(from_json(item) for item in inner)
    if tag in ("dict", "counter") and isinstance(inner, list):
        pairs = {from_json(key): from_json(item) for key, item in inner}
        return collections.Counter(pairs) if tag == "counter" else pairs
    raise ValueError(f"unknown tagged value {tag!r}")


def dump_json(value: Any, *, sort_keys: bool) -> bytes:
    """JSON without spaces, in ASCII; with sorted keys, equal values give equal bytes."""
    text = json.dumps(value, sort_keys=sort_keys, separators=(",", ":"), allow_nan=False)
    return text.encode("ascii")


def parse_json(data: bytes) -> Any:
    """Strict JSON: no NaN literals, no number beyond the range of a double, bounded depth.

    Raises:
        ValueError: not JSON, not UTF-8, a number that would be read as infinite, or nested too
            deeply.
    """

    def refuse(name: str) -> float:
        raise ValueError(f"{name} is not JSON")

    try:
        return json.loads(data.decode("utf-8"), parse_constant=refuse, parse_float=_finite)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"the number {text[:20]} is out of range")
    return number
