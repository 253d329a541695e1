"""A data source in, examples and a report out: what the stages and `rlhf-fast check` call."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from rlhf_fast.data.encoding import TextEncoder
from rlhf_fast.data.examples import (
    OVERLONG,
    ExampleBuilder,
    LoadOptions,
    PreferenceExample,
    PromptExample,
    SFTExample,
)
from rlhf_fast.data.formats import parse_prompt, parse_sft
from rlhf_fast.data.preferences import parse_preference
from rlhf_fast.data.readers import RowSource, read_rows
from rlhf_fast.data.report import BadRowPolicy, DataReport
from rlhf_fast.data.rows import Row, fingerprint_rows
from rlhf_fast.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

E = TypeVar("E", SFTExample, PreferenceExample, PromptExample)


@dataclass(frozen=True)
class LoadedData(Generic[E]):
    """Examples of one source.

    Args:
        examples: what was kept, in the order of the source.
        report: what was read, kept and left out.
        fingerprint: sha256 (hex) of the examples in order; tokens, masks, margins, columns.
    """

    examples: tuple[E, ...]
    report: DataReport
    fingerprint: str

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> E:
        return self.examples[index]


def load_sft(
    source: RowSource,
    tokenizer: PreTrainedTokenizerBase,
    options: LoadOptions | None = None,
    *,
    split: str = "train",
    name: str = "train",
) -> LoadedData[SFTExample]:
    """Sequences to imitate, from `messages`, `prompt` + `completion` or `text`.

    Args:
        source: path, hub name or rows in memory, see `read_rows`.
        tokenizer: a Hugging Face tokenizer with an EOS token.
        options: lengths and policies; None for the defaults.
        split: split of a hub name or dataset dictionary.
        name: what the data is for, in the report.

    Raises:
        DataError: RF20xx for the source and its rows.
        ModelError: RF3040 if the tokenizer has no EOS token.
        EnvironmentFault: RF7020 if `datasets` is needed and missing.
    """
    loader = _Loader(tokenizer, options or LoadOptions(), name)
    return loader.load(source, split, lambda row: loader.builder.sft(parse_sft(row)), _count_sft)


def load_preferences(
    source: RowSource,
    tokenizer: PreTrainedTokenizerBase,
    options: LoadOptions | None = None,
    *,
    split: str = "train",
    name: str = "train",
) -> LoadedData[PreferenceExample]:
    """Ranked completions, from `chosen` + `rejected` or `completions`. Arguments as `load_sft`.

    Raises:
        DataError: RF20xx; RF2028 if more than `options.max_identical` of the rows compare equals.
        ModelError: RF3040 if the tokenizer has no EOS token.
        EnvironmentFault: RF7020 if `datasets` is needed and missing.
    """
    options = options or LoadOptions()
    loader = _Loader(tokenizer, options, name)
    report = loader.report

    def build(row: Row) -> PreferenceExample | None:
        record = parse_preference(row)
        report.ties += record.ties
        return loader.builder.preference(record)

    def at_end() -> None:
        identical = report.filtered["identical completions"]
        usable = report.read - report.filtered["bad row"]
        if identical > options.max_identical * usable:
            raise _too_many_identical(report, identical, usable, options.max_identical)

    return loader.load(source, split, build, _count_preference, at_end)


def load_prompts(
    source: RowSource,
    tokenizer: PreTrainedTokenizerBase,
    options: LoadOptions | None = None,
    *,
    split: str = "train",
    name: str = "train",
) -> LoadedData[PromptExample]:
    """Prompts to answer, from `prompt`; other columns are kept. Arguments as `load_sft`.

    Raises:
        DataError: RF20xx for the source and its rows.
        ModelError: RF3040 if the tokenizer has no EOS token.
        EnvironmentFault: RF7020 if `datasets` is needed and missing.
    """
    loader = _Loader(tokenizer, options or LoadOptions(), name)
    return loader.load(
        source, split, lambda row: loader.builder.prompt(parse_prompt(row)), _count_prompt
    )


def warn_overlap(train: LoadedData[E], evaluation: LoadedData[E]) -> int:
    """Count evaluation examples that also occur in training, and warn in the report if any do."""
    seen = {example.key for example in train.examples}
    shared = sum(example.key in seen for example in evaluation.examples)
    if shared:
        evaluation.report.warnings.append(
            f"{shared} of {len(evaluation)} evaluation rows also occur in the training data; "
            "figures on them say nothing about new data"
        )
    return shared


class _Loader:
    def __init__(self, tokenizer: PreTrainedTokenizerBase, options: LoadOptions, name: str) -> None:
        self.options = options
        self.report = DataReport(name)
        self.builder = ExampleBuilder(
            TextEncoder(tokenizer, options.stop_ids), options, self.report
        )
        self.policy = BadRowPolicy(options.on_bad_row, options.max_bad_rows, self.report)

    def load(
        self,
        source: RowSource,
        split: str,
        build: Callable[[Row], E | None],
        count: Callable[[DataReport, E], None],
        at_end: Callable[[], None] | None = None,
    ) -> LoadedData[E]:
        report, examples, seen = self.report, [], set()
        digest = hashlib.sha256()
        rows = read_rows(
            source,
            self.policy,
            split=split,
            max_row_bytes=self.options.max_row_bytes,
            replace_invalid_text=self.options.replace_invalid_text,
        )
        for row in rows:
            try:
                example = build(_renamed(row, self.options.columns))
            except DataError as error:
                if error.code == OVERLONG:  # the row is sound: `overlong` says what it means
                    raise
                self.policy.reject(error)
                continue
            if example is None:
                continue
            examples.append(example)
            key = example.key
            report.duplicates += key in seen
            seen.add(key)
            digest.update(_fingerprint_part(example))
            count(report, example)
        report.kept = len(examples)
        if at_end is not None:
            at_end()
        if not examples:
            raise _nothing_left(report)
        return LoadedData(tuple(examples), report, digest.hexdigest())


def _fingerprint_part(example: SFTExample | PreferenceExample | PromptExample) -> bytes:
    """What of an example a resumed run must find unchanged; a prompt's columns feed rewards."""
    if isinstance(example, PromptExample):
        return example.key + fingerprint_rows([example.row]).encode("ascii")
    return example.key


