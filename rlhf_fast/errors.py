"""One message per user mistake: code, what, where, what was expected, what to do.

The command line prints `str(error)` and leaves with `error.exit_code`; a traceback appears only
with `--debug`. Library users catch `RLHFError` or one of its kinds. Codes are stable:
`docs/errors.md` lists them, and a test holds that list against the source.

    RF1xxx config and command line    RF2xxx data                  RF3xxx models and tokenizers
    RF4xxx generation                 RF5xxx rewards               RF6xxx numerics
    RF7xxx environment                RF8xxx run directory, checkpoint and resume
"""

from __future__ import annotations

from typing import Any

EXIT_OK = 0
EXIT_USAGE = 2
EXIT_ENVIRONMENT = 3
EXIT_NUMERICAL = 4
EXIT_PREEMPTED = 75
EXIT_INTERRUPTED = 130


class RLHFError(Exception):
    """A mistake or a fault that the user can act on.

    Args:
        code: stable identifier, `RF` and four digits; its first digit names the family above.
        what: what is wrong, one sentence without a full stop.
        where: the place: `file:line`, config key, data row, tensor name. Empty if there is none.
        expected: what would have been right. Empty if `what` says it already.
        remedy: what to do now.
    """

    exit_code = EXIT_USAGE
    # The rank that had it says so; of another rank, which was told of it, nobody needs to hear.
    of_another_rank = False

    def __init__(
        self, code: str, what: str, *, where: str = "", expected: str = "", remedy: str = ""
    ) -> None:
        super().__init__(code, what, where, expected, remedy)
        self.code = code
        self.what = what
        self.where = where
        self.expected = expected
        self.remedy = remedy

    def __reduce__(self) -> tuple[Any, ...]:
        # Errors cross processes, and what pickle does by itself takes positional arguments alone.
        return _restored, (type(self), self.args, vars(self))

    def __str__(self) -> str:
        lines = [f"{self.code}: {self.what}"]
        if self.where:
            lines.append(f"  where:    {self.where}")
        if self.expected:
            lines.append(f"  expected: {self.expected}")
        if self.remedy:
            lines.append(f"  to do:    {self.remedy}")
        return "\n".join(lines)


def _restored(kind: type[RLHFError], args: tuple[Any, ...], state: dict[str, Any]) -> RLHFError:
    error = kind.__new__(kind, *args)
    vars(error).update(state)
    return error


class ConfigError(RLHFError):
    """A config key, value or combination of values (RF1xxx)."""


class DataError(RLHFError):
    """A data file, row or column (RF2xxx)."""


class ModelError(RLHFError):
    """A model directory, weight or tokenizer (RF3xxx)."""


class GenerationError(RLHFError):
    """A rollout that cannot be produced (RF4xxx)."""


class DivergedGeneration(GenerationError):
    """Logits that are no distribution: the weights or the forward have diverged (RF4010)."""

    exit_code = EXIT_NUMERICAL


class RewardError(RLHFError):
    """A reward model or reward function (RF5xxx)."""


class NumericalError(RLHFError):
    """NaN, Inf or divergence that ended a run (RF6xxx)."""

    exit_code = EXIT_NUMERICAL


class EnvironmentFault(RLHFError):
    """The machine: device, disk, permissions, missing optional package (RF7xxx)."""

    exit_code = EXIT_ENVIRONMENT


class LoneOutOfMemory(EnvironmentFault):
    """Memory ran out on one rank in work that the others cannot finish without it (RF7063)."""


class CheckpointError(RLHFError):
    """Run directory, checkpoint, resume (RF8xxx)."""


class Preempted(RLHFError):
    """SIGTERM arrived and a good checkpoint has been written (RF8xxx)."""

    exit_code = EXIT_PREEMPTED


class StoppedEarly(Preempted):
    """SIGTERM arrived before there was a run that could be saved (RF8303)."""


class Interrupted(RLHFError):
    """Ctrl-C arrived and a good checkpoint has been written (RF8xxx)."""

    exit_code = EXIT_INTERRUPTED


class PeerError(RLHFError):
    """Another rank of the run has raised, and says why; this one leaves without a word (RF7059).

    Args:
        exit_code: of the other rank's error.
    """

    def __init__(self, exit_code: int) -> None:
        super().__init__("RF7059", "another rank of the run failed")
        self.exit_code = exit_code
