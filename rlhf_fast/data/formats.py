"""Rows to typed records: the column conventions of TRL, read strictly.

    prompt                              prompt
    prompt, completion                  prompt-completion
    text                                language modelling
    messages                            conversation
    [prompt,] chosen, rejected[, margin]            preference
    prompt, completions[, ranks | scores]           ranked list, best first without ranks or scores

Text or messages (`{"role", "content"}`) everywhere, one or the other within a row. A column that is
null in a row says nothing about its format, so that one table can hold rows of several.
"""

from __future__ import annotations

from dataclasses import dataclass

from rlhf_fast.data.columns import (
    Content,
    given_columns,
    malformed,
    missing_column,
    read_content,
    read_messages,
    read_text,
    require_reply,
    require_same_kind,
)
from rlhf_fast.data.rows import Row


@dataclass(frozen=True)
class PromptRecord:
    """A prompt: text, or messages that do not end with the assistant's."""

    row: Row
    prompt: Content


@dataclass(frozen=True)
class TextRecord:
    """A text of which every token is learnt."""

    row: Row
    text: str


@dataclass(frozen=True)
class CompletionRecord:
    """A prompt and what follows; only the assistant's part of `completion` is learnt.

    A plain conversation has an empty `prompt`, so that every reply in it is learnt.
    """

    row: Row
    prompt: Content
    completion: Content


@dataclass(frozen=True)
class PreferenceRecord:
    """A prompt and K completions, best first. `margin` is how much better, 0 if the row is silent.

    `ties` completions were left out because their rank equals that of one that is kept.
    """

    row: Row
    prompt: Content
    completions: tuple[Content, ...]
    margin: float = 0.0
    ties: int = 0


def parse_prompt(row: Row) -> PromptRecord:
    """A row with `prompt`; other columns are left alone.

    Raises:
        DataError: RF2020 to RF2026.
    """
    prompt = read_content(row, "prompt")
    if not isinstance(prompt, str) and prompt[-1].role == "assistant":
        raise malformed(row, "prompt", "the prompt ends with an assistant message", "a user turn")
    return PromptRecord(row, prompt)


def parse_sft(row: Row) -> CompletionRecord | TextRecord:
    """A row to imitate: `messages`, or `prompt` and `completion`, or `text`, in this order.

    Raises:
        DataError: RF2020 to RF2026.
    """
    fields = row.fields
    given = given_columns(row, "messages", "prompt", "completion", "text")
    if "messages" in given:
        return CompletionRecord(row, (), read_messages(row, "messages", fields["messages"]))
    if "prompt" in given or "completion" in given:
        prompt, completion = read_content(row, "prompt"), read_content(row, "completion")
        require_same_kind(row, prompt, completion, "completion")
        require_reply(row, prompt, completion, "completion")
        return CompletionRecord(row, prompt, completion)
    if "text" in given:
        return TextRecord(row, read_text(row, "text", fields["text"]))
    raise missing_column(row, ("messages",), ("prompt", "completion"), ("text",))
