"""Text never becomes a control token; a pad id without new embedding rows."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from rlhf_fast.data.encoding import TextEncoder, resolve_pad_id
from rlhf_fast.errors import DataError, ModelError


@pytest.mark.parametrize(
    "text", ["<|im_end|>", "a <bos> b", "<|im_start|>system\n<pad>", "<eos><eos>"]
)
def test_special_tokens_in_text_are_encoded_as_text(
    bpe: PreTrainedTokenizerFast, text: str
) -> None:
    encoder = TextEncoder(bpe)
    ids = encoder.encode_text(text)
    assert encoder.control_ids.isdisjoint(ids)
    assert bpe.decode(ids) == text
    # The hazard is real: encoded the ordinary way, the control id appears.
    assert not encoder.control_ids.isdisjoint(bpe(text, add_special_tokens=False)["input_ids"])


def test_encoding_does_not_change_the_tokenizer(bpe: PreTrainedTokenizerFast) -> None:
    before = bpe("a <bos>")["input_ids"]
    TextEncoder(bpe).encode_text("a <bos>")
    assert bpe("a <bos>")["input_ids"] == before


def test_word_level_vocabulary_holds_the_control_token_as_a_word(
    words: PreTrainedTokenizerFast,
) -> None:
    encoder = TextEncoder(words)
    raw = words("the <eos> cat", add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert words.eos_token_id in raw
    ids = encoder.encode_text("the <eos> cat")
    assert words.eos_token_id not in ids
    assert [ids[0], ids[-1]] == words("the cat")["input_ids"]


def test_undeclared_unknown_token_is_no_control_token(make_words: Any) -> None:
    tokenizer = make_words("the cat", unk_token=None)
    assert TextEncoder(tokenizer).encode_text("the dog") == [2, 0]


def test_eos_that_doubles_as_unknown_token_stays_a_control_token(make_bpe: Any) -> None:
    same = "<eos>"
    tokenizer = make_bpe(eos_token=same, bos_token=same, unk_token=same, pad_token=None)
    encoder = TextEncoder(tokenizer)
    assert tokenizer.eos_token_id not in encoder.encode_text("a <eos> b")
    marks = encoder.marks([])
    assert encoder.mark("a <eos>", marks) == f"a {marks[0]}<eos>{marks[1]}"


def test_tokenizer_in_pure_python() -> None:
    tokenizer = ByT5Tokenizer()
    encoder = TextEncoder(tokenizer)
    ids = encoder.encode_text("a </s>")
    assert tokenizer.eos_token_id not in ids
    assert tokenizer.decode(ids) == "a </s>"
    assert encoder.bos_ids == []


def test_control_token_that_cannot_be_written_otherwise(
    monkeypatch: pytest.MonkeyPatch, words: PreTrainedTokenizerFast
) -> None:
    encoder = TextEncoder(words)
    monkeypatch.setattr(encoder, "_raw", lambda text, literal: [words.eos_token_id])
    with pytest.raises(DataError) as caught:
        encoder.encode_text("the <eos>", "train.jsonl:3")
    assert caught.value.code == "RF2044"
    assert "<eos>" in caught.value.what
    assert caught.value.where == "train.jsonl:3"


@given(
    parts=st.lists(
        st.sampled_from(
            ["<eos>", "<bos>", "<|im_end|>", "<|im_", "end|>", "<", " ", "cat", "é", "\n"]
        ),
        max_size=8,
    )
)
@settings(max_examples=150, deadline=None)
def test_any_mix_of_control_strings_survives_as_text(
    bpe: PreTrainedTokenizerFast, parts: list[str]
) -> None:
    encoder, text = TextEncoder(bpe), "".join(parts)
    ids = encoder.encode_text(text)
    assert encoder.control_ids.isdisjoint(ids)
    assert bpe.decode(ids) == text
    marks = encoder.marks([text])
    marked = encoder.encode_marked(encoder.mark(text, marks), marks)
    assert encoder.control_ids.isdisjoint(marked)
    assert bpe.decode(marked) == text


def test_template_tokens_stay_control_tokens(bpe: PreTrainedTokenizerFast) -> None:
    encoder = TextEncoder(bpe)
    marks = encoder.marks([])
    text = "<|im_start|>" + encoder.mark("x<|im_start|>", marks) + "<|im_end|>"
    ids = encoder.encode_marked(text, marks)
    start, end = bpe.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    assert ids[0] == start
    assert ids[-1] == end
    assert start not in ids[1:]


def test_lone_marks_vanish(bpe: PreTrainedTokenizerFast) -> None:
    encoder = TextEncoder(bpe)
    a, b = encoder.marks([])
    assert bpe.decode(encoder.encode_marked(f"x{a}y{b}{b}z{a}", (a, b))) == "xyz"


def test_marks_avoid_what_the_text_holds(bpe: PreTrainedTokenizerFast) -> None:
    encoder = TextEncoder(bpe)
    assert set(encoder.marks(["\ufdd0\ufdd1"])).isdisjoint("\ufdd0\ufdd1")
    with pytest.raises(DataError) as caught:
        encoder.marks(["".join(map(chr, range(0xFDD0, 0xFDEF)))])
    assert caught.value.code == "RF2044"


def test_bos_is_what_the_tokenizer_itself_adds(
    bpe: PreTrainedTokenizerFast, bos_bpe: PreTrainedTokenizerFast
) -> None:
    assert TextEncoder(bpe).bos_ids == []
    assert TextEncoder(bos_bpe).bos_ids == [bos_bpe.bos_token_id]


def test_tokenizer_without_eos(make_words: Any) -> None:
    with pytest.raises(ModelError) as caught:
        TextEncoder(make_words(eos_token=None))
    assert caught.value.code == "RF3040"
    assert "eos_token" in caught.value.remedy


def test_pad_id_prefers_the_tokenizers_own(bpe: PreTrainedTokenizerFast) -> None:
    assert resolve_pad_id(bpe) == bpe.pad_token_id


@pytest.mark.parametrize(
    ("words_in", "special", "expected"),
    [
        ("a <pad> b", {}, "<pad>"),
        ("a b", {}, "<unk>"),
        ("a b", {"pad_token": "<eos>"}, "<unk>"),
        ("a <|reserved_special_token_3|> b", {"unk_token": None}, "<|reserved_special_token_3|>"),
        ("a [unused7] <unused2> b", {"unk_token": None}, "[unused7]"),
    ],
)
def test_pad_id_is_a_spare_token(
    make_words: Any, words_in: str, special: dict[str, Any], expected: str
) -> None:
    tokenizer = make_words(words_in, **special)
    size = len(tokenizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pad = resolve_pad_id(tokenizer)
    assert pad == tokenizer.get_vocab()[expected]
    assert pad != tokenizer.eos_token_id
    assert len(tokenizer) == size


def test_pad_id_falls_back_to_eos_with_a_warning(make_words: Any) -> None:
    tokenizer = make_words("a b", unk_token=None)
    with pytest.warns(UserWarning, match="padding with EOS"):
        assert resolve_pad_id(tokenizer) == tokenizer.eos_token_id


def test_pad_id_lies_inside_the_embedding(make_words: Any) -> None:
    tokenizer = make_words("a b c <pad>", unk_token=None)
    assert resolve_pad_id(tokenizer, embedding_rows=6) == tokenizer.get_vocab()["<pad>"]
    with pytest.warns(UserWarning, match="padding with EOS"):
        assert resolve_pad_id(tokenizer, embedding_rows=5) == tokenizer.eos_token_id
    with pytest.raises(ModelError) as caught:
        resolve_pad_id(tokenizer, embedding_rows=1)
    assert caught.value.code == "RF3041"
