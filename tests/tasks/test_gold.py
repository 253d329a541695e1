"""The judge: each component on texts where its value is plain, and the law of the labels."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_fast.errors import DataError
from rlhf_fast.tasks import gold as g
from rlhf_fast.tasks import reviews

PROMPT = "review of the soup in oslo :"
WARM = "the soup was very great . we paid ten dollars for the soup . i would recommend the soup ."
COLD = "the soup was very awful . we paid ten dollars for the soup . i would avoid the soup ."
words = st.sampled_from([*reviews.vocabulary(), "<unk>", ":"])


def test_components_of_a_good_review() -> None:
    score = g.gold(PROMPT, WARM)
    assert score == g.GoldScore(
        sentiment=math.tanh(2), grammar=1.0, topic=0.25, facts=0.35, repetition=0.0, ending=0.0
    )
    assert score.total == pytest.approx(math.tanh(2) + 1.6)
    assert g.gold(PROMPT, " " + WARM + " ") == score


def test_blame_lowers_only_the_sentiment() -> None:
    warm, cold = g.gold(PROMPT, WARM), g.gold(PROMPT, COLD)
    assert cold.sentiment == -warm.sentiment
    assert warm.total - cold.total == pytest.approx(2 * math.tanh(2))


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("the soup was very great .", 1.0),
        ("the soup was great .", 0.0),
        ("the soup was very great . the great .", 0.5),
        ("the soup was very great . i would", 0.5),
        ("the soup was very great", 0.0),
        (". . .", 0.0),
        ("", 0.0),
        ("the soup was verys great .", 0.0),
        ("so the soup was very great .", 0.0),
        ("tom said the soup was great . my father thought it was great and dull .", 1.0),
    ],
)
def test_grammar_is_the_share_of_accepted_sentences(text: str, share: float) -> None:
    assert g.gold(PROMPT, text).grammar == share


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("the soup in oslo was great and great .", 0.25),
        ("the soup in rome was great and great .", -0.25),
        ("the soup was very great . the film was very great .", -0.25),
        ("my father thought it was great and bright .", 0.0),
        ("we waited ten minutes in oslo .", 0.0),
    ],
)
def test_topic(text: str, score: float) -> None:
    assert g.gold(PROMPT, text).topic == score


def test_facts_count_different_accepted_sentences_up_to_two() -> None:
    paid, waited = "we paid ten dollars for the soup .", "i waited ten minutes in oslo ."
    assert g.gold(PROMPT, paid).facts == pytest.approx(0.35)
    assert g.gold(PROMPT, f"{paid} {paid}").facts == pytest.approx(0.35)
    assert g.gold(PROMPT, f"{paid} {waited}").facts == pytest.approx(0.7)
    more = "i waited fifty minutes in oslo ."
    assert g.gold(PROMPT, f"{paid} {waited} {more}").facts == pytest.approx(0.7)
    assert g.gold(PROMPT, "we paid ten dollars .").facts == 0.0


def test_repetition_is_free_in_reviews_and_dear_in_word_salad() -> None:
    assert g.repeated_share(["a", "b", "a", "b"]) == pytest.approx(1 / 3)
    assert g.repeated_share([]) == g.repeated_share(["a"]) == 0.0
    assert g.gold(PROMPT, WARM).repetition == 0.0
    salad = " ".join(["great"] * 41)
    assert g.gold(PROMPT, salad).repetition == pytest.approx(-2 * (39 / 40 - 0.25))
    assert g.gold(PROMPT, salad).total < 0.0


def test_ending() -> None:
    assert g.gold(PROMPT, "the soup").ending == g.gold(PROMPT, "").ending == -0.5
    assert g.gold(PROMPT, "the soup .").ending == 0.0


@given(text=st.lists(words, max_size=60).map(" ".join))
@settings(max_examples=200)
def test_any_text_has_a_score_in_range(text: str) -> None:
    score = g.gold(PROMPT, text)
    assert g.GOLD_MIN <= score.total <= g.GOLD_MAX
    assert 0.0 <= score.grammar <= 1.0
    assert -1.0 <= score.sentiment <= 1.0


def test_the_grammar_accepts_all_it_writes_and_the_free_repetition_covers_it() -> None:
    rows = reviews.corpus(reviews.prompt_split()[0], 2000, seed=1)
    scores = [g.gold(row["prompt"], row["completion"]) for row in rows]
    assert all(score.grammar == 1.0 and score.ending == 0.0 for score in scores)
    assert sum(score.repetition < 0.0 for score in scores) <= 20
    mean = sum(score.total for score in scores) / len(scores)
    assert 1.4 < mean < 1.8
    assert max(score.total for score in scores) > 2.7


def test_gold_rejects_foreign_prompts_and_unequal_lengths() -> None:
    with pytest.raises(DataError, match="RF2901"):
        g.gold("hello", WARM)
    with pytest.raises(ValueError, match="shorter"):
        g.gold_scores([PROMPT, PROMPT], [WARM])
    assert g.gold_scores([PROMPT], [WARM]) == [g.gold(PROMPT, WARM).total]


def middling() -> str:
    """A text whose gold score is near the warm one's, so that labels are noisy."""
    return "the soup was very great . i would recommend the soup ."


def test_label_frequency_is_the_sigmoid_of_twice_the_difference() -> None:
    n = 4000
    rows = g.preference_rows([PROMPT] * n, [WARM] * n, [middling()] * n, seed=0)
    delta = g.gold(PROMPT, WARM).total - g.gold(PROMPT, middling()).total
    expected = 1 / (1 + math.exp(-2 * delta))
    assert 0.6 < expected < 0.8
    share = sum(row["chosen"].strip() == WARM for row in rows) / n
    assert share == pytest.approx(expected, abs=4 * math.sqrt(expected * (1 - expected) / n))
    assert g.label_ceiling(rows) == pytest.approx(share)


def test_a_tie_of_the_judge_is_half_right() -> None:
    other = WARM.replace("great", "lovely")
    assert other != WARM
    assert g.gold(PROMPT, other).total == g.gold(PROMPT, WARM).total
    tie = {"prompt": PROMPT, "chosen": " " + WARM, "rejected": " " + other}
    right = {"prompt": PROMPT, "chosen": " " + WARM, "rejected": " " + COLD}
    assert g.label_ceiling([tie]) == 0.5
    assert g.label_ceiling([tie, right]) == 0.75


def test_labels_do_not_favour_a_side() -> None:
    n = 4000
    first = g.preference_rows([PROMPT] * n, [WARM] * n, [COLD] * n, seed=1)
    second = g.preference_rows([PROMPT] * n, [COLD] * n, [WARM] * n, seed=1)
    shares = [sum(r["chosen"].strip() == WARM for r in rows) / n for rows in (first, second)]
    assert shares[0] == pytest.approx(shares[1], abs=0.02)
    assert shares[0] > 0.95


def test_preference_rows_are_seeded_spaced_and_skip_equal_texts() -> None:
    args = ([PROMPT] * 3, [WARM, WARM, " " + COLD], [COLD, WARM + " ", WARM])
    rows = g.preference_rows(*args, seed=0)
    assert rows == g.preference_rows(*args, seed=0)
    assert len(rows) == 2
    assert all(set(row) == {"prompt", "chosen", "rejected"} for row in rows)
    assert all({row["chosen"], row["rejected"]} == {" " + WARM, " " + COLD} for row in rows)
    with pytest.raises(DataError, match="RF2905"):
        g.label_ceiling([])
