"""The grammar of the reviews task: determinism, splits, shapes and files."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_fast.errors import DataError
from rlhf_fast.tasks import reviews


@given(seed=st.integers(0, 1000), held_out=st.integers(0, 48))
def test_split_covers_all_prompts_once_and_keeps_every_word_in_training(
    seed: int, held_out: int
) -> None:
    train, held = reviews.prompt_split(seed, held_out)
    assert len(held) == held_out
    assert sorted(train + held) == sorted(topic.prompt for topic in reviews.all_topics())
    topics = [reviews.parse_prompt(prompt) for prompt in train]
    assert {topic.noun for topic in topics} == set(reviews.NOUNS)
    assert {topic.city for topic in topics} == set(reviews.CITIES)


def test_default_split_tests_every_noun_and_two_cities_or_more() -> None:
    train, held = reviews.prompt_split()
    assert (len(train), len(held)) == (80, 16)
    topics = [reviews.parse_prompt(prompt) for prompt in held]
    assert {topic.noun for topic in topics} == set(reviews.NOUNS)
    assert len({topic.city for topic in topics}) == len(reviews.CITIES)


def test_split_depends_on_the_seed_and_refuses_to_starve_training() -> None:
    assert reviews.prompt_split(0) != reviews.prompt_split(1)
    with pytest.raises(DataError, match="RF2902"):
        reviews.prompt_split(0, held_out=49)


@given(seed=st.integers(0, 10_000))
def test_reviews_have_two_to_four_sentences_on_topic_within_the_word_bounds(seed: int) -> None:
    rng = random.Random(seed)
    topic = rng.choice(reviews.all_topics())
    words = reviews.write_review(topic, rng).split()
    assert 2 <= words.count(".") <= 4
    assert words[-1] == "."
    assert len(words) <= reviews.MAX_COMPLETION_WORDS
    assert len(topic.prompt.split()) == reviews.PROMPT_WORDS
    assert not (set(words) & set(reviews.NOUNS)) - {topic.noun}
    assert not (set(words) & set(reviews.CITIES)) - {topic.city}
    assert set(words) <= set(reviews.vocabulary())


def test_every_template_is_written_and_every_word_used() -> None:
    rows = reviews.corpus(reviews.prompt_split()[0], 4000, seed=0)
    text = "".join(row["prompt"] + row["completion"] + "\n" for row in rows)
    assert set(text.split()) == set(reviews.vocabulary())
    sentences = [s.strip() + " ." for row in rows for s in row["completion"].split(".")[:-1]]
    for kind, pattern in reviews.sentence_patterns().items():
        share = sum(bool(pattern.fullmatch(sentence)) for sentence in sentences) / len(rows)
        # 3 of 6 kinds in a review on average.
        assert 0.45 < share < 0.55, kind


def test_the_corpus_is_a_mixture_of_moods() -> None:
    rows = reviews.corpus(reviews.prompt_split()[0], 4000, seed=0)
    shares = []
    for row in rows:
        words = row["completion"].split()
        praise = sum(word in reviews.POSITIVE for word in words)
        blame = sum(word in reviews.NEGATIVE for word in words)
        if praise + blame >= 3:
            shares.append(praise / (praise + blame))
    one_sided = sum(share in (0.0, 1.0) for share in shares) / len(shares)
    assert 0.45 < sum(shares) / len(shares) < 0.55
    # Independent fair adjectives would be one-sided in a quarter of the cases at most.
    assert 0.4 < one_sided < 0.9


def test_corpus_is_a_function_of_its_seed_and_balances_prompts() -> None:
    train, _ = reviews.prompt_split()
    rows = reviews.corpus(train, 200, seed=3)
    assert rows == reviews.corpus(train, 200, seed=3)
    assert rows != reviews.corpus(train, 200, seed=4)
    counts = {prompt: sum(row["prompt"] == prompt for row in rows) for prompt in train}
    assert set(counts.values()) == {2, 3}
    assert all(set(row) == {"prompt", "completion"} for row in rows)
    assert all(row["completion"][0] == " " != row["completion"][1] for row in rows)


def test_first_rows_are_pinned() -> None:
    """Same seed, same corpus, on every machine and Python: figures of the demo rest on it."""
    rows = reviews.corpus(reviews.prompt_split()[0], 2, seed=0)
    assert [row["prompt"] + row["completion"] for row in rows] == [
        "review of the train in dublin : i would avoid the train in dublin . maria said the train "
        "was dull . my uncle thought the train was quite dull . the train in dublin was rude and "
        "dirty .",
        "review of the hotel in rome : peter said the hotel was brilliant . the hotel in rome was "
        "tasty and slow . my sister thought the hotel was very rude . i would avoid the hotel .",
    ]


@pytest.mark.parametrize(
    "prompt", ["", "review of the moon in rome :", "review of the soup in rome", "hello"]
)
def test_foreign_prompts_are_refused(prompt: str) -> None:
    with pytest.raises(DataError, match="RF2901"):
        reviews.parse_prompt(prompt)
    with pytest.raises(DataError, match="RF2901"):
        reviews.corpus([prompt], 1, seed=0)


def test_no_prompts_is_an_error() -> None:
    with pytest.raises(DataError, match="RF2903"):
        reviews.corpus([], 1, seed=0)


def test_files_hold_what_the_functions_return(tmp_path: Path) -> None:
    files = reviews.write_datasets(tmp_path / "new" / "data", sft_rows=50, eval_rows=20, seed=5)
    rows = {
        name: [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        for name, path in files.items()
    }
    train, held = reviews.prompt_split(5)
    assert rows["sft_train"] == reviews.corpus(train, 50, 5)
    assert rows["sft_eval"] == reviews.corpus(held, 20, 6)
    assert [row["prompt"] for row in rows["prompts_train"]] == train
    assert [row["prompt"] for row in rows["prompts_eval"]] == held
    assert {path.name for path in (tmp_path / "new" / "data").iterdir()} == {
        "sft_train.jsonl", "sft_eval.jsonl", "prompts_train.jsonl", "prompts_eval.jsonl"
    }  # fmt: skip


def test_writing_over_a_file_never_leaves_half_of_it(tmp_path: Path) -> None:
    path = reviews.write_jsonl(tmp_path / "a.jsonl", [{"a": 1}])

    def broken_rows() -> list[dict[str, int]]:
        raise RuntimeError("the writer died")

    with pytest.raises(RuntimeError):
        reviews.write_jsonl(path, (row for row in broken_rows()))
    assert path.read_text() == '{"a": 1}\n'
