"""Records to token examples: what the stages train on."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlhf_fast.config import DataConfig
from rlhf_fast.data.columns import Content, Message
from rlhf_fast.data.encoding import TextEncoder
from rlhf_fast.data.formats import (
    CompletionRecord,
    PreferenceRecord,
    PromptRecord,
    TextRecord,
)
from rlhf_fast.data.readers import MAX_ROW_BYTES
from rlhf_fast.data.report import DataReport
from rlhf_fast.data.templates import ChatTemplate
from rlhf_fast.errors import DataError

OVERLONG = "RF2050"


@dataclass(frozen=True)
class LoadOptions:
    """How rows become examples. The first six are leaves of `DataConfig`, which documents them.

    Args:
        columns: renames applied to every row, from the name wanted to the name in the data, such as
            `{"prompt": "question"}`.
        template_variables: further variables of the chat template.
        stop_ids: further ids that end a response when the model generates. A reply to which the
            chat template gives one of them ends there, as the responses of PPO will; EOS is added
            to no other end.
        replace_invalid_text: replace invalid UTF-8, lone surrogates and NUL by U+FFFD, counted.
        max_row_bytes: longest JSON line accepted.
        max_identical: fraction of preference rows with equal completions that stops loading.
    """

    max_prompt_length: int = 512
    max_length: int = 1024
    overlong: str = "filter"
    on_bad_row: str = "error"
    max_bad_rows: int = 100
    chat_template: str = ""
    columns: Mapping[str, str] | None = None
    template_variables: Mapping[str, Any] | None = None
    stop_ids: tuple[int, ...] = ()
    replace_invalid_text: bool = False
    max_row_bytes: int = MAX_ROW_BYTES
    max_identical: float = 0.5

    @classmethod
    def from_config(cls, config: DataConfig, **more: Any) -> LoadOptions:
        """Options of a stage's `data` section; `more` sets the fields it does not have."""
        return cls(
            max_prompt_length=config.max_prompt_length,
            max_length=config.max_length,
            overlong=config.overlong,
            on_bad_row=config.on_bad_row,
            max_bad_rows=config.max_bad_rows,
            chat_template=config.chat_template,
            **more,
        )


@dataclass(frozen=True)
class SFTExample:
    """A sequence to imitate.

    Args:
        ids: [T] int64 tokens.
        loss_mask: [T] bool, true where the TOKEN is learnt (its prediction sits one position
            before). The first token is never learnt: nothing precedes it.
        origin: its row.
    """

    ids: Tensor
    loss_mask: Tensor
    origin: str

    @property
    def weight(self) -> float:
        """1, or 0 if no token carries loss; such an example adds exactly 0 to any loss."""
        return 1.0 if bool(self.loss_mask.any()) else 0.0

    def __len__(self) -> int:
        return self.ids.numel()

    @property
    def key(self) -> bytes:
        """Digest of the content, equal for duplicates."""
        return _digest([self.ids, self.loss_mask.to(torch.int64)])


@dataclass(frozen=True)
class PreferenceExample:
    """A prompt and K >= 2 distinct completions, best first; K = 2 is a pair.

    Args:
        prompt_ids: [P] int64.
        completions: K tensors [R_k] int64, each ended by EOS unless it was truncated.
        margin: least difference of scores asked for between neighbours in rank, 0 for none.
        origin: its row.
    """

    prompt_ids: Tensor
    completions: tuple[Tensor, ...]
    margin: float
    origin: str

    def sequences(self) -> list[Tensor]:
        """K tensors [P + R_k] int64: prompt and completion, best first."""
        return [torch.cat([self.prompt_ids, c]) for c in self.completions]

    def __len__(self) -> int:
        return sum(self.prompt_ids.numel() + c.numel() for c in self.completions)

    @property
    def key(self) -> bytes:
        """Digest of the content, equal for duplicates."""
        return _digest([self.prompt_ids, *self.completions]) + repr(self.margin).encode()


@dataclass(frozen=True)
class PromptExample:
    """A prompt to answer.

    Args:
        ids: [P] int64.
        text: the prompt as text, rendered through the chat template if it was messages.
        row: the row's other columns, for reward functions; `prompt` is among them only if it is a
            list of messages.
        uid: integer below 2^63 from the prompt's ids and the row's index; keys random draws.
        origin: its row.
    """

    ids: Tensor
    text: str
    row: Mapping[str, Any]
    uid: int
    origin: str

    def __len__(self) -> int:
        return self.ids.numel()

    @property
    def key(self) -> bytes:
        """Digest of the prompt's tokens, equal for duplicates."""
        return _digest([self.ids])


