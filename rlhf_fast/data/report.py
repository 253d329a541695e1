"""What happened to the rows of one data source: every row is kept or counted under a reason."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from rlhf_fast.errors import DataError

SHOWN_BAD_ROWS = 5


@dataclass
class DataReport:
    """Counts of one source; `read == kept + sum(filtered.values())` once loading has ended.

    Args:
        name: what the source is for, such as `train` or `eval`.
        source: the path, hub name or description it came from.
        read: rows found, unreadable ones included.
        kept: examples that remain.
        filtered: rows left out, by reason.
        ties: completions of kept or filtered rows left out because they tie with another.
        truncated: examples shortened, by the part that was cut (`prompt`, `response`).
        replaced_text: rows in which invalid text was replaced by U+FFFD because it was asked for.
        zero_weight: kept examples without a single label; they add exactly 0 to any loss.
        duplicates: kept examples whose tokens equal those of an earlier one.
        tokens: tokens of all kept examples.
        loss_tokens: tokens of kept examples that carry a loss.
        longest: tokens of the longest kept example.
        warnings: sentences for the person who starts the run.
        bad_rows: the first few unreadable rows, as `where: what`.
    """

    name: str
    source: str = ""
    read: int = 0
    kept: int = 0
    filtered: Counter[str] = field(default_factory=Counter)
    ties: int = 0
    truncated: Counter[str] = field(default_factory=Counter)
    replaced_text: int = 0
    zero_weight: int = 0
    duplicates: int = 0
    tokens: int = 0
    loss_tokens: int = 0
    longest: int = 0
    warnings: list[str] = field(default_factory=list)
    bad_rows: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """The report as plain lines: one summary, one for each non-zero count, then warnings."""
        out = [f"{self.name}: {self.kept} of {self.read} rows kept ({self.source})"]
        if self.kept:
            out.append(
                f"  tokens: {self.tokens}, with loss: {self.loss_tokens}, longest: {self.longest}"
            )
        out += [f"  left out, {reason}: {n}" for reason, n in sorted(self.filtered.items())]
        out += [f"  truncated {part}: {n}" for part, n in sorted(self.truncated.items())]
        counts = {
            "completions left out as ties": self.ties,
            "invalid text replaced": self.replaced_text,
            "without any label (weight 0)": self.zero_weight,
            "duplicates of an earlier row": self.duplicates,
        }
        out += [f"  {what}: {n}" for what, n in counts.items() if n]
        out += [f"  bad row {row}" for row in self.bad_rows]
        out += [f"  warning: {sentence}" for sentence in self.warnings]
        return out

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON-serialisable values."""
        return {
            "name": self.name,
            "source": self.source,
            "read": self.read,
            "kept": self.kept,
            "filtered": dict(sorted(self.filtered.items())),
            "ties": self.ties,
            "truncated": dict(sorted(self.truncated.items())),
            "replaced_text": self.replaced_text,
            "zero_weight": self.zero_weight,
            "duplicates": self.duplicates,
            "tokens": self.tokens,
            "loss_tokens": self.loss_tokens,
            "longest": self.longest,
            "warnings": list(self.warnings),
            "bad_rows": list(self.bad_rows),
        }


class BadRowPolicy:
    """Decides what an unusable row means: the end of loading, or one more in a bounded count.

    Args:
        on_bad_row: `error` raises the row's own error; `skip` counts it in the report.
        max_bad_rows: skipped rows that are tolerated; one more raises.
        report: where skipped rows are counted.
    """

    def __init__(self, on_bad_row: str, max_bad_rows: int, report: DataReport) -> None:
        self.on_bad_row = on_bad_row
        self.max_bad_rows = max_bad_rows
        self.report = report
        self.skipped = 0

    def reject(self, error: DataError) -> None:
        """Take note of one bad row.

        Raises:
            DataError: `error` itself under `error`; RF2013 once `max_bad_rows` is exceeded.
        """
        if self.on_bad_row == "error":
            raise error
        self.skipped += 1
        self.report.filtered["bad row"] += 1
        if len(self.report.bad_rows) < SHOWN_BAD_ROWS:
            self.report.bad_rows.append(f"{error.where}: {error.what}")
        if self.skipped > self.max_bad_rows:
            shown = "; ".join(self.report.bad_rows)
            raise DataError(
                "RF2013",
                f"more than {self.max_bad_rows} bad rows; the first: {shown}",
                where=error.where,
                expected=f"at most data.max_bad_rows={self.max_bad_rows} skipped rows",
                remedy="repair the rows named here, or raise data.max_bad_rows",
            ) from error
