"""A user's Python function as a reward: call it, check what it returns, blame the right line."""

from __future__ import annotations

import importlib.util
import inspect
import logging
import os
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Mapping, Set
from pathlib import Path
from typing import Any, Literal

import torch

from rlhf_fast.errors import RewardError
from rlhf_fast.models.rewards import spread_to_tokens
from rlhf_fast.protocols import RewardOutput
from rlhf_fast.types import Rollout

logger = logging.getLogger(__name__)

RewardFunction = Callable[..., Any]
OnError = Literal["fail", "abstain"]

_FLOAT32_MAX = torch.finfo(torch.float32).max


class FunctionReward:
    """Scores texts with a Python function.

    The function is called once per rollout with keyword arguments `prompts` and `completions`,
    lists of S strings, `completion_ids`, S lists of token ids, and one list of S values for every
    further column of the data; what its signature does not name is left out. It returns S values: a
    number per completion, None to abstain (the row takes no part in the losses, which is not the
    same as a score of 0), or a list of numbers, one for each response token, EOS included.

    Args:
        function: as above.
        tokenizer: decodes responses, special tokens left out.
        on_error: an exception, a timeout or an unusable value stops the run ("fail"), or makes the
            rows concerned abstain and is logged ("abstain"). A wrong number of values always
            fails: nothing says which row each belongs to.
        timeout_s: seconds one call may take; None is no limit. The function then runs in a thread
            of its own, which cannot be ended and is left behind.
    """

    def __init__(
        self,
        function: RewardFunction,
        tokenizer: Any,
        *,
        on_error: OnError = "fail",
        timeout_s: float | None = None,
    ) -> None:
        self.function = function
        self.tokenizer = tokenizer
        self.on_error = on_error
        self.timeout_s = timeout_s
        self.place = _place_of(function)

    def score(self, rollout: Rollout) -> RewardOutput:
        """Scores [S], or [S, R] if any row is per token, and which rows were scored.

        In a per-token result a plain number lands on the last response token.

        Raises:
            RewardError: naming row, value and the function's file and line.
        """
        if len(rollout) == 0:
            return RewardOutput(torch.zeros(0), torch.zeros(0, dtype=torch.bool))
        try:
            returned = self._call(self._arguments(rollout))
        except RewardError as error:
            if self.on_error == "fail":
                raise
            logger.warning("all %d rows abstain: %s", len(rollout), error)
            returned = [None] * len(rollout)
        values = self._values(returned, len(rollout))
        lengths = rollout.lengths.tolist()
        rows = [self._row(s, v, n) for s, (v, n) in enumerate(zip(values, lengths, strict=True))]
        return _to_output(rows, rollout)

    def _arguments(self, rollout: Rollout) -> dict[str, Any]:
        repeat = rollout.samples_per_prompt
        rows: list[Mapping[str, Any]] = [r for r in rollout.prompts.rows for _ in range(repeat)]
        columns = list(dict.fromkeys(name for row in rollout.prompts.rows for name in row))
        clash = {"prompts", "completions", "completion_ids"} & set(columns)
        if clash:
            raise RewardError(
                "RF5002",
                f"the data has columns called {sorted(clash)}, which are arguments of every reward",
                where=self.place,
                remedy="rename the columns",
            )
        arguments: dict[str, Any] = {
            "prompts": [t for t in rollout.prompts.texts for _ in range(repeat)],
            "completions": completion_texts(rollout, self.tokenizer),
            "completion_ids": rollout.response_ids(),
            **{name: [row.get(name) for row in rows] for name in columns},
        }
        accepted = _accepted_names(self.function)
        return {k: v for k, v in arguments.items() if accepted is None or k in accepted}

    def _call(self, arguments: dict[str, Any]) -> Any:
        if self.timeout_s is None:
            return self._guarded(arguments)
        box: list[Any] = []

        def run() -> None:
            try:
                box.append(self._guarded(arguments))
            except RewardError as error:
                box.append(error)

        thread = threading.Thread(target=run, name="reward function", daemon=True)
        thread.start()
        thread.join(self.timeout_s)
        if not box:
            raise RewardError(
                "RF5003",
                f"the reward function did not return within {self.timeout_s} s",
                where=self.place,
                remedy="make it faster, or raise its time limit",
            )
        if isinstance(box[0], RewardError):
            raise box[0]
        return box[0]

    def _guarded(self, arguments: dict[str, Any]) -> Any:
        try:
            return _listed(self.function(**arguments))
        except (Exception, SystemExit) as error:
            raise RewardError(
                "RF5004",
                f"the reward function raised {type(error).__name__}: {error}",
                where=_raised_at(error, self.function) or self.place,
                remedy="mend the function, or set on_error to abstain",
            ) from error

    def _values(self, returned: Any, rows: int) -> list[Any]:
        values = returned if isinstance(returned, list) else None
        if values is None or len(values) != rows:
            found = type(returned).__name__ if values is None else f"{len(values)} values"
            raise RewardError(
                "RF5005",
                f"the reward function returned {found}",
                where=self.place,
                expected=f"a list of {rows} values, one per completion",
                remedy="return one value for every entry of `completions`",
            )
        return values

    def _row(self, row: int, value: Any, length: int) -> float | list[float] | None:
        try:
            return self._checked(row, value, length)
        except RewardError as error:
            if self.on_error == "fail":
                raise
            logger.warning("row %d abstains: %s", row, error)
            return None

    def _checked(self, row: int, value: Any, length: int) -> float | list[float] | None:
        if hasattr(value, "tolist"):
            value = value.tolist()
        if value is None:
            return None
        if not isinstance(value, list | tuple):
            return self._number(row, value)
        if len(value) != length:
            raise RewardError(
                "RF5006",
                f"row {row} has {len(value)} per-token scores for {length} response tokens",
                where=self.place,
                expected="one per response token, EOS included",
                remedy="return a single number if the score is for the whole completion",
            )
        return [self._number(row, v) for v in value]

    def _number(self, row: int, value: Any) -> float:
        if hasattr(value, "tolist"):
            value = value.tolist()
        # Written so that NaN fails the comparison.
        if isinstance(value, int | float) and abs(value) <= _FLOAT32_MAX:
            return float(value)
        raise RewardError(
            "RF5007",
            f"row {row} was scored {value!r}",
            where=self.place,
            expected="a finite number, None to abstain, or a list of numbers per token",
            remedy="return None for completions that cannot be scored",
        )