def _digest(tensors: Sequence[Tensor], salt: bytes = b"") -> bytes:
    digest = hashlib.sha256(salt)
    for tensor in tensors:
        digest.update(tensor.numel().to_bytes(8, "little"))
        digest.update(tensor.numpy().astype("<i8").tobytes())
    return digest.digest()


class ExampleBuilder:
    """Encodes records and applies the length policy; every row left out is counted.

    Args:
        encoder: the tokenizer's encoder.
        options: lengths and policies.
        report: where counts go.
    """

    def __init__(self, encoder: TextEncoder, options: LoadOptions, report: DataReport) -> None:
        self.encoder = encoder
        self.options = options
        self.report = report
        self.template = ChatTemplate(encoder, options.chat_template, options.template_variables)

    def prompt(self, record: PromptRecord) -> PromptExample | None:
        """A prompt, or None if it is left out.

        Raises:
            DataError: RF2051 if it has no tokens, RF2050 if it is too long under `error`.
        """
        origin = record.row.origin
        row = dict(record.row.fields)
        if isinstance(record.prompt, str):
            ids, text = self._prompt_text(record.prompt, origin), record.prompt
            del row["prompt"]
        else:
            ids, text = self.template.encode_prompt(record.prompt, origin)
        self._require_tokens(ids, origin)
        limit = self.options.max_prompt_length
        if len(ids) > limit:
            if not self._may_truncate(len(ids), limit, origin, "data.max_prompt_length"):
                return None
            ids = self._cut_left(ids, len(ids) - limit)
            self.report.truncated["prompt"] += 1
            bos = self.encoder.bos_ids if isinstance(record.prompt, str) else []
            shown = ids[len(bos) :] if ids[: len(bos)] == bos else ids  # no part of the text
            text = str(self.encoder.tokenizer.decode(shown, skip_special_tokens=False))
        tensor = torch.tensor(ids, dtype=torch.int64)
        salt = record.row.index.to_bytes(8, "little")
        uid = int.from_bytes(_digest([tensor], salt)[:8], "little") >> 1
        return PromptExample(tensor, text, row, uid, origin)

    def sft(self, record: CompletionRecord | TextRecord) -> SFTExample | None:
        """A sequence to imitate, or None if it is left out.

        Raises:
            DataError: of the template (RF204x), RF2050, RF2051.
        """
        origin = record.row.origin
        ids, mask = self._sft_tokens(record, origin)
        limit = self.options.max_length
        if len(ids) > limit:
            if not self._may_truncate(len(ids), limit, origin, "data.max_length"):
                return None
            ids, mask = self._cut_sequence(ids, mask, limit)
        mask[0] = False
        return SFTExample(
            torch.tensor(ids, dtype=torch.int64), torch.tensor(mask, dtype=torch.bool), origin
        )

    def preference(self, record: PreferenceRecord) -> PreferenceExample | None:
        """A ranked list, or None if it is left out.

        Completions equal to a better one are left out; a row with fewer than two left is counted
        as `identical completions`.

        Raises:
            DataError: of the template (RF204x), RF2050, RF2051.
        """
        origin = record.row.origin
        if len(set(record.completions)) < 2:
            self.report.filtered["identical completions"] += 1
            return None
        prompt, completions = self._preference_tokens(record, origin)
        self._require_tokens(prompt, origin)
        limit = self.options.max_length
        longest = max(map(len, completions))
        if len(prompt) + longest > limit:
            if not self._may_truncate(len(prompt) + longest, limit, origin, "data.max_length"):
                return None
            prompt, completions = self._cut_preference(prompt, completions, limit)
        distinct = list(dict.fromkeys(tuple(c) for c in completions))
        if len(distinct) < 2:
            self.report.filtered["identical completions"] += 1
            return None
        return PreferenceExample(
            torch.tensor(prompt, dtype=torch.int64),
            tuple(torch.tensor(c, dtype=torch.int64) for c in distinct),
            record.margin,
            origin,
        )

    # --- tokens ---------------------------------------------------------------------------------

    def _prompt_text(self, text: str, origin: str) -> list[int]:
        return [*self.encoder.bos_ids, *self.encoder.encode_text(text, origin)]

    def _continuation(
        self, prompt: str, prompt_ids: list[int], text: str, origin: str
    ) -> list[int]:
        """Ids of `text` after `prompt`, EOS appended.

        Encoded jointly where that leaves the prompt's ids alone (tokenizers that put a space before
        a text's first word need it), else on its own: the prompt's ids are what generation sees.
        """
        joint = self._prompt_text(prompt + text, origin)
        n = len(prompt_ids)
        ids = joint[n:] if joint[:n] == prompt_ids else self.encoder.encode_text(text, origin)
        return [*ids, self.encoder.eos_id]

    def _sft_tokens(
        self, record: CompletionRecord | TextRecord, origin: str
    ) -> tuple[list[int], list[bool]]:
        if isinstance(record, TextRecord):
            # EOS after a text too: one document ends before the next begins.
            ids = [*self._prompt_text(record.text, origin), self.encoder.eos_id]
            return ids, [True] * len(ids)
        prompt, completion = record.prompt, record.completion
        if isinstance(prompt, str) and isinstance(completion, str):
            prompt_ids = self._prompt_text(prompt, origin)
            self._require_tokens(prompt_ids, origin)
            response = self._continuation(prompt, prompt_ids, completion, origin)
            return prompt_ids + response, [False] * len(prompt_ids) + [True] * len(response)
        ids, mask = [], []
        for turn in self.template.encode_turns(_joined(prompt, completion), origin):
            learnt = turn.learnt if turn.message >= len(prompt) else 0
            ids += turn.ids
            mask += [i < learnt for i in range(len(turn.ids))]
        return ids, mask

    def _preference_tokens(
        self, record: PreferenceRecord, origin: str
    ) -> tuple[list[int], list[list[int]]]:
        prompt = record.prompt
        if isinstance(prompt, str):
            ids = self._prompt_text(prompt, origin)
            texts = [c for c in record.completions if isinstance(c, str)]
            return ids, [self._continuation(prompt, ids, text, origin) for text in texts]
        ids, completions = [], []
        for completion in record.completions:
            turns = self.template.encode_turns(_joined(prompt, completion), origin)
            # The stretch that leads up to the first reply after the prompt still is the prompt.
            first = next(i for i, t in enumerate(turns) if t.message >= len(prompt)) + 1
            ids = [i for t in turns[:first] for i in t.ids]
            completions.append([i for t in turns[first:] for i in t.ids])
        return ids, completions

    # --- lengths --------------------------------------------------------------------------------

    def _require_tokens(self, ids: list[int], origin: str) -> None:
        if not ids:
            raise DataError(
                "RF2051",
                "the prompt is empty once it is encoded",
                where=origin,
                expected="a prompt of at least one token",
                remedy="remove the row, or skip such rows with data.on_bad_row=skip",
            )

    def _may_truncate(self, length: int, limit: int, origin: str, key: str) -> bool:
        if self.options.overlong == "error":
            raise DataError(
                OVERLONG,
                f"the row has {length} tokens",
                where=origin,
                expected=f"at most {key}={limit}",
                remedy=f"raise {key}, or set data.overlong to filter or truncate-left",
            )
        if self.options.overlong == "filter":
            self.report.filtered["overlong"] += 1
            return False
        return True

    def _cut_left(self, ids: list[int], excess: int) -> list[int]:
        """`ids` without `excess` tokens on the left; BOS stays, models misbehave without it."""
        bos = self.encoder.tokenizer.bos_token_id
        keep = 1 if bos is not None and ids[:1] == [bos] and len(ids) - excess > 1 else 0
        return ids[:keep] + ids[keep + excess :]

    def _cut_sequence(
        self, ids: list[int], mask: list[bool], limit: int
    ) -> tuple[list[int], list[bool]]:
        """Cut the context before the first reply on the left, then the rest on the right."""
        context = mask.index(True) if True in mask else 0
        excess = len(ids) - limit
        from_left = min(excess, max(context - 1, 0))
        if from_left:
            self.report.truncated["prompt"] += 1
            head = self._cut_left(ids[:context], from_left)
            ids = head + ids[context:]
            mask = [False] * len(head) + mask[context:]
        if len(ids) > limit:
            self.report.truncated["response"] += 1
        return ids[:limit], mask[:limit]

    def _cut_preference(
        self, prompt: list[int], completions: list[list[int]], limit: int
    ) -> tuple[list[int], list[list[int]]]:
        longest = max(map(len, completions))
        room = max(limit - longest, 1)
        if len(prompt) > room:
            prompt = self._cut_left(prompt, len(prompt) - room)
            self.report.truncated["prompt"] += 1
        left = limit - len(prompt)
        if longest > left:
            self.report.truncated["response"] += 1
        return prompt, [c[:left] for c in completions]


def _joined(prompt: Content, completion: Content) -> tuple[Message, ...]:
    return tuple(m for part in (prompt, completion) for m in part if isinstance(m, Message))
