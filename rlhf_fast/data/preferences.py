"""Preference rows: pairs with an explicit or implicit prompt, and ranked lists."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from rlhf_fast.data.columns import (
    Content,
    Message,
    given_columns,
    malformed,
    missing_column,
    read_content,
    read_messages,
    require_reply,
    require_same_kind,
    wrong_type,
)
from rlhf_fast.data.formats import PreferenceRecord
from rlhf_fast.data.rows import Row
from rlhf_fast.errors import DataError

# Where a transcript in the style of Anthropic's HH data hands over to the assistant, to the human.
_TURN_MARKS = ("\n\nAssistant:", "\n\nassistant:")
_HUMAN_MARKS = ("\n\nHuman:", "\n\nhuman:")


def parse_preference(row: Row) -> PreferenceRecord:
    """A row that ranks: `chosen` and `rejected`, or `completions`.

    Raises:
        DataError: RF2020 to RF2030.
    """
    if "completions" in given_columns(row, "chosen", "rejected", "completions"):
        return _parse_ranked(row)
    if not {"chosen", "rejected"} <= row.fields.keys():
        raise missing_column(row, ("prompt", "chosen", "rejected"), ("prompt", "completions"))
    chosen = read_content(row, "chosen", may_be_empty=True)
    rejected = read_content(row, "rejected", may_be_empty=True)
    require_same_kind(row, chosen, rejected, "rejected")
    given = None if row.fields.get("prompt") is None else read_content(row, "prompt")
    if given is not None and not _is_quoted(given, chosen, rejected):
        prompt, pair = _explicit_prompt(row, given, (chosen, rejected))
    elif isinstance(chosen, str) and isinstance(rejected, str):
        prompt, pair = _implicit_text(row, chosen, rejected)
    else:
        prompt, pair = _implicit_messages(row, chosen, rejected)
    return PreferenceRecord(row, prompt, pair, _margin(row))


def _different_prompts(row: Row, what: str) -> DataError:
    return DataError(
        "RF2027",
        f"chosen and rejected answer different prompts: {what}",
        where=row.origin,
        expected="two answers to the same prompt",
        remedy="pair answers of one prompt, or skip such rows with data.on_bad_row=skip",
    )


def _is_quoted(prompt: Content, chosen: Content, rejected: Content) -> bool:
    """Whether the prompt is the text of a user's message with which both conversations begin.

    UltraFeedback's pairs have it so: the conversations are whole without it.
    """
    if not isinstance(prompt, str) or isinstance(chosen, str) or isinstance(rejected, str):
        return False
    shared = chosen[: _common_length(chosen, rejected)]
    said = [m.content.strip() for m in shared if isinstance(m, Message) and m.role == "user"]
    return prompt.strip() in said


def _explicit_prompt(
    row: Row, prompt: Content, completions: tuple[Content, ...]
) -> tuple[Content, tuple[Content, ...]]:
    """The prompt, and the completions without a repetition of it."""
    for content in completions:
        require_same_kind(row, prompt, content, "chosen, rejected or completions")
    # A bare text may begin with its prompt's words by chance; a transcript or messages do not.
    may_repeat = not isinstance(prompt, str) or _last_handover(prompt) > 0
    if may_repeat and all(c[: len(prompt)] == prompt for c in completions):
        completions = tuple(c[len(prompt) :] for c in completions)
    for i, content in enumerate(completions):
        if isinstance(prompt, str) or isinstance(content, str):
            continue
        if not content:
            raise malformed(row, "prompt", f"completion {i + 1} adds nothing to it", "a reply")
        if content[0].role != "assistant":
            raise _different_prompts(
                row, f"completion {i + 1} begins with other messages than column 'prompt'"
            )
        require_reply(row, prompt, content, "prompt")
    return prompt, completions


def _last_handover(text: str) -> int:
    """Where the last hand-over to the assistant in `text` ends; 0 without any."""
    return max((text.rfind(m) + len(m) for m in _TURN_MARKS if m in text), default=0)


def _implicit_text(row: Row, chosen: str, rejected: str) -> tuple[str, tuple[str, ...]]:
    """Split two transcripts at the end of what they share.

    The split lies after the last hand-over to the assistant if the transcripts have one, else
    before the white space ahead of the first difference, so that no word is cut.
    """
    common = _common_length(chosen, rejected)
    if _last_handover(chosen) or _last_handover(rejected):
        split = _last_handover(chosen[:common])
        if not split or any(m in chosen[split:common] for m in _HUMAN_MARKS):
            raise _different_prompts(row, "they differ before the assistant's turn")
    else:
        split = common
        while chosen != rejected and split > 0 and not _boundary(chosen, rejected, split):
            split -= 1
    prompt = chosen[:split]
    if not prompt.strip():
        raise _different_prompts(row, "they share no beginning, and there is no column 'prompt'")
    return prompt, (chosen[split:], rejected[split:])


def _common_length(first: Content, second: Content) -> int:
    """How many leading characters or messages two contents share."""
    pairs = zip(first, second, strict=False)
    shortest = min(len(first), len(second))
    return next((i for i, (a, b) in enumerate(pairs) if a != b), shortest)


def _boundary(chosen: str, rejected: str, at: int) -> bool:
    """True if both transcripts may be cut at `at`: ahead of white space, or after a line end."""
    if chosen[at - 1] == "\n":
        return True
    ahead = (chosen[at : at + 1], rejected[at : at + 1])
    return all(c == "" or c.isspace() for c in ahead) and not chosen[at - 1].isspace()


def _implicit_messages(
    row: Row, chosen: Content, rejected: Content
) -> tuple[Content, tuple[Content, ...]]:
    # Equal conversations, and answers that share their first messages, still need an answer each.
    common = min(_common_length(chosen, rejected), len(chosen) - 1, len(rejected) - 1)
    if common == 0:
        raise _different_prompts(row, "their first messages differ")
    rests = (chosen[common:], rejected[common:])
    for rest in rests:
        first = rest[0]
        if isinstance(first, Message) and first.role != "assistant":
            raise _different_prompts(
                row, f"message {common + 1} differs and is the {first.role}'s, not the assistant's"
            )
    return chosen[:common], rests


def _margin(row: Row) -> float:
    value = row.fields.get("margin")
    if value is None:
        return 0.0
    number = _number(value)
    if number is None or number < 0:
        raise DataError(
            "RF2030",
            f"column 'margin' is {value!r}",
            where=row.origin,
            expected="a finite number of at least 0: how much better chosen is",
            remedy="repair the margin, or leave the column out",
        )
    return number


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def _parse_ranked(row: Row) -> PreferenceRecord:
    value = row.fields["completions"]
    if not isinstance(value, list | tuple):
        raise wrong_type(row, "completions", value, "a list of completions, best first")
    if len(value) < 2:
        what = f"{len(value)} completion cannot be ranked"
        raise malformed(row, "completions", what, "at least two completions")
    contents = tuple(_ranked_content(row, i, item) for i, item in enumerate(value))
    prompt, contents = _explicit_prompt(row, read_content(row, "prompt"), contents)
    order, ties = _ranking(row, len(contents))
    return PreferenceRecord(row, prompt, tuple(contents[i] for i in order), _margin(row), ties)


def _ranked_content(row: Row, index: int, item: Any) -> Content:
    place = f"completions[{index}]"
    if isinstance(item, str):
        return item
    if isinstance(item, list | tuple):
        return read_messages(row, place, item)
    raise wrong_type(row, place, item, "text, or a list of messages")


def _ranking(row: Row, count: int) -> tuple[list[int], int]:
    """Indices best first, one of each group of equals, and how many equals were left out."""
    fields = row.fields
    column = next((c for c in ("ranks", "scores") if fields.get(c) is not None), "")
    if not column:
        return list(range(count)), 0
    values = fields[column]
    is_list = isinstance(values, Sequence) and not isinstance(values, str)
    numbers = [_number(v) for v in values] if is_list else []
    keys = [n if column == "ranks" else -n for n in numbers if n is not None]
    if len(keys) != count or len(numbers) != count:
        raise DataError(
            "RF2029",
            f"column '{column}' does not rank the completions: {str(values)[:80]}",
            where=row.origin,
            expected=f"a list of {count} finite numbers, "
            + ("1 for the best" if column == "ranks" else "higher is better"),
            remedy=f"repair '{column}', or order 'completions' best first and leave it out",
        )
    order = sorted(range(count), key=lambda i: (keys[i], i))
    kept = [i for n, i in enumerate(order) if n == 0 or keys[i] != keys[order[n - 1]]]
    return kept, count - len(kept)