def _listed(returned: Any) -> Any:
    """A list of what was returned, if it is one by any name: a generator runs here, not later."""
    if hasattr(returned, "tolist"):  # a tensor on any device, a numpy array
        returned = returned.tolist()
    # A set has no order that would say whose value is whose.
    usable = isinstance(returned, Iterable) and not isinstance(
        returned, str | bytes | Mapping | Set
    )
    return list(returned) if usable else returned


def completion_texts(rollout: Rollout, tokenizer: Any) -> list[str]:
    """S response texts, special tokens left out."""
    return [
        tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        for ids in rollout.response_ids()
    ]


def _to_output(rows: list[float | list[float] | None], rollout: Rollout) -> RewardOutput:
    device = rollout.responses.device
    scored = torch.tensor([r is not None for r in rows], dtype=torch.bool, device=device)
    plain = [r if isinstance(r, float) else 0.0 for r in rows]
    scores = torch.tensor(plain, dtype=torch.float32, device=device)
    if not any(isinstance(r, list) for r in rows):
        return RewardOutput(scores, scored)
    spread = spread_to_tokens(scores, rollout.response_mask)
    for s, row in enumerate(rows):
        if isinstance(row, list):
            spread[s, : len(row)] = torch.tensor(row, dtype=torch.float32, device=device)
    # Tokens the policy did not choose cannot earn anything.
    return RewardOutput(torch.where(rollout.response_mask, spread, 0.0), scored)


def load_reward_function(spec: str) -> RewardFunction:
    """The function `name` of `file.py`, from "file.py:name".

    Raises:
        RewardError: the file is missing or fails when it is imported (naming its line), or has no
            callable of that name.
    """
    file_name, colon, name = spec.rpartition(":")
    file = Path(os.path.expanduser(file_name))
    if not colon or not name or file.suffix != ".py":
        raise RewardError(
            "RF5008",
            f"not a reward function: {spec!r}",
            where="reward.function",
            expected="file.py:name",
            remedy="name a Python file and a function in it",
        )
    if not file.is_file():
        raise RewardError(
            "RF5008",
            "no such reward file",
            where=str(file.absolute()),
            remedy="correct the path before the colon; it is relative to the working directory",
        )
    module = _import_file(file)
    function = getattr(module, name, None)
    if not callable(function):
        names = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        state = "is not callable" if hasattr(module, name) else "does not exist"
        raise RewardError(
            "RF5009",
            f"{name!r} {state} in the reward file",
            where=str(file),
            expected=f"one of {', '.join(names)}" if names else "a function",
            remedy="correct the name after the colon",
        )
    checked: RewardFunction = function
    return checked


def _import_file(file: Path) -> Any:
    module_name = f"rlhf_fast_reward_{file.stem}"
    spec = importlib.util.spec_from_file_location(module_name, file.absolute())
    assert spec is not None  # the suffix is .py
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses and pickling look a module up by its name.
    sys.modules[module_name] = module
    # A reward file may import its neighbours, as a script may.
    sys.path.insert(0, str(file.absolute().parent))
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # a script that parses arguments or leaves by exit
        del sys.modules[module_name]
        raise RewardError(
            "RF5010",
            f"the reward file cannot be imported: {type(error).__name__}: {error}",
            where=_line_in(error, str(file.absolute())) or str(file),
            remedy="run `python FILE` to see the failure by itself",
        ) from error
    finally:
        sys.path.remove(str(file.absolute().parent))
    return module


def _accepted_names(function: RewardFunction) -> set[str] | None:
    """Argument names the function takes; None if it takes any."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # some builtins have no signature
        return None
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
        return None
    return {p.name for p in parameters}


def _place_of(function: RewardFunction) -> str:
    """file:line of the function, or its name where it has no Python source."""
    target: Any = inspect.unwrap(function)
    if not hasattr(target, "__code__"):
        target = getattr(target, "func", None) or getattr(type(target), "__call__", target)  # noqa: B004
    code = getattr(target, "__code__", None)
    name = getattr(function, "__name__", type(function).__name__)
    return name if code is None else f"{code.co_filename}:{code.co_firstlineno} ({name})"


def _raised_at(error: BaseException, function: RewardFunction) -> str | None:
    code = getattr(inspect.unwrap(function), "__code__", None)
    return None if code is None else _line_in(error, code.co_filename)


def _line_in(error: BaseException, file: str) -> str | None:
    """file:line of the innermost frame of `error` in `file`."""
    if isinstance(error, SyntaxError) and error.filename == file:
        return f"{file}:{error.lineno}"
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == file]
    return f"{file}:{frames[-1].lineno}" if frames else None
