"""Conversations to token ids through a chat template, with a mask of what the assistant said.

The mask needs no `{% generation %}` support in the template. A conversation is rendered prefix by
prefix: what the template adds between "everything before the reply, with the generation prompt" and
"everything up to the reply" is the reply. If a prefix does not render to a prefix, the template
rewrites history, no such mask exists, and the row is refused.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rlhf_fast.data.columns import Message
from rlhf_fast.data.encoding import TextEncoder
from rlhf_fast.errors import DataError


class Segment(NamedTuple):
    """A stretch of a rendered conversation; `response` is True for what the assistant said."""

    text: str
    response: bool


def load_template(template: str) -> str:
    """The Jinja source of a setting that is either Jinja text or the path of a file.

    Raises:
        DataError: RF2045 if it is neither.
    """
    if not template or "{{" in template or "{%" in template:
        return template
    try:
        return Path(os.path.expanduser(template)).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise DataError(
            "RF2045",
            f"the chat template cannot be read: {getattr(error, 'strerror', None) or error}",
            where=f"data.chat_template={template!r}",
            expected="Jinja text, or the path of a UTF-8 file with it",
            remedy="check the path, or leave data.chat_template empty for the tokenizer's own",
        ) from error


class Turn(NamedTuple):
    """Ids of one stretch of a conversation.

    `learnt` of them, from the first, carry loss (0 for context). `message` is the index of the
    assistant message that this stretch is, or leads up to.
    """

    ids: list[int]
    learnt: int
    message: int


class ChatTemplate:
    """Renders and encodes conversations.

    Args:
        encoder: the tokenizer's encoder.
        template: Jinja text or the path of a file; empty for the tokenizer's own template.
        variables: further variables of the template, such as `enable_thinking`.

    Raises:
        DataError: RF2045 if `template` is a path that cannot be read.
    """

    def __init__(
        self, encoder: TextEncoder, template: str = "", variables: Mapping[str, Any] | None = None
    ) -> None:
        self.encoder = encoder
        self.source = load_template(template)
        self.variables = dict(variables or {})

    def render(
        self, messages: Sequence[Message], where: str, *, generation_prompt: bool = False
    ) -> str:
        """The conversation as text.

        Raises:
            DataError: RF2040 without any template, RF2041 if the template refuses the messages.
        """
        tokenizer = self.encoder.tokenizer
        if not (self.source or tokenizer.chat_template):
            raise DataError(
                "RF2040",
                "the row holds messages and the tokenizer has no chat template",
                where=where,
                expected="a tokenizer with a chat template, or data.chat_template",
                remedy="set data.chat_template to a Jinja file, or give the row as text",
            )
        try:
            text = tokenizer.apply_chat_template(
                [{"role": m.role, "content": m.content} for m in messages],
                chat_template=self.source or None,
                add_generation_prompt=generation_prompt,
                tokenize=False,
                **self.variables,
            )
        except Exception as error:  # a template can fail in any way a program can
            roles = [m.role for m in messages]
            raise DataError(
                "RF2041",
                f"the chat template refused the messages: {error}",
                where=where,
                expected=f"roles in an order it accepts, got {roles}"
                if roles
                else "a message before the first of the assistant",
                remedy="change the row, or set data.chat_template to a template that accepts it",
            ) from error
        return str(text)

    def _mark(self, messages: Sequence[Message]) -> tuple[list[Message], tuple[str, str]]:
        marks = self.encoder.marks(m.content for m in messages)
        return [Message(m.role, self.encoder.mark(m.content, marks)) for m in messages], marks

    def encode_prompt(self, messages: Sequence[Message], where: str) -> tuple[list[int], str]:
        """Ids and text of a conversation that waits for the assistant.

        Raises:
            DataError: RF2040, RF2041, RF2044.
        """
        marked, marks = self._mark(messages)
        text = self.render(marked, where, generation_prompt=True)
        self._require_context(marked, text, where, generation_prompt=True)
        return self.encoder.encode_marked(text, marks, where), _strip(text, marks)

    def segments(self, messages: Sequence[Message], where: str) -> list[Segment]:
        """A conversation up to its last reply as alternating context and reply.

        Joined, the texts are the rendered conversation, less what follows the last reply.

        Raises:
            DataError: RF2040, RF2041 (also where a message is left out), RF2042 if the template
                rewrites earlier turns, RF2043 without any assistant message.
        """
        full = self.render(messages, where)
        self._require_context(messages, full, where)
        out: list[Segment] = []
        end = 0
        for i, message in enumerate(messages):
            if message.role != "assistant":
                continue
            before = self.render(messages[:i], where, generation_prompt=True)
            after = self.render(messages[: i + 1], where)
            if not (after.startswith(before) and full.startswith(after) and len(before) >= end):
                raise _rewrites_history(where, i)
            if after == before:
                raise _leaves_out(where, i, message.role)
            out += [
                Segment(full[end : len(before)], False),
                Segment(full[len(before) : len(after)], True),
            ]
            end = len(after)
        if not out:
            raise DataError(
                "RF2043",
                "the conversation has no assistant message, so there is nothing to learn from",
                where=where,
                expected="at least one message with the role 'assistant'",
                remedy="add the reply, or use the row as a prompt",
            )
        return out

    def _require_context(
        self, messages: Sequence[Message], text: str, where: str, *, generation_prompt: bool = False
    ) -> None:
        """Refuse a template that passes over what is said to the assistant, as some do with system.

        A template may write content in another way; one that writes none is the same for another.
        """
        for i, message in enumerate(messages):
            if message.role == "assistant" or message.content.strip() in text:
                continue
            others = list(messages)
            others[i] = message._replace(content=f"{message.content}x")
            if self.render(others, where, generation_prompt=generation_prompt) == text:
                raise _leaves_out(where, i, message.role)

    def encode_turns(self, messages: Sequence[Message], where: str) -> list[Turn]:
        """A conversation up to its last reply, encoded turn by turn.

        A reply is learnt through the token that ends it: EOS, or another control token at which
        generation stops. What the template writes after that is context, and is left off after the
        last reply. If the template writes no such token, EOS is appended to the last reply. Each
        turn continues the ids before it, as it will at generation: a prompt has the same ids
        whatever follows.

        Raises:
            DataError: as `segments`, and RF2044.
        """
        marked, marks = self._mark(messages)
        segments = self.segments(marked, where)
        replies = [i for i, m in enumerate(messages) if m.role == "assistant"]
        turns: list[Turn] = []
        ids: list[int] = []
        text = ""
        for number, segment in enumerate(segments):
            text += segment.text
            joint = self.encoder.encode_marked(text, marks, where)
            new = (
                joint[len(ids) :]
                if joint[: len(ids)] == ids
                else self.encoder.encode_marked(segment.text, marks, where)
            )
            learnt = 0
            if segment.response:
                new, learnt = self._end_reply(new, number == len(segments) - 1)
            turns.append(Turn(new, learnt, replies[number // 2]))
            ids += new
        return turns

    def _end_reply(self, reply: list[int], last: bool) -> tuple[list[int], int]:
        """The reply's ids and how many of them carry loss."""
        ends = [i for i, token in enumerate(reply) if token in self.encoder.end_ids]
        if ends:
            taught = ends[-1] + 1
            return (reply[:taught] if last else reply), taught
        if last:
            reply = [*reply, self.encoder.eos_id]
        return reply, len(reply)


def _strip(text: str, marks: tuple[str, str]) -> str:
    return text.replace(marks[0], "").replace(marks[1], "")


def _leaves_out(where: str, message: int, role: str) -> DataError:
    loss = "so there is no reply to learn" if role == "assistant" else "so the model never sees it"
    return DataError(
        "RF2041",
        f"the chat template writes nothing for message {message + 1}, the {role}'s, {loss}",
        where=where,
        expected="a template that renders every message",
        remedy="set data.chat_template to such a template",
    )


def _rewrites_history(where: str, message: int) -> DataError:
    return DataError(
        "RF2042",
        f"the chat template renders the messages before message {message + 1} differently once it "
        "is there, so the reply cannot be told from its context",
        where=where,
        expected="a template that renders a conversation as its beginning plus what is new",
        remedy="set data.chat_template to a template without this effect, or keep one reply per "
        "row (templates that drop earlier reasoning do this in multi-turn rows)",
    )
