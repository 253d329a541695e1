"""Typed columns: what a row must hold, and the message when it does not."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any, NamedTuple

from rlhf_fast.data.jsonl import json_type
from rlhf_fast.data.rows import Row
from rlhf_fast.errors import DataError

ROLES = ("system", "developer", "user", "assistant", "tool")
_SAME_ROLE_MAY_FOLLOW = {"tool"}
_ROLE_ALIASES = {
    "human": "user",
    "gpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "function": "tool",
}
_COLUMN_ALIASES = {
    "prompt": ("query", "question", "instruction", "input", "context"),
    "completion": ("response", "answer", "output", "target", "reply"),
    "messages": ("conversations", "conversation", "dialogue", "chat", "turns"),
    "text": ("content", "document", "body"),
    "chosen": ("preferred", "accepted", "winner", "good", "response_chosen"),
    "rejected": ("dispreferred", "loser", "bad", "response_rejected"),
    "completions": ("responses", "answers", "candidates", "outputs"),
}


# What a message says beside its content; the chat template is given role and content alone.
_SAID_BESIDE = ("tool_calls", "function_call", "reasoning_content", "thinking")


class Message(NamedTuple):
    """One turn of a conversation."""

    role: str
    content: str


Content = str | tuple[Message, ...]
"""A text, or messages."""


def missing_column(row: Row, *layouts: tuple[str, ...]) -> DataError:
    found = list(row.fields)
    hints = []
    for wanted in dict.fromkeys(name for layout in layouts for name in layout):
        if wanted in found:
            continue
        lower = {str(name).strip().lower(): name for name in found}
        alias = [lower[a] for a in (wanted, *_COLUMN_ALIASES.get(wanted, ())) if a in lower]
        near = alias or difflib.get_close_matches(wanted, [str(f) for f in found], 1, 0.75)
        hints += [f"rename '{near[0]}' to '{wanted}'"] if near else []
    wanted_text = " or ".join(", ".join(layout) for layout in layouts)
    return DataError(
        "RF2020",
        f"columns missing; found: {', '.join(map(repr, found)) or 'none'}",
        where=row.origin,
        expected=f"columns {wanted_text}",
        remedy=f"did you mean to {' and '.join(hints)}?" if hints else "rename or add the columns",
    )


def given_columns(row: Row, *names: str) -> set[str]:
    """Those of `names` that tell the row's format: the ones with a value, else the ones there are.

    A table with rows of several formats fills the columns that a row does not have with null.
    """
    present = [name for name in names if name in row.fields]
    return {name for name in present if row.fields[name] is not None} or set(present)


def wrong_type(row: Row, column: str, value: Any, expected: str) -> DataError:
    return DataError(
        "RF2021",
        f"column '{column}' is {json_type(value)}",
        where=row.origin,
        expected=expected,
        remedy="repair the row, or skip such rows with data.on_bad_row=skip",
    )


def malformed(row: Row, column: str, what: str, expected: str) -> DataError:
    return DataError(
        "RF2022",
        f"column '{column}': {what}",
        where=row.origin,
        expected=expected,
        remedy="repair the row, or skip such rows with data.on_bad_row=skip",
    )


def read_content(row: Row, column: str, *, may_be_empty: bool = False) -> Content:
    if column not in row.fields:
        raise missing_column(row, (column,))
    value = row.fields[column]
    if isinstance(value, str):
        return value if may_be_empty else read_text(row, column, value)
    if isinstance(value, list | tuple):
        return read_messages(row, column, value)
    raise wrong_type(row, column, value, "text, or a list of messages")


def _empty(row: Row, column: str) -> DataError:
    return DataError(
        "RF2025",
        f"column '{column}' is empty",
        where=row.origin,
        expected="text other than white space",
        remedy="remove the row, or skip such rows with data.on_bad_row=skip",
    )


def read_text(row: Row, column: str, value: Any) -> str:
    if not isinstance(value, str):
        raise wrong_type(row, column, value, "text")
    if not value.strip():
        raise _empty(row, column)
    return value


# --- messages ----------------------------------------------------------------------------------


def read_messages(row: Row, column: str, value: Any) -> tuple[Message, ...]:
    if not isinstance(value, list | tuple):
        raise wrong_type(row, column, value, "a list of messages")
    if not value:
        raise _empty(row, column)
    messages: list[Message] = []
    for i, item in enumerate(value):
        message = _message(row, f"{column}[{i}]", item)
        previous = messages[-1].role if messages else ""
        if message.role == previous and message.role not in _SAME_ROLE_MAY_FOLLOW:
            raise DataError(
                "RF2024",
                f"{column}[{i}] has the role '{message.role}', like the message before it",
                where=row.origin,
                expected="roles that alternate",
                remedy="join the two messages, or skip such rows with data.on_bad_row=skip",
            )
        messages.append(message)
    return tuple(messages)


def _message(row: Row, place: str, item: Any) -> Message:
    if not isinstance(item, Mapping):
        raise wrong_type(row, place, item, 'an object {"role": ..., "content": ...}')
    if "role" not in item or "content" not in item:
        renamed = "from" in item and "value" in item
        raise DataError(
            "RF2022",
            f"{place} lacks 'role' or 'content'; found: {', '.join(map(repr, item)) or 'nothing'}",
            where=row.origin,
            expected='{"role": ..., "content": ...}',
            remedy="rename 'from' to 'role' and 'value' to 'content', and the roles to "
            "user and assistant"
            if renamed
            else "add the missing keys",
        )
    role, content = item["role"], item["content"]
    if role not in ROLES:
        near = difflib.get_close_matches(str(role).lower(), ROLES, 1)
        guess = _ROLE_ALIASES.get(str(role).lower()) or (near[0] if near else "")
        raise DataError(
            "RF2023",
            f"{place} has the unknown role {role!r}",
            where=row.origin,
            expected=f"one of {', '.join(ROLES)}",
            remedy=f"did you mean '{guess}'?" if guess else "use one of these roles",
        )
    beside = [key for key in _SAID_BESIDE if item.get(key)]
    if beside:
        raise DataError(
            "RF2022",
            f"{place} says something in '{beside[0]}', of which the model would see nothing",
            where=row.origin,
            expected="messages whose content is all they say",
            remedy="write it into the content the way the chat template would, or remove the key",
        )
    text = _joined_parts(row, f"{place}.content", content)
    if not text.strip():
        raise _empty(row, f"{place}.content")
    return Message(role, text)


def _joined_parts(row: Row, place: str, content: Any) -> str:
    """Content as text; a list of text parts, as multimodal data sets write it, is joined."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list | tuple):
        raise wrong_type(row, place, content, "text")
    parts = []
    for i, part in enumerate(content):
        text = part.get("text") if isinstance(part, Mapping) else None
        if not isinstance(text, str) or part.get("type", "text") != "text":
            raise wrong_type(row, f"{place}[{i}]", part, 'a part {"type": "text", "text": ...}')
        parts.append(text)
    return "".join(parts)


def require_same_kind(row: Row, first: Content, second: Content, column: str) -> None:
    if isinstance(first, str) == isinstance(second, str):
        return
    raise DataError(
        "RF2026",
        f"the row mixes text and messages: column '{column}' is "
        f"{'text' if isinstance(second, str) else 'a list of messages'}, another is not",
        where=row.origin,
        expected="all columns as text, or all as messages",
        remedy='write the text as [{"role": "user", "content": ...}], or the messages as text',
    )


def require_reply(row: Row, prompt: Content, completion: Content, column: str) -> None:
    if isinstance(prompt, str) or isinstance(completion, str):
        return
    if completion[0].role != "assistant" or prompt[-1].role == "assistant":
        what = f"the prompt ends with '{prompt[-1].role}', the reply begins with "
        what += f"'{completion[0].role}'"
        raise malformed(row, column, what, "a prompt that ends with the user, then the assistant")
