"""Text to token ids, with one law: text from the data never becomes a control token.

`<eos>` typed by a user is five characters, not the end of the sequence. Control tokens come from
the chat template and from this package alone.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING

from rlhf_fast.errors import DataError, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Unicode reserves these 32 code points for use inside a program: they never occur in sound text.
_NONCHARACTERS = [chr(c) for c in range(0xFDD0, 0xFDF0)]
_NAMED_PADS = ("<pad>", "[PAD]", "<|pad|>", "<PAD>", "<|finetune_right_pad_id|>", "<|endoftext|>")
_SPARE = re.compile(
    r"<\|?(reserved|unused|extra|dummy|placeholder)[\w]*\|?>|\[unused\d+\]", re.IGNORECASE
)


class TextEncoder:
    """Encodes data text and rendered conversations with one tokenizer.

    Args:
        tokenizer: a Hugging Face tokenizer, fast or slow. It is not changed.
        stop_ids: further ids that end a response when it is generated.

    Attributes:
        eos_id: ends every response that does not end by itself.
        end_ids: what ends a response: EOS, and those control tokens that stop generation.
        bos_ids: what the tokenizer itself puts before a plain text; empty for most.
        control_ids: ids that text from the data may not produce; the unknown token is not one.

    Raises:
        ModelError: RF3040 if the tokenizer has no EOS token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop_ids: Collection[int] = ()) -> None:
        if tokenizer.eos_token_id is None:
            raise ModelError(
                "RF3040",
                "the tokenizer has no EOS token, so no response could ever end",
                where=str(tokenizer.name_or_path or type(tokenizer).__name__),
                expected="an eos_token in tokenizer_config.json",
                remedy="set tokenizer.eos_token to the token that ends a response, and save it",
            )
        self.tokenizer = tokenizer
        self.eos_id = int(tokenizer.eos_token_id)
        added = tokenizer.added_tokens_decoder
        special = {int(i): str(t) for i, t in added.items() if t.special}
        ids, names = tokenizer.all_special_ids, tokenizer.all_special_tokens
        special |= {int(i): str(t) for i, t in zip(ids, names, strict=True)}
        # What an unknown character becomes is no control token, declared as `unk_token` or not;
        # unless it doubles as EOS or BOS, as in GPT-2.
        unknown = {tokenizer.unk_token_id, *self._raw(_NONCHARACTERS[0], literal=True)}
        unknown -= {self.eos_id, tokenizer.bos_token_id}
        self.control_ids = frozenset(special) - unknown
        self.end_ids = frozenset({self.eos_id}) | self.control_ids.intersection(stop_ids)
        strings = sorted((t for i, t in special.items() if i in self.control_ids), key=len)
        self._control = re.compile("|".join(re.escape(t) for t in reversed(strings)))
        self.bos_ids = self._leading_ids()

    def _leading_ids(self) -> list[int]:
        bare = self.tokenizer("a", add_special_tokens=False)["input_ids"]
        full = self.tokenizer("a", add_special_tokens=True)["input_ids"]
        if not bare:
            return list(full[:1]) if full[:1] == [self.tokenizer.bos_token_id] else []
        starts = (i for i in range(len(full)) if full[i : i + len(bare)] == bare)
        return list(full[: next(starts, 0)])

    def encode_text(self, text: str, where: str = "") -> list[int]:
        """Ids of a text, special tokens spelt in it as ordinary text; nothing is added.

        Raises:
            DataError: RF2044 if this tokenizer can only write such a string as its control token.
        """
        ids = self._raw(text, literal=True)
        if self.control_ids.isdisjoint(ids):
            return ids
        # Word-level models look a whole word up and find the control token again; break the word.
        pieces: list[int] = []
        at = 0
        for match in self._control.finditer(text):
            start, end = match.span()
            for part in (text[at:start], text[start : start + 1], text[start + 1 : end]):
                pieces += self._raw(part, literal=True) if part else []
            at = end
        pieces += self._raw(text[at:], literal=True) if text[at:] else []
        if not self.control_ids.isdisjoint(pieces):
            found = sorted(self.control_ids.intersection(pieces))[0]
            raise DataError(
                "RF2044",
                f"the text spells the control token "
                f"'{self.tokenizer.convert_ids_to_tokens(found)}' and the tokenizer has no other "
                "way to write it",
                where=where,
                expected="text without control tokens",
                remedy="remove the string from the row, or skip it with data.on_bad_row=skip",
            )
        return pieces

    def _raw(self, text: str, literal: bool) -> list[int]:
        # `verbose=False`: lengths are this package's business, the tokenizer's warning is not.
        encoded = self.tokenizer(
            text, add_special_tokens=False, split_special_tokens=literal, verbose=False
        )
        return list(encoded["input_ids"])

    def marks(self, texts: Iterable[str]) -> tuple[str, str]:
        """Two characters that occur in none of `texts`, to bracket spelt-out control tokens.

        Raises:
            DataError: RF2044 if the texts use all 32 of Unicode's noncharacters.
        """
        used = set().union(*(set(t) for t in texts))
        free = [c for c in _NONCHARACTERS if c not in used]
        if len(free) < 2:
            raise DataError(
                "RF2044",
                "the text holds nearly all of Unicode's 32 noncharacters",
                expected="text in characters that Unicode assigns",
                remedy="remove U+FDD0 to U+FDEF from the row",
            )
        return free[0], free[1]

    def mark(self, text: str, marks: tuple[str, str]) -> str:
        """`text` with every control token spelt in it bracketed by `marks`."""
        return self._control.sub(lambda m: f"{marks[0]}{m.group()}{marks[1]}", text)

    def encode_marked(self, text: str, marks: tuple[str, str], where: str = "") -> list[int]:
        """Ids of a rendered template: its control tokens as such, bracketed ones as text."""
        ids: list[int] = []
        start, end = marks
        # A template that slices content can part the two marks; a lone one is dropped, but still
        # separates, so that its neighbours cannot join into a control token.
        for piece in re.split(f"({start}[^{start}{end}]*{end})|[{start}{end}]", text):
            if not piece:
                continue
            if piece.startswith(start):
                ids += self.encode_text(piece[1:-1], where)
            else:
                ids += self._raw(piece, literal=False)
        return ids


