"""The plain values of a checkpoint, checked before a run goes on from them.

Checksums say that a `state.json` is the one that was written; they do not say by whom. Here every
value that a resumed run reads is held against the value that the run has in its place: the same
kind, a finite number, a count that is no less than 0. What cannot be told so is found by the part
that loads it, and is refused in the same words.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from rlhf_fast.data import EpochSampler
from rlhf_fast.distributed import (
    Checkpoint,
    load_optimizer_state,
    load_scheduler_state,
    rng_state,
    scheduler_state,
)
from rlhf_fast.distributed.checkpoint_directory import STATE_NAME
from rlhf_fast.distributed.manifest import corrupt
from rlhf_fast.optim import GuardedOptimizer

_MAX_COUNT = 2**63
# What loading plain values of another kind can end in.
_FAULTS = (KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError)
# Of an optimizer's options: bookkeeping, and how a step is carried out, which the run decides.
_NOT_READ = frozenset({"params", "param_names", "foreach", "fused"})
# Bounds that the kind of a value does not tell.
_LEAST = {"coef": 0.0, "m2": 0.0, "tokens": 1}
_WORDS_OF_NUMPY = 624


class Part(Protocol):
    """Something whose plain values a checkpoint holds."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


@contextmanager
def refusing(checkpoint: Checkpoint, part: str, *more: type[Exception]) -> Iterator[None]:
    """Turn what a part of the run meets in values of another kind into RF8001, with its name.

    Args:
        checkpoint: named in the error.
        part: what is loaded in the block.
        more: further errors that mean the same there.

    Raises:
        CheckpointError: RF8001.
    """
    faults: tuple[type[Exception], ...] = (*_FAULTS, *more)
    try:
        yield
    except faults as error:
        reason = f"lacks {error}" if isinstance(error, KeyError) else f"cannot be used: {error}"
        raise corrupt(f"the saved state of the {part} {reason}", _file(checkpoint)) from error


def load_part(
    checkpoint: Checkpoint, part: Part, saved: Mapping[str, Any], name: str = "learner"
) -> None:
    """`part.load_state_dict(saved)`, once its values are found to be of the part's kinds.

    Args:
        checkpoint: where they are from.
        part: unchanged if they are refused before it loads them.
        saved: as its `state_dict` returned them.
        name: of the part, in messages.

    Raises:
        CheckpointError: RF8001, with the name of what is wrong.
    """
    _refuse(checkpoint, difference(saved, part.state_dict(), name))
    with refusing(checkpoint, name):
        part.load_state_dict(saved)


def load_optimizer(checkpoint: Checkpoint, name: str, guarded: GuardedOptimizer) -> None:
    """Put an optimizer, its schedule and its count of bad steps back to a checked state.

    Raises:
        CheckpointError: of another optimizer (RF8005), or of another kind (RF8001).
    """
    entry = checkpoint.state["optimizers"][name]
    with refusing(checkpoint, f"optimizer of the {name}"):
        load_optimizer_state(
            guarded.optimizer,
            guarded.named_parameters,
            checkpoint.tensors[f"{name}_optimizer"],
            entry["optimizer"],
            guarded.whole_parameters,
        )
        load_scheduler_state(guarded.scheduler, entry["scheduler"])
        guarded.follow_schedule()
        guarded.bad_steps = entry["bad_steps"]


def check_saved_state(
    checkpoint: Checkpoint,
    modules: Mapping[str, nn.Module],
    optimizers: Mapping[str, GuardedOptimizer],
    samplers: Mapping[str, EpochSampler],
) -> None:
    """Check what `save_training_state` wrote, against the parts that are to load it.

    Every rank reads the same file, so all of them refuse it or none.

    Raises:
        CheckpointError: RF8001, with the name of what is wrong; nothing is changed.
    """
    _refuse(checkpoint, _first(_problems(checkpoint, modules, optimizers, samplers)))


def _problems(
    checkpoint: Checkpoint,
    modules: Mapping[str, nn.Module],
    optimizers: Mapping[str, GuardedOptimizer],
    samplers: Mapping[str, EpochSampler],
) -> Iterator[str | None]:
    saved = checkpoint.state
    expected = {
        "step": 0,
        "aliases": {name: {} for name in modules},
        "optimizers": {name: {} for name in optimizers},
        "rng": {},
        "samplers": {name: {} for name in samplers},
        "metrics_position": 0,
        "extra": {},
    }
    yield difference(saved, expected, "state", complete=True)
    if saved["step"] != checkpoint.step:
        yield f"state.step is {saved['step']}, the checkpoint is of step {checkpoint.step}"
    groups = [*modules, *(f"{name}_optimizer" for name in optimizers), "rng"]
    yield _first(f"it has no tensors of {g}" for g in groups if g not in checkpoint.tensors)
    for name in modules:
        yield _not_texts(saved["aliases"][name], f"state.aliases.{name}")
    yield _not_texts(saved.get("frozen", {}), "state.frozen")
    for name, guarded in optimizers.items():
        where = f"state.optimizers.{name}"
        entry = saved["optimizers"][name]
        live = {
            "bad_steps": 0,
            "optimizer": {"optimizer": "", "groups": [], "parameters": {}},
            "scheduler": {},
        }
        yield difference(entry, live, where, complete=True)
        scheduler = scheduler_state(guarded.scheduler)
        yield difference(entry["scheduler"], scheduler, f"{where}.scheduler")
        stored = checkpoint.tensors[f"{name}_optimizer"].entries
        yield _optimizer_problem(entry["optimizer"], guarded, stored, where)
    _, generators = rng_state()
    yield difference(saved["rng"], generators, "state.rng")
    yield _generator_problem(saved["rng"])


