"""Tokenizer and model of the reviews task as Hugging Face objects."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf_fast.tasks import reviews, tiny


@pytest.fixture(scope="module")
def tokenizer() -> tiny.PreTrainedTokenizerFast:
    return tiny.build_tokenizer()


def test_special_tokens_are_four_different_ids(tokenizer: tiny.PreTrainedTokenizerFast) -> None:
    ids = [
        tokenizer.pad_token_id,
        tokenizer.bos_token_id,
        tokenizer.eos_token_id,
        tokenizer.unk_token_id,
    ]
    assert ids == [0, 1, 2, 3]
    assert len(tokenizer) == len(reviews.vocabulary()) + 4


def test_texts_of_the_grammar_round_trip_and_nothing_is_added(
    tokenizer: tiny.PreTrainedTokenizerFast,
) -> None:
    for row in reviews.corpus(reviews.prompt_split()[0], 50, seed=0):
        text = row["prompt"] + row["completion"]
        ids = tokenizer(text)["input_ids"]
        assert len(ids) == len(text.split())
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids) == text
        parts = tokenizer(row["prompt"])["input_ids"] + tokenizer(row["completion"])["input_ids"]
        assert parts == ids


def test_decoding_can_drop_special_tokens(tokenizer: tiny.PreTrainedTokenizerFast) -> None:
    ids = [*tokenizer("the soup .")["input_ids"], tokenizer.eos_token_id, tokenizer.pad_token_id]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "the soup ."
    assert tokenizer("moon soup")["input_ids"][0] == tokenizer.unk_token_id


def test_ids_do_not_depend_on_the_run(tokenizer: tiny.PreTrainedTokenizerFast) -> None:
    assert tiny.build_tokenizer().get_vocab() == tokenizer.get_vocab()
    assert "moon" in tiny.build_tokenizer(["moon soup"]).get_vocab()


def test_directory_loads_in_transformers_with_equal_logits(
    tokenizer: tiny.PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = tiny.build_model(tokenizer, seed=1).eval()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert (tmp_path / "tokenizer.json").is_file()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    words = AutoTokenizer.from_pretrained(tmp_path)
    batch = words(reviews.prompt_split()[1][:4], return_tensors="pt")
    ids = batch["input_ids"]
    assert words.get_vocab() == tokenizer.get_vocab()
    assert words.padding_side == "left"
    with torch.no_grad():
        assert torch.equal(loaded.eval()(input_ids=ids).logits, model(input_ids=ids).logits)
    assert loaded.config.eos_token_id == words.eos_token_id
    assert loaded.generation_config.pad_token_id == words.pad_token_id


def test_model_is_small_seeded_and_long_enough(tokenizer: tiny.PreTrainedTokenizerFast) -> None:
    torch.manual_seed(9)
    state = torch.get_rng_state()
    first, same, other = (tiny.build_model(tokenizer, seed) for seed in (0, 0, 1))
    assert torch.equal(state, torch.get_rng_state())
    assert 300_000 < first.num_parameters() < 400_000
    pairs = list(zip(first.parameters(), same.parameters(), other.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b, _ in pairs)
    assert not all(torch.equal(a, c) for a, _, c in pairs)
    longest = reviews.PROMPT_WORDS + reviews.MAX_COMPLETION_WORDS + 1
    assert longest <= first.config.max_position_embeddings