def resolve_pad_id(tokenizer: PreTrainedTokenizerBase, *, embedding_rows: int | None = None) -> int:
    """An id to fill padded slots with, distinct from EOS where the vocabulary allows it.

    In order: the tokenizer's own pad token, a token named like one, the unknown token, a reserved
    or unused token, EOS. The vocabulary is never extended: new embedding rows would make an export
    that other programs refuse. Masks are built from lengths everywhere, so even EOS is safe; it
    only makes dumps harder to read, hence a warning.

    Args:
        tokenizer: a Hugging Face tokenizer. It is not changed.
        embedding_rows: rows of the model's embedding; ids at or above it are passed over.

    Raises:
        ModelError: RF3041 if the tokenizer has no usable token at all.
    """
    limit = embedding_rows if embedding_rows is not None else len(tokenizer)
    eos = tokenizer.eos_token_id
    vocabulary = tokenizer.get_vocab()
    spare = sorted(i for t, i in vocabulary.items() if _SPARE.fullmatch(t))
    candidates = [tokenizer.pad_token_id]
    candidates += [vocabulary.get(name) for name in _NAMED_PADS]
    candidates += [tokenizer.unk_token_id, *spare]
    for candidate in candidates:
        if candidate is not None and candidate != eos and 0 <= candidate < limit:
            return int(candidate)
    if eos is None or not 0 <= eos < limit:
        raise ModelError(
            "RF3041",
            "the tokenizer has neither a pad, an unknown, a reserved nor an EOS token in range",
            where=str(tokenizer.name_or_path or type(tokenizer).__name__),
            expected=f"one such token with an id below {limit}",
            remedy="set tokenizer.pad_token to a token of its vocabulary, and save it",
        )
    warnings.warn(
        f"no spare token to pad with: padding with EOS (id {eos}). Masks come from lengths, so "
        "training is unaffected.",
        stacklevel=2,
    )
    return int(eos)