def _optimizer_problem(
    saved: Mapping[str, Any], guarded: GuardedOptimizer, stored: Mapping[str, Any], where: str
) -> str | None:
    """Of groups and parameters; that they are those of the optimizer is for it to find out."""
    live = guarded.optimizer.param_groups
    shapes = {name: tuple(p.shape) for name, p in guarded.whole_parameters}
    return _first(
        _group_problem(entry, live[i] if i < len(live) else {}, f"{where}.groups[{i}]")
        for i, entry in enumerate(saved["groups"])
    ) or _first(
        _moments_problem(name, entry, shapes, stored, f"{where}.parameters.{name}")
        for name, entry in saved["parameters"].items()
    )


def _group_problem(saved: Any, group: Mapping[str, Any], where: str) -> str | None:
    options = {key: value for key, value in group.items() if key not in _NOT_READ}
    problem = difference(saved, {"params": [""], "options": {}}, where, complete=True)
    return problem or difference(saved["options"], options, f"{where}.options")


def _moments_problem(
    name: str,
    saved: Any,
    shapes: Mapping[str, tuple[int, ...]],
    stored: Mapping[str, Any],
    where: str,
) -> str | None:
    problem = difference(saved, {"tensors": [""], "values": {}}, where, complete=True)
    if problem or name not in shapes:
        return problem
    for slot, shape in {"step": (), "exp_avg": shapes[name], "exp_avg_sq": shapes[name]}.items():
        found = stored.get(f"{name}/{slot}")
        if slot not in saved["tensors"] or found is None:
            return f"{where} has no {slot}"
        if tuple(found.shape) != shape:
            return f"{where}.{slot} has shape {list(found.shape)}, not {list(shape)}"
    return None


def _generator_problem(saved: Mapping[str, Any]) -> str | None:
    """What the generators themselves would take, and draw nonsense from."""
    gauss = saved.get("python", {}).get("gauss")
    if gauss is not None and not _is_number(gauss):
        return f"state.rng.python.gauss is {_shown(gauss)}"
    position = saved.get("numpy", {}).get("state", {}).get("pos", 0)
    if position > _WORDS_OF_NUMPY:
        return f"state.rng.numpy.state.pos is {position}"
    return None


def difference(saved: Any, live: Any, where: str, *, complete: bool = False) -> str | None:
    """What is wrong with saved values that are to take the place of live ones; None if nothing is.

    Args:
        saved: of a file.
        live: a tree of plain values of the same kinds; None in it, and what is no plain value,
            stands for anything. Of lists the saved one may be longer or shorter.
        where: the name of the tree.
        complete: every key of the live dictionaries must be there. Else a saved one may lack some,
            which is for the part that loads it to accept or not.
    """
    if isinstance(live, dict):
        return _difference_of_dicts(saved, live, where, complete)
    if isinstance(live, list | tuple):
        if type(saved) is not type(live):
            return f"{where} is {_shown(saved)}, not a {type(live).__name__}"
        if isinstance(live, tuple) and len(saved) != len(live):
            return f"{where} has {len(saved)} values, not {len(live)}"
        like = live if isinstance(live, tuple) else [live[0] if live else None] * len(saved)
        return _first(
            difference(value, kind, f"{where}[{i}]", complete=complete)
            for i, (value, kind) in enumerate(zip(saved, like, strict=True))
        )
    return _difference_of_values(saved, live, where)


def _difference_of_dicts(
    saved: Any, live: Mapping[str, Any], where: str, complete: bool
) -> str | None:
    if not isinstance(saved, dict):
        return f"{where} is {_shown(saved)}, not a dictionary"
    missing = [key for key in live if key not in saved]
    if missing and complete:
        return f"{where} lacks {missing[0]}"
    return _first(
        difference(saved[key], kind, f"{where}.{key}", complete=complete)
        for key, kind in live.items()
        if key in saved
    )


def _difference_of_values(saved: Any, live: Any, where: str) -> str | None:
    name = where.rpartition(".")[2]
    if isinstance(live, bool):
        wrong = not isinstance(saved, bool)
    elif isinstance(live, int):
        whole = isinstance(saved, int) and not isinstance(saved, bool)
        wrong = not whole or not _LEAST.get(name, 0) <= saved < _MAX_COUNT
    elif isinstance(live, float):
        wrong = not _is_number(saved) or saved < _LEAST.get(name, -math.inf)
    elif isinstance(live, str):
        wrong = not isinstance(saved, str)
    else:
        wrong = isinstance(saved, float) and not math.isfinite(saved)
    return f"{where} is {_shown(saved)}" if wrong else None


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) < _MAX_COUNT if isinstance(value, int) else math.isfinite(value)


def _not_texts(saved: Any, where: str) -> str | None:
    if isinstance(saved, dict) and all(isinstance(t, str) for pair in saved.items() for t in pair):
        return None
    return f"{where} does not map names to texts"


def _first(problems: Iterable[str | None]) -> str | None:
    return next((problem for problem in problems if problem), None)


def _shown(value: Any) -> str:
    if isinstance(value, int | float | str) or value is None:
        return repr(value)[:40]
    return f"a {type(value).__name__}"


def _refuse(checkpoint: Checkpoint, problem: str | None) -> None:
    if problem:
        raise corrupt(
            f"{STATE_NAME} is not a saved state of this run: {problem}", _file(checkpoint)
        )


def _file(checkpoint: Checkpoint) -> Path:
    return checkpoint.path / STATE_NAME
