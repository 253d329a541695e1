"""The judge of the reviews task: a rule-based gold score and the noisy preferences drawn from it.

The gold score plays the human whose preferences the reward model only estimates. Because it is a
rule, it can be asked about every sample of every policy, which no human can: that makes
over-optimising measurable (Gao, Schulman and Hilton 2022 use a large "gold" reward model the same
way). No stage of training may read it except through noisy labels.
"""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf_fast.errors import DataError
from rlhf_fast.tasks.reviews import (
    BLAME_VERBS,
    CITIES,
    FACT_KINDS,
    NEGATIVE,
    NOUNS,
    POSITIVE,
    PRAISE_VERBS,
    Topic,
    parse_prompt,
    sentence_patterns,
)

#: Labels are Bernoulli(sigmoid(PREFERENCE_SHARPNESS * (gold_a - gold_b))).
PREFERENCE_SHARPNESS = 2.0

TOPIC_WEIGHT = 0.25
FACT_WEIGHT = 0.35
MAX_FACTS = 2
REPETITION_WEIGHT = 2.0
# Word pairs such as "the soup" recur in good reviews: the grammar's own reviews have a share of
# repeated pairs below this in 99 of 100 cases.
FREE_REPETITION = 0.25
ENDING_WEIGHT = 0.5

GOLD_MIN = -1.0 - TOPIC_WEIGHT - REPETITION_WEIGHT * (1.0 - FREE_REPETITION) - ENDING_WEIGHT
GOLD_MAX = 1.0 + 1.0 + TOPIC_WEIGHT + FACT_WEIGHT * MAX_FACTS

_PRAISE = frozenset(POSITIVE + PRAISE_VERBS)
_BLAME = frozenset(NEGATIVE + BLAME_VERBS)
_PATTERNS = sentence_patterns()


@dataclass(frozen=True)
class GoldScore:
    """The components of a gold score; `total` is their sum, in [GOLD_MIN, GOLD_MAX].

    Attributes:
        sentiment: tanh(praising words - blaming words), in (-1, 1).
        grammar: share of sentences that the grammar accepts, in [0, 1]. An unfinished last
            sentence counts as a sentence that is not accepted.
        topic: +0.25 if the reviewed noun is named and no other noun or city is; -0.25 if another
            one is; else 0.
        facts: 0.35 for each different accepted sentence about waiting or paying, at most two.
        repetition: -2 times the share of repeated word pairs beyond the free quarter, in [-1.5, 0].
        ending: -0.5 if the text does not end with a full stop, else 0.
    """

    sentiment: float
    grammar: float
    topic: float
    facts: float
    repetition: float
    ending: float

    @property
    def total(self) -> float:
        """The gold score."""
        return (
            self.sentiment + self.grammar + self.topic + self.facts + self.repetition + self.ending
        )


def gold(prompt: str, text: str) -> GoldScore:
    """Judge a completion.

    Args:
        prompt: a prompt of the reviews task.
        text: the completion without the prompt and without special tokens; words separated by white
            space, full stops included. Any text is legal, the empty one too.

    Raises:
        DataError: RF2901, `prompt` is not of this task.
    """
    topic = parse_prompt(prompt)
    words = text.split()
    sentences = split_sentences(words)
    kinds = [_kind(sentence) for sentence in sentences]
    facts = {s for s, kind in zip(sentences, kinds, strict=True) if kind in FACT_KINDS}
    praise = sum(word in _PRAISE for word in words)
    blame = sum(word in _BLAME for word in words)
    accepted = sum(kind is not None for kind in kinds)
    return GoldScore(
        sentiment=math.tanh(praise - blame),
        grammar=accepted / len(sentences) if sentences else 0.0,
        topic=_topic_score(topic, words),
        facts=FACT_WEIGHT * min(len(facts), MAX_FACTS),
        repetition=-REPETITION_WEIGHT * max(0.0, repeated_share(words) - FREE_REPETITION),
        ending=0.0 if words and words[-1] == "." else -ENDING_WEIGHT,
    )


def gold_scores(prompts: Sequence[str], texts: Sequence[str]) -> list[float]:
    """Total gold score of each `(prompt, text)`; the two sequences have the same length."""
    return [gold(prompt, text).total for prompt, text in zip(prompts, texts, strict=True)]


def gold_reward(prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
    """`gold_scores` as a reward function, for `reward.function` of an evaluation."""
    return gold_scores(prompts, completions)


def split_sentences(words: Sequence[str]) -> list[str]:
    """Cut a list of words after each full stop; a rest without one is a sentence of its own."""
    sentences: list[str] = []
    start = 0
    for index, word in enumerate(words):
        if word == ".":
            sentences.append(" ".join(words[start : index + 1]))
            start = index + 1
    if start < len(words):
        sentences.append(" ".join(words[start:]))
    return sentences


def repeated_share(words: Sequence[str]) -> float:
    """Share of adjacent word pairs that occurred before in the text, in [0, 1)."""
    pairs = Counter(itertools.pairwise(words))
    total = pairs.total()
    return 1.0 - len(pairs) / total if total else 0.0


def _kind(sentence: str) -> str | None:
    return next((kind for kind, p in _PATTERNS.items() if p.fullmatch(sentence)), None)


def _topic_score(topic: Topic, words: Sequence[str]) -> float:
    named = {word for word in words if word in NOUNS or word in CITIES}
    if named - {topic.noun, topic.city}:
        return -TOPIC_WEIGHT
    return TOPIC_WEIGHT if topic.noun in named else 0.0


def preference_rows(
    prompts: Sequence[str], first: Sequence[str], second: Sequence[str], seed: int
) -> list[dict[str, Any]]:
    """Label pairs of completions as a noisy human would.

    The first completion is chosen with probability sigmoid(2 * (gold_first - gold_second)), the
    Bradley-Terry model with gold scores as utilities.

    Args:
        prompts, first, second: sequences of one length; row i compares `first[i]` with `second[i]`.
        seed: draws the labels.

    Returns:
        Rows `{"prompt", "chosen", "rejected"}`; completions start with one space. Pairs of
        identical texts carry no information and are left out.
    """
    rng = random.Random(f"preferences-{seed}")
    rows = []
    for prompt, a, b in zip(prompts, first, second, strict=True):
        draw = rng.random()
        if a.split() == b.split():
            continue
        difference = gold(prompt, a).total - gold(prompt, b).total
        chosen, rejected = (a, b) if draw < _sigmoid(PREFERENCE_SHARPNESS * difference) else (b, a)
        rows.append({"prompt": prompt, "chosen": _spaced(chosen), "rejected": _spaced(rejected)})
    return rows


def label_ceiling(rows: Sequence[Mapping[str, Any]]) -> float:
    """Accuracy of the gold score itself on preference rows: what a perfect reward model reaches.

    A tie counts one half, as in a reward model's own accuracy: its label is a coin's.
    """
    if not rows:
        raise DataError("RF2905", "no preference rows to measure", where="rows")
    pairs = [[gold(row["prompt"], row[c]).total for c in ("chosen", "rejected")] for row in rows]
    return sum(0.5 if a == b else float(a > b) for a, b in pairs) / len(rows)


def _spaced(text: str) -> str:
    return " " + text.strip()


def _sigmoid(x: float) -> float:
    return 0.5 * (1.0 + math.tanh(0.5 * x))
