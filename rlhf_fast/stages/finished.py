"""What a finished run says of itself when its command is given again."""

from __future__ import annotations

import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeVar

from rlhf_fast.stages.run import COMPLETE_NAME, Run
from rlhf_fast.stages.run_files import read_json, unreadable
from rlhf_fast.stages.training import MODEL_NAME

# What an integer may be where a float is expected; JSON bounds it by nothing.
_MAX_INT = 2**63


class Result(Protocol):
    """What a stage returns."""

    def summary(self) -> str: ...


R = TypeVar("R", bound=Result)


def finished_summary(run: Run, kinds: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What `mark_complete` stored when the run finished.

    Args:
        run: already complete.
        kinds: type annotation of each value, of those that are there.

    Raises:
        CheckpointError: RF8206, it cannot be read, or a value is of another kind.
    """
    path = run.path / COMPLETE_NAME

    def read() -> dict[str, Any]:
        summary = (read_json(path) or {}).get("summary")
        if not isinstance(summary, dict):
            raise unreadable(path, "it holds no summary")
        for name, kind in (kinds or {}).items():
            if name in summary and not _is_a(summary[name], kind):
                shown = getattr(kind, "__name__", str(kind))
                raise unreadable(path, f"summary.{name} is {summary[name]!r:.40}, not {shown}")
        return summary

    return run.on_main(read)


def finished_result(run: Run, kind: Callable[..., R]) -> R:
    """What `mark_complete` stored of a finished run, as its result.

    Args:
        run: already complete.
        kind: a dataclass of plain values. The directories in it are those where the run lies now.

    Raises:
        CheckpointError: RF8206, it cannot be read, or has other fields or values of other kinds, as
            of another release.
    """
    summary = finished_summary(run, typing.get_type_hints(kind))
    here = {"output_dir": str(run.path), "model_dir": str(run.path / MODEL_NAME)}
    summary |= {name: place for name, place in here.items() if name in summary}
    try:
        result = kind(**summary)
        result.summary()  # takes figures that belong together, and fails where some are missing
    except (TypeError, ValueError, OverflowError) as error:
        raise unreadable(run.path / COMPLETE_NAME, str(error)) from error
    return result


def _is_a(value: Any, kind: Any) -> bool:
    if isinstance(kind, types.UnionType):
        return any(_is_a(value, one) for one in typing.get_args(kind))
    plain = typing.get_origin(kind) or kind
    if isinstance(value, bool) or plain is bool:
        return isinstance(value, bool) and plain is bool
    if isinstance(value, int) and not -_MAX_INT < value < _MAX_INT:
        return False
    return isinstance(value, int | float) if plain is float else isinstance(value, plain)
