"""Records to tokens: masks, EOS, lengths, and what the report counts."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import normalizers
from transformers import PreTrainedTokenizerFast

from rlhf_fast.config import DataConfig
from rlhf_fast.data.dataset import (
    LoadedData,
    load_preferences,
    load_prompts,
    load_sft,
    warn_overlap,
)
from rlhf_fast.data.examples import LoadOptions
from rlhf_fast.errors import DataError

Tok = PreTrainedTokenizerFast
U, A = "user", "assistant"


def messages(*contents: str) -> list[dict[str, str]]:
    return [{"role": (U, A)[i % 2], "content": c} for i, c in enumerate(contents)]


def pair(prompt: str, chosen: str, rejected: str, **more: Any) -> dict[str, Any]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **more}


def learnt(tokenizer: Tok, example: Any) -> str:
    return str(tokenizer.decode(example.ids[example.loss_mask]))


def test_completion_is_learnt_through_eos(bpe: Tok) -> None:
    data = load_sft([{"prompt": "what is it?", "completion": " a cat"}], bpe)
    example = data[0]
    assert learnt(bpe, example) == " a cat<|im_end|>"
    assert bpe.decode(example.ids[~example.loss_mask]) == "what is it?"
    assert example.ids[-1] == bpe.eos_token_id
    assert example.weight == 1.0
    assert example.origin == "<list in memory>[0]"


def test_conversation_masks_the_prompt_messages_only(bpe: Tok) -> None:
    whole = load_sft([{"messages": messages("a", "b", "c", "d")}], bpe)[0]
    split = load_sft(
        [{"prompt": messages("a", "b", "c"), "completion": [{"role": A, "content": "d"}]}], bpe
    )[0]
    assert whole.ids.tolist() == split.ids.tolist()
    assert learnt(bpe, whole) == "b<|im_end|>d<|im_end|>"
    assert learnt(bpe, split) == "d<|im_end|>"


def test_text_is_learnt_whole_except_its_first_token(bos_bpe: Tok, bpe: Tok) -> None:
    with_bos = load_sft([{"text": "the cat"}], bos_bpe)[0]
    assert bos_bpe.decode(with_bos.ids) == "<bos>the cat<eos>"
    assert learnt(bos_bpe, with_bos) == "the cat<eos>"
    assert load_sft([{"text": "the cat"}], bpe)[0].loss_mask.tolist()[0] is False


def test_single_bos_and_no_tokenizer_eos_inside(bos_bpe: Tok) -> None:
    example = load_sft([{"prompt": "the", "completion": " cat"}], bos_bpe)[0]
    assert bos_bpe.decode(example.ids) == "<bos>the cat<eos>"


def test_word_start_tokenizer_puts_no_space_into_a_continuation(metaspace: Tok) -> None:
    example = load_sft([{"prompt": "the", "completion": " cat"}], metaspace)[0]
    assert metaspace.decode(example.ids[:-1]) == "the cat"


@given(
    prompt=st.text(alphabet="the cat.\n<", min_size=1, max_size=12).filter(lambda t: t.strip()),
    completion=st.text(alphabet="the cat.\n<", min_size=1, max_size=12).filter(lambda t: t.strip()),
)
@settings(max_examples=100, deadline=None)
def test_prompt_and_completion_round_trip(bpe: Tok, prompt: str, completion: str) -> None:
    example = load_sft([{"prompt": prompt, "completion": completion}], bpe)[0]
    assert bpe.decode(example.ids) == prompt + completion + "<|im_end|>"
    assert learnt(bpe, example) == completion + "<|im_end|>"
    # The policy sees exactly these ids as its prompt.
    seen = load_prompts([{"prompt": prompt}], bpe)[0].ids.tolist()
    assert example.ids.tolist()[: len(seen)] == seen


@pytest.mark.parametrize("load", [load_sft, load_preferences, load_prompts])
def test_special_tokens_in_rows_never_become_control_tokens(bpe: Tok, load: Any) -> None:
    evil = "x<|im_end|><|im_start|>"
    row = pair(evil, "a" + evil, "b" + evil, completion=evil)
    example = load([row], bpe)[0]
    tensors = [example.ids] if hasattr(example, "ids") else example.sequences()
    end, start = bpe.convert_tokens_to_ids(["<|im_end|>", "<|im_start|>"])
    for tensor in tensors:
        ids = tensor.tolist()
        assert start not in ids
        assert ids.count(end) == (0 if load is load_prompts else 1)


def test_preference_pair_and_margin(bpe: Tok) -> None:
    example = load_preferences([pair("q", " good", " bad", margin=1.5)], bpe)[0]
    assert bpe.decode(example.prompt_ids) == "q"
    assert [bpe.decode(c) for c in example.completions] == [" good<|im_end|>", " bad<|im_end|>"]
    assert example.margin == 1.5
    assert [bpe.decode(s) for s in example.sequences()] == ["q good<|im_end|>", "q bad<|im_end|>"]
    assert len(example) == sum(s.numel() for s in example.sequences())


def test_pairwise_is_ranked_with_two(bpe: Tok) -> None:
    two = load_preferences([pair("q", " a", " b")], bpe)[0]
    ranked = load_preferences([{"prompt": "q", "completions": [" b", " a"], "ranks": [2, 1]}], bpe)
    assert two.key == ranked[0].key
    four = load_preferences([{"prompt": "q", "completions": [" a", " b", " c", " d"]}], bpe)[0]
    assert [bpe.decode(c) for c in four.completions] == [f" {c}<|im_end|>" for c in "abcd"]


def test_preference_messages_share_the_prompt_ids(bpe: Tok) -> None:
    chosen, rejected = messages("q", "a", "r", "good one"), messages("q", "a", "r", "bad")
    example = load_preferences([{"chosen": chosen, "rejected": rejected}], bpe)[0]
    prompt = load_prompts([{"prompt": messages("q", "a", "r")}], bpe)[0]
    assert example.prompt_ids.tolist() == prompt.ids.tolist()
    texts = [bpe.decode(c) for c in example.completions]
    assert texts == ["good one<|im_end|>", "bad<|im_end|>"]


def test_prompt_keeps_columns_and_a_stable_uid(bpe: Tok) -> None:
    rows = [{"prompt": "a", "answer": 1}, {"prompt": "b"}, {"prompt": "a"}]
    data = load_prompts(rows, bpe)
    assert data[0].text == "a"
    assert data[0].row == {"answer": 1}
    uids = [e.uid for e in data.examples]
    assert len(set(uids)) == 3
    assert uids == [e.uid for e in load_prompts(rows, bpe).examples]
    assert all(0 <= u < 2**63 for u in uids)
    # A bad row before it does not shift a prompt's uid: the row number counts, not the survivors.
    worse = load_prompts([{"prompt": 3}, *rows[1:]], bpe, LoadOptions(on_bad_row="skip"))
    assert [e.uid for e in worse.examples] == uids[1:]
    chat = load_prompts([{"prompt": messages("hi"), "answer": 2}], bpe)[0]
    assert chat.row["prompt"] == messages("hi")
    assert chat.text.endswith("assistant\n")


LONG = "the cat sat on the mat and the dog barked . " * 4


@pytest.mark.parametrize(
    ("load", "row", "key"),
    [
        (load_prompts, {"prompt": LONG}, "data.max_prompt_length=12"),
        (load_sft, {"prompt": LONG, "completion": " yes"}, "data.max_length=20"),
        (load_preferences, pair(LONG, " yes", " no"), "data.max_length=20"),
    ],
)
def test_overlong_policies(bpe: Tok, load: Any, row: dict[str, Any], key: str) -> None:
    short = pair("q", " yes", " no", completion=" yes")
    sizes = {"max_prompt_length": 12, "max_length": 20}
    with pytest.raises(DataError) as caught:
        load([short, row], bpe, LoadOptions(overlong="error", **sizes))
    assert caught.value.code == "RF2050"
    assert caught.value.where == "<list in memory>[1]"
    assert key in caught.value.expected
    assert "data.overlong" in caught.value.remedy
    with pytest.raises(DataError) as skipping:  # which is about rows that cannot be read
        load([short, row], bpe, LoadOptions(overlong="error", on_bad_row="skip", **sizes))
    assert skipping.value.code == "RF2050"

    filtered = load([short, row], bpe, LoadOptions(overlong="filter", **sizes))
    assert len(filtered) == 1
    assert filtered.report.filtered == {"overlong": 1}
    assert "left out, overlong: 1" in "\n".join(filtered.report.lines())

    cut = load([short, row], bpe, LoadOptions(overlong="truncate-left", **sizes))
    assert len(cut) == 2
    assert cut.report.truncated == {"prompt": 1}
    if load is load_prompts:
        assert cut[1].ids.numel() == 12
        assert cut[1].text == bpe.decode(cut[1].ids)
        assert LONG.endswith(cut[1].text)
    elif load is load_sft:
        assert len(cut[1]) == 20
        assert learnt(bpe, cut[1]) == " yes<|im_end|>"
    else:
        assert max(s.numel() for s in cut[1].sequences()) == 20
        assert [bpe.decode(c) for c in cut[1].completions] == [" yes<|im_end|>", " no<|im_end|>"]


def test_bos_survives_truncation(bos_bpe: Tok) -> None:
    options = LoadOptions(overlong="truncate-left", max_prompt_length=8, max_length=12)
    assert load_prompts([{"prompt": LONG}], bos_bpe, options)[0].ids[0] == bos_bpe.bos_token_id
    sft = load_sft([{"prompt": LONG, "completion": " yes"}], bos_bpe, options)[0]
    assert sft.ids[0] == bos_bpe.bos_token_id
    assert len(sft) == 12


def test_a_cut_prompt_reads_like_a_whole_one(bos_bpe: Tok) -> None:
    """What the tokenizer adds is no part of the text that a reward function gets."""
    options = LoadOptions(overlong="truncate-left", max_prompt_length=8, max_length=12)
    example = load_prompts([{"prompt": LONG}], bos_bpe, options)[0]
    assert example.ids[0] == bos_bpe.bos_token_id
    assert LONG.endswith(example.text)


def test_overlong_response_is_cut_on_the_right_and_counted(bpe: Tok) -> None:
    options = LoadOptions(overlong="truncate-left", max_length=10)
    data = load_sft([{"prompt": "what is it", "completion": " " + LONG}], bpe, options)
    assert len(data[0]) == 10
    assert data.report.truncated == {"prompt": 1, "response": 1}
    assert data[0].loss_mask.tolist() == [False] + [True] * 9
    assert bpe.eos_token_id not in data[0].ids
    preference = load_preferences([pair("what is it", " " + LONG, " no")], bpe, options)
    assert preference.report.truncated == {"prompt": 1, "response": 1}
    assert len(preference[0].sequences()[0]) == 10


def test_completions_equal_after_truncation_are_no_preference(bpe: Tok) -> None:
    options = LoadOptions(overlong="truncate-left", max_length=8)
    rows = [pair("q", LONG + "x", LONG + "y"), *[pair("q", " a", " b")] * 2]
    data = load_preferences(rows, bpe, options)
    assert data.report.filtered == {"identical completions": 1}


def test_example_without_a_label_weighs_nothing_and_is_counted(make_words: Any) -> None:
    tokenizer = make_words("the cat")
    # Its normaliser leaves nothing of the first row, so that only EOS remains.
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("?", "")
    rows = [{"text": "???"}, {"text": "the cat"}]
    data = load_sft(rows, tokenizer)
    assert data[0].weight == 0.0
    assert not data[0].loss_mask.any()
    assert data.report.zero_weight == 1
    assert "weight 0" in "\n".join(data.report.lines())
    with pytest.raises(DataError) as caught:
        load_prompts([{"prompt": "???"}], tokenizer)
    assert caught.value.code == "RF2051"
    assert caught.value.where == "<list in memory>[0]"


def test_empty_prompt_is_an_error_or_counted(bpe: Tok) -> None:
    rows = [{"prompt": "a"}, {"prompt": " "}]
    with pytest.raises(DataError) as caught:
        load_prompts(rows, bpe)
    assert caught.value.code == "RF2025"
    assert caught.value.where == "<list in memory>[1]"
    data = load_prompts(rows, bpe, LoadOptions(on_bad_row="skip"))
    assert data.report.filtered == {"bad row": 1}
    assert "'prompt' is empty" in data.report.bad_rows[0]


def test_identical_pairs_are_dropped_and_counted(bpe: Tok) -> None:
    rows = [pair("q", " a", " b"), pair("q", " a", " c"), pair("q", " x", " x")]
    data = load_preferences(rows, bpe)
    assert len(data) == 2
    assert data.report.filtered == {"identical completions": 1}
    assert data.report.read == data.report.kept + sum(data.report.filtered.values())


def test_mostly_identical_pairs_are_an_error(bpe: Tok) -> None:
    rows = [pair("q", " a", " b"), *[pair("q", " x", " x")] * 2]
    with pytest.raises(DataError) as caught:
        load_preferences(rows, bpe)
    assert caught.value.code == "RF2028"
    assert "2 of 3 rows" in caught.value.what
    assert "chosen and rejected" in caught.value.remedy
    half = [pair("q", " a", " b"), pair("q", " x", " x")]
    assert len(load_preferences(half, bpe)) == 1


def test_duplicate_completions_in_a_ranked_list_keep_the_better(bpe: Tok) -> None:
    row = {"prompt": "q", "completions": [" a", " b", " a"], "scores": [1, 2, 3]}
    data = load_preferences([row], bpe)
    assert [bpe.decode(c) for c in data[0].completions] == [" a<|im_end|>", " b<|im_end|>"]
    ties = load_preferences([row | {"scores": [1, 2, 1]}], bpe)
    assert ties.report.ties == 1


def test_no_usable_row(bpe: Tok) -> None:
    options = LoadOptions(max_prompt_length=2, on_bad_row="skip")
    with pytest.raises(DataError) as caught:
        load_prompts([{"prompt": LONG}, {"prompt": None}], bpe, options)
    assert caught.value.code == "RF2004"
    assert "0 of 2 rows are usable: 1 bad row, 1 overlong" in caught.value.what
    assert "<list in memory>[1]" in caught.value.what


def test_missing_template_names_the_row(words: Tok) -> None:
    with pytest.raises(DataError) as caught:
        load_prompts([{"prompt": messages("the cat")}], words)
    assert caught.value.code == "RF2040"
    assert caught.value.where == "<list in memory>[0]"


def test_columns_are_renamed(bpe: Tok) -> None:
    options = LoadOptions(columns={"prompt": "question", "completion": "answer"})
    data = load_sft([{"question": "q", "answer": " a"}], bpe, options)
    assert bpe.decode(data[0].ids) == "q a<|im_end|>"


def test_renamed_columns_may_change_places(bpe: Tok) -> None:
    options = LoadOptions(columns={"chosen": "rejected", "rejected": "chosen"})
    data = load_preferences([pair("q", " bad", " good")], bpe, options)
    assert bpe.decode(data[0].completions[0]) == " good<|im_end|>"
    options = LoadOptions(columns={"rejected": "chosen", "chosen": "best"})
    data = load_preferences([{"prompt": "q", "chosen": " worse", "best": " top"}], bpe, options)
    assert [bpe.decode(c) for c in data[0].completions] == [" top<|im_end|>", " worse<|im_end|>"]


def test_duplicates_and_overlap_are_counted(bpe: Tok) -> None:
    train = load_prompts([{"prompt": p} for p in ("a", "b", "a")], bpe)
    assert train.report.duplicates == 1
    held_out = load_prompts([{"prompt": p} for p in ("b", "c")], bpe, name="eval")
    assert warn_overlap(train, held_out) == 1
    assert "1 of 2 evaluation rows" in held_out.report.warnings[0]
    clean = load_prompts([{"prompt": "z"}], bpe, name="eval")
    assert warn_overlap(train, clean) == 0
    assert clean.report.warnings == []


def test_report_counts_tokens(bpe: Tok) -> None:
    data = load_sft(
        [{"prompt": "q", "completion": " a"}, {"prompt": "qq", "completion": " a"}], bpe
    )
    report = data.report
    assert report.tokens == sum(len(e) for e in data.examples)
    assert report.loss_tokens == sum(int(e.loss_mask.sum()) for e in data.examples)
    assert report.longest == max(len(e) for e in data.examples)
    assert report.to_dict()["kept"] == 2
    assert report.lines()[0].startswith("train: 2 of 2 rows kept")


def test_fingerprint_follows_what_training_sees(bpe: Tok) -> None:
    def of(*rows: dict[str, Any]) -> str:
        data: LoadedData[Any] = load_prompts(list(rows), bpe)
        return data.fingerprint

    base = of({"prompt": "a", "answer": 1}, {"prompt": "b"})
    assert base == of({"answer": 1, "prompt": "a"}, {"prompt": "b"})
    assert base != of({"prompt": "b"}, {"prompt": "a", "answer": 1})
    assert base != of({"prompt": "a", "answer": 2}, {"prompt": "b"})
    assert base != of({"prompt": "a", "answer": 1}, {"prompt": "c"})


def test_options_from_the_config() -> None:
    config = DataConfig(max_length=64, overlong="error", on_bad_row="skip", max_bad_rows=3)
    options = LoadOptions.from_config(config, columns={"prompt": "q"})
    assert (options.max_length, options.overlong, options.max_bad_rows) == (64, "error", 3)
    assert options.columns == {"prompt": "q"}
