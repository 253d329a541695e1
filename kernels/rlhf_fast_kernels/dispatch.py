"""The single place that picks an implementation for an op, and says why.

An implementation joins with one call:

    register("gae", "cpu", function, native.on_cpu("gae"), dtypes=(torch.float32, torch.bfloat16))

and a call picks with another:

    choice = choose("gae", impl, rewards, values)      # impl: argument of the caller, or None
    return choice.function(...)

Order of precedence: the argument `impl=`, the environment variable RLHF_FAST_OPS, and otherwise the
registered implementation of highest preference that can run. RLHF_FAST_OPS holds one name for all
ops (`auto`, `reference`, `cpu`, `cuda`, `triton`), names per op (`gae=reference,ppo_loss=cpu`), or
both (`reference,gae=cpu`). Who names an implementation gets it or a RuntimeError, never another.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

import torch

IMPLEMENTATIONS = ("triton", "cuda", "cpu", "reference")
ENVIRONMENT = "RLHF_FAST_OPS"
# The default preference: a launch of CUDA C++ costs 2 to 5 us, one of Triton 6 to 13 us, which
# decides for ops on [tokens]. An op on [tokens, vocab] may register Triton above CUDA.
PREFERENCES = {"cuda": 3, "triton": 2, "cpu": 1, "reference": 0}
# After the reference: chosen by name alone, and not part of the self-test.
BY_NAME_ONLY = -1
# Against the reference on the same inputs, relative to 1 + |reference|: fp32 sums in another order.
SELFTEST_TOLERANCE = 2e-4


class Choice(NamedTuple):
    """What runs, and why that."""

    impl: str
    reason: str
    function: Callable[..., Any]


class ReportRow(NamedTuple):
    """One op on one kind of device, for `rlhf-fast env`."""

    op: str
    device: str
    impl: str
    reason: str
    unavailable: dict[str, str]


class SelftestRow(NamedTuple):
    """One implementation of one op against the reference, for `rlhf-fast check --ops`."""

    op: str
    impl: str
    device: str
    dtype: str
    max_error: float
    ok: bool
    note: str


@dataclass(frozen=True)
class _Implementation:
    function: Callable[..., Any]
    available: Callable[[torch.device], str | None]
    dtypes: frozenset[torch.dtype] | None
    preference: int

    def problem(self, device: torch.device, dtypes: Iterable[torch.dtype]) -> str | None:
        foreign = sorted(str(d) for d in dtypes if self.dtypes is not None and d not in self.dtypes)
        if foreign:
            known = ", ".join(sorted(str(d) for d in self.dtypes or ()))
            return f"takes {known}, not {', '.join(foreign)}"
        return self.available(device)


# A case draws inputs and returns run(impl) -> outputs (gradients included, if the op has any).
SelftestRun = Callable[[str], tuple[torch.Tensor, ...]]
SelftestCase = Callable[[torch.device, torch.dtype, torch.Generator], SelftestRun]


@dataclass
class _Op:
    implementations: dict[str, _Implementation] = field(default_factory=dict)
    selftest: SelftestCase | None = None


_ops: dict[str, _Op] = {}


def always(_device: torch.device) -> str | None:
    """Availability of the reference: wherever PyTorch runs."""
    return None


def register(
    op: str,
    impl: str,
    function: Callable[..., Any],
    available: Callable[[torch.device], str | None] = always,
    *,
    dtypes: Iterable[torch.dtype] | None = None,
    preference: int | None = None,
) -> None:
    """Add an implementation of an op.

    Args:
        op: name of the op, the same in every language.
        impl: one of IMPLEMENTATIONS.
        function: what `Choice.function` will be; all implementations of an op take the same
            arguments.
        available: None if it can run on the device, otherwise why not. Asked once per device.
        dtypes: floating-point dtypes that it reads; None for all.
        preference: higher is chosen first; default PREFERENCES.
    """
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl must be one of {', '.join(IMPLEMENTATIONS)}, got {impl!r}")
    rank = PREFERENCES[impl] if preference is None else preference
    accepted = None if dtypes is None else frozenset(dtypes)
    entry = _ops.setdefault(op, _Op())
    entry.implementations[impl] = _Implementation(function, available, accepted, rank)
    _choose.cache_clear()


def register_selftest(op: str, case: SelftestCase) -> None:
    """Set how `selftest` exercises an op."""
    _ops.setdefault(op, _Op()).selftest = case


def ops() -> tuple[str, ...]:
    """Names of all ops."""
    return tuple(sorted(_ops))


# ---- choosing -----------------------------------------------------------------------------------


def choose(op: str, impl: str | None, *tensors: torch.Tensor) -> Choice:
    """The implementation that serves this call.

    Args:
        op: a registered op.
        impl: the caller's wish: a name of IMPLEMENTATIONS, `"auto"`, or None to let RLHF_FAST_OPS
            decide.
        tensors: inputs; the first one's device and every floating-point dtype count.

    Raises:
        ValueError: unknown name in `impl` or in RLHF_FAST_OPS.
        RuntimeError: the implementation asked for cannot run here; names op, implementation and
            reason.
    """
    dtypes = frozenset([x.dtype for x in tensors if x.dtype.is_floating_point])
    return _choose(op, impl, os.environ.get(ENVIRONMENT, ""), tensors[0].device, dtypes)


@lru_cache(maxsize=1024)
def _choose(
    op: str,
    impl: str | None,
    environment: str,
    device: torch.device,
    dtypes: frozenset[torch.dtype],
) -> Choice:
    wish, source = _wish(op, impl, environment)
    candidates = _ops[op].implementations
    if wish == "auto":
        return _best(candidates, device, dtypes)
    if wish not in candidates:
        problem: str | None = "this op has no such implementation"
    else:
        problem = candidates[wish].problem(device, dtypes)
    if problem is not None:
        raise RuntimeError(f"{op}: implementation {wish!r} ({source}) cannot run: {problem}")
    return Choice(wish, source, candidates[wish].function)


def _best(
    candidates: dict[str, _Implementation], device: torch.device, dtypes: frozenset[torch.dtype]
) -> Choice:
    for name, entry in sorted(candidates.items(), key=lambda item: -item[1].preference):
        if entry.problem(device, dtypes) is None:
            return Choice(name, "preferred of those that can run", entry.function)
    raise RuntimeError(f"no implementation runs on {device}")


def _wish(op: str, impl: str | None, environment: str) -> tuple[str, str]:
    """(name or "auto", where it was said)."""
    if impl is not None:
        _check_name(impl, "impl")
        return impl, "argument impl"
    by_op = parse_environment(environment)
    name = by_op.get(op, by_op[""])
    return name, f"{ENVIRONMENT}={environment}" if environment else "default"


def parse_environment(text: str) -> dict[str, str]:
    """RLHF_FAST_OPS as {op: name}; the key "" holds what applies to all other ops."""
    chosen = {"": "auto"}
    for entry in filter(None, (part.strip() for part in text.split(","))):
        op, equals, name = (piece.strip() for piece in entry.rpartition("="))
        if equals and op not in _ops:
            raise ValueError(f"{ENVIRONMENT}={text!r}: no op {op!r}; ops are {', '.join(ops())}")
        _check_name(name, f"{ENVIRONMENT}={text!r}")
        chosen[op] = name
    return chosen


def _check_name(name: str, where: str) -> None:
    if name not in (*IMPLEMENTATIONS, "auto"):
        raise ValueError(
            f"{where}: no implementation {name!r}; choices are auto, {', '.join(IMPLEMENTATIONS)}"
        )


# ---- telling ------------------------------------------------------------------------------------


def devices() -> list[torch.device]:
    """The kinds of device on this machine that ops may be asked for."""
    found = [torch.device("cpu")]
    if torch.cuda.is_available():
        found.append(torch.device("cuda", 0))
    return found


def report() -> list[ReportRow]:
    """Per op and kind of device: what would run for fp32 inputs now, and why the others cannot."""
    rows = []
    environment = os.environ.get(ENVIRONMENT, "")
    for op in ops():
        for device in devices():
            problems = {
                name: entry.problem(device, ()) for name, entry in _ops[op].implementations.items()
            }
            try:
                choice = _choose(op, None, environment, device, frozenset({torch.float32}))
                impl, reason = choice.impl, choice.reason
            except (ValueError, RuntimeError) as error:
                impl, reason = "none", str(error)
            unavailable = {name: problem for name, problem in problems.items() if problem}
            rows.append(ReportRow(op, device.type, impl, reason, unavailable))
    return rows


def selftest(seed: int = 0) -> list[SelftestRow]:
    """Run every available implementation of every op against the reference on this machine.

    Returns:
        One row per op, implementation, device and dtype; `max_error` is relative to
        1 + |reference|. An implementation that raises has `ok` False and the message in `note`.
    """
    rows = []
    for op in ops():
        case = _ops[op].selftest
        if case is None:
            continue
        for impl, entry in sorted(_ops[op].implementations.items()):
            for device in devices():
                for dtype in (torch.float32, torch.bfloat16):
                    runs = entry.problem(device, (dtype,)) is None
                    if runs and impl != "reference" and entry.preference > BY_NAME_ONLY:
                        rows.append(_selftest_row(op, impl, device, dtype, case, seed))
    return rows


def _selftest_row(
    op: str, impl: str, device: torch.device, dtype: torch.dtype, case: SelftestCase, seed: int
) -> SelftestRow:
    name = str(dtype).removeprefix("torch.")
    try:
        run = case(device, dtype, torch.Generator().manual_seed(seed))
        error = _largest_error(run(impl), run("reference"))
    except Exception as problem:  # any failure of a kernel is a result here
        return SelftestRow(op, impl, device.type, name, float("inf"), False, str(problem))
    return SelftestRow(op, impl, device.type, name, error, error <= SELFTEST_TOLERANCE, "")


def _largest_error(got: tuple[torch.Tensor, ...], want: tuple[torch.Tensor, ...]) -> float:
    worst = 0.0
    for x, y in zip(got, want, strict=True):
        difference = (x.double() - y.double()).abs() / (1 + y.double().abs())
        if difference.numel():
            worst = max(worst, float(difference.nan_to_num(nan=float("inf")).max()))
    return worst