def _renamed(row: Row, columns: Mapping[str, str] | None) -> Row:
    if not columns:
        return row
    taken = {wanted: row.fields[name] for wanted, name in columns.items() if name in row.fields}
    left = {name: v for name, v in row.fields.items() if name not in columns.values()}
    fields: dict[str, Any] = left | taken  # all at once: names may change places
    return Row(row.origin, row.index, fields)


def _count(report: DataReport, tokens: int, loss_tokens: int) -> None:
    report.tokens += tokens
    report.loss_tokens += loss_tokens
    report.longest = max(report.longest, tokens)


def _count_sft(report: DataReport, example: SFTExample) -> None:
    _count(report, len(example), int(example.loss_mask.sum()))
    report.zero_weight += example.weight == 0.0


def _count_preference(report: DataReport, example: PreferenceExample) -> None:
    _count(report, len(example), sum(c.numel() for c in example.completions))


def _count_prompt(report: DataReport, example: PromptExample) -> None:
    _count(report, len(example), 0)


def _too_many_identical(report: DataReport, identical: int, usable: int, most: float) -> DataError:
    return DataError(
        "RF2028",
        f"{identical} of {usable} rows compare equal completions",
        where=report.source,
        expected=f"at most {most:.0%} such rows",
        remedy="check how chosen and rejected were written: they look like the same column",
    )


def _nothing_left(report: DataReport) -> DataError:
    reasons = ", ".join(f"{n} {reason}" for reason, n in sorted(report.filtered.items()))
    first = f"; first: {report.bad_rows[0]}" if report.bad_rows else ""
    return DataError(
        "RF2004",
        f"0 of {report.read} rows are usable: {reasons}{first}",
        where=report.source,
        expected="at least one usable row",
        remedy="repair the rows, or raise the length limits in data if they were left out as "
        "overlong",
    )
