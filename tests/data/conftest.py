"""Tokenizers and templates built in process: no file, no hub."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = [
    "the cat sat on the mat and the dog barked",
    "hello there , how are you today ? i am fine , thank you .",
    "User: what is it? Assistant: it is a cat.",
] * 8

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
INST = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content | trim }} "
    "[/INST]{% elif m.role == 'assistant' %} {{ m.content | trim }} {{ eos_token }}"
    "{% else %}{{ raise_exception('only user and assistant') }}{% endif %}{% endfor %}"
)
# No end-of-turn token at all, and a generation prompt whose last space merges with the reply.
SPEAKERS = (
    "{% for m in messages %}{% if m.role == 'assistant' %}Assistant: {{ m.content }}\n"
    "{% else %}User: {{ m.content }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}Assistant: {% endif %}"
)
# Drops what earlier replies said, as templates of reasoning models do with their thoughts.
REWRITING = (
    "{% for m in messages %}{{ m.role }}:"
    "{% if m.role == 'user' or loop.last %}{{ m.content }}{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def byte_bpe(**kwargs: Any) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=["<pad>", "<eos>", "<|im_start|>", "<|im_end|>", "<bos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    named = {"eos_token": "<|im_end|>", "pad_token": "<pad>", "bos_token": "<bos>"} | kwargs
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, clean_up_tokenization_spaces=False, **named
    )


@pytest.fixture(scope="session")
def bpe() -> PreTrainedTokenizerFast:
    """Byte-level BPE, ChatML template, EOS `<|im_end|>`, adds nothing to a text."""
    tokenizer = byte_bpe()
    tokenizer.chat_template = CHATML
    return tokenizer


@pytest.fixture(scope="session")
def bos_bpe() -> PreTrainedTokenizerFast:
    """Byte-level BPE that puts <bos> before and <eos> after a text, without a chat template."""
    tokenizer = byte_bpe(eos_token="<eos>")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>",
        special_tokens=[(t, tokenizer.convert_tokens_to_ids(t)) for t in ("<bos>", "<eos>")],
    )
    return tokenizer


@pytest.fixture(scope="session")
def metaspace() -> PreTrainedTokenizerFast:
    """BPE that marks word starts with a space it also puts before the first word."""
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    backend.decoder = decoders.Metaspace(prepend_scheme="always")
    trainer = trainers.BpeTrainer(
        vocab_size=150, special_tokens=["<unk>", "<eos>"], show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<eos>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )


def word_level(words: str = "the cat sat on mat", **kwargs: Any) -> PreTrainedTokenizerFast:
    specials = ["<unk>", "<eos>"]
    vocabulary = {w: i for i, w in enumerate([*specials, *words.split()])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(specials)
    named = {"eos_token": "<eos>", "unk_token": "<unk>"} | kwargs
    return PreTrainedTokenizerFast(tokenizer_object=backend, **named)


@pytest.fixture(scope="session")
def words() -> PreTrainedTokenizerFast:
    """Word-level: the word `<eos>` is in its vocabulary like any other. No pad token."""
    return word_level()


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Write rows (one JSON line each) or raw bytes to a file and return its path."""

    def write_file(content: list[Any] | bytes, name: str = "data.jsonl") -> Path:
        path = tmp_path / name
        if not isinstance(content, bytes):
            content = "".join(json.dumps(row) + "\n" for row in content).encode()
        path.write_bytes(content)
        return path

    return write_file


@pytest.fixture(scope="session")
def make_words() -> Callable[..., PreTrainedTokenizerFast]:
    """Builds word-level tokenizers: words, then special tokens by keyword (None for none)."""
    return word_level


@pytest.fixture(scope="session")
def templates() -> dict[str, str]:
    """Chat templates by name: chatml, inst, speakers, rewriting."""
    return {"chatml": CHATML, "inst": INST, "speakers": SPEAKERS, "rewriting": REWRITING}


@pytest.fixture(scope="session")
def make_bpe() -> Callable[..., PreTrainedTokenizerFast]:
    """Builds byte-level tokenizers: special tokens by keyword (None for none)."""
    return byte_bpe
