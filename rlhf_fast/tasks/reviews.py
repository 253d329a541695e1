"""The demo task: a grammar that writes short product reviews.

A prompt names a thing and a city, `review of the soup in oslo :`; the completion is a review of two
to four sentences. Every review has a hidden mood, so the corpus is a mixture of warm, cold and
undecided texts and a model fitted to it has something to gain from feedback.

One table of sentence templates both writes the corpus and, compiled to regular expressions, judges
text (`rlhf_fast.tasks.gold`): what the grammar can write is exactly what it accepts.

Everything is a function of a seed. There are 12 x 8 = 96 prompts; 80 are for training and 16 are
held out (`prompt_split`), with every noun and every city on both sides, so that held-out prompts
are new combinations of familiar words.
"""

from __future__ import annotations

import json
import os
import random
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_fast.errors import DataError

NOUNS = (
    "pizza", "soup", "coffee", "hotel", "train", "museum",
    "garden", "phone", "chair", "jacket", "film", "bakery",
)  # fmt: skip
CITIES = ("athens", "dublin", "lisbon", "oslo", "paris", "prague", "rome", "vienna")
POSITIVE = (
    "great", "superb", "lovely", "friendly", "bright", "tasty", "clean", "charming", "brilliant",
)  # fmt: skip
NEGATIVE = (
    "awful", "terrible", "rude", "bland", "dirty", "noisy", "slow", "broken", "dull",
)  # fmt: skip
PRAISE_VERBS = ("recommend",)
BLAME_VERBS = ("avoid",)

# Slots of the templates. Noun and city come from the prompt, adjectives and verbs from the mood,
# the others are free.
SLOTS: Mapping[str, tuple[str, ...]] = {
    "noun": NOUNS,
    "city": CITIES,
    "adjective": POSITIVE + NEGATIVE,
    "verdict": PRAISE_VERBS + BLAME_VERBS,
    "degree": ("very", "quite", "really", "rather"),
    "aspect": ("price", "smell", "look", "service"),
    "family": ("father", "mother", "sister", "brother", "uncle"),
    "person": ("anna", "tom", "maria", "peter", "lucy"),
    "pronoun": ("i", "we"),
    "number": ("five", "ten", "fifteen", "twenty", "thirty", "forty", "fifty"),
}

# Six kinds of sentence; each kind is equally likely, then each wording within it.
TEMPLATES: Mapping[str, tuple[str, ...]] = {
    "opinion": (
        "the {noun} was {degree} {adjective} .",
        "the {noun} in {city} was {adjective} and {adjective} .",
        "the {aspect} of the {noun} was {adjective} .",
    ),
    "quote": ("{person} said the {noun} was {adjective} .",),
    "waited": (
        "{pronoun} waited {number} minutes for the {noun} .",
        "{pronoun} waited {number} minutes in {city} .",
    ),
    "paid": ("{pronoun} paid {number} dollars for the {noun} .",),
    "family": (
        "my {family} thought it was {adjective} and {adjective} .",
        "my {family} thought the {noun} was {degree} {adjective} .",
    ),
    "verdict": (
        "i would {verdict} the {noun} .",
        "i would {verdict} the {noun} in {city} .",
    ),
}
FACT_KINDS = ("waited", "paid")

PROMPT_TEMPLATE = "review of the {noun} in {city} :"
_SLOT = re.compile(r"\{(\w+)\}")
_PROMPT = re.compile(r"\s*review of the (\w+) in (\w+) :\s*")

# Chance that an adjective or verdict is positive, by hidden mood; the moods are equally likely.
MOODS: Mapping[str, float] = {"warm": 0.9, "undecided": 0.5, "cold": 0.1}
MIN_SENTENCES, MAX_SENTENCES = 2, 4

#: Upper bounds in words, so that a caller can size positions and response length.
PROMPT_WORDS = 7
MAX_COMPLETION_WORDS = 34


@dataclass(frozen=True)
class Topic:
    """What a prompt asks about."""

    noun: str
    city: str

    @property
    def prompt(self) -> str:
        """The prompt text for this topic."""
        return PROMPT_TEMPLATE.format(noun=self.noun, city=self.city)


def parse_prompt(prompt: str) -> Topic:
    """Read the topic out of a prompt.

    Raises:
        DataError: RF2901, the text is not a prompt of this task.
    """
    match = _PROMPT.fullmatch(prompt)
    if match is None or match[1] not in NOUNS or match[2] not in CITIES:
        raise DataError(
            "RF2901",
            "this is not a prompt of the reviews task",
            where=repr(prompt[:80]),
            expected=f"{PROMPT_TEMPLATE!r} with a known noun and city",
            remedy="take prompts from rlhf_fast.tasks.reviews.prompt_split()",
        )
    return Topic(match[1], match[2])


def vocabulary() -> list[str]:
    """Every word the grammar can write, sorted, without duplicates."""
    texts = [PROMPT_TEMPLATE, *(text for kind in TEMPLATES.values() for text in kind)]
    fixed = {word for text in texts for word in text.split() if not _SLOT.fullmatch(word)}
    return sorted(fixed.union(*SLOTS.values()))


def all_topics() -> list[Topic]:
    """The 96 topics, nouns outermost."""
    return [Topic(noun, city) for noun in NOUNS for city in CITIES]


def prompt_split(seed: int = 0, held_out: int = 16) -> tuple[list[str], list[str]]:
    """Split the prompts into training and held-out ones.

    The held-out prompts lie on shuffled diagonals of the noun x city table, so that no noun or city
    is absent from the training side.

    Args:
        seed: picks the split.
        held_out: how many prompts to hold out, 0 to 48.

    Returns:
        `(train, held_out)`: disjoint lists of prompts, together all 96.

    Raises:
        DataError: RF2902, `held_out` would empty the training side of some noun.
    """
    if not 0 <= held_out <= len(NOUNS) * len(CITIES) // 2:
        raise DataError(
            "RF2902",
            f"cannot hold out {held_out} of {len(NOUNS) * len(CITIES)} prompts",
            where="held_out",
            expected="0 to 48",
        )
    rng = random.Random(f"split-{seed}")
    nouns = rng.sample(NOUNS, len(NOUNS))
    cities = rng.sample(CITIES, len(CITIES))
    order = [
        Topic(noun, cities[(row + shift) % len(cities)])
        for shift in range(len(cities))
        for row, noun in enumerate(nouns)
    ]
    held = set(order[:held_out])
    topics = all_topics()
    return [t.prompt for t in topics if t not in held], [t.prompt for t in topics if t in held]


def write_review(topic: Topic, rng: random.Random) -> str:
    """Write one review: draw a mood, then two to four sentences of different kinds.

    Returns:
        Words joined by single spaces, the last of them a full stop.
    """
    warmth = MOODS[rng.choice(list(MOODS))]
    count = rng.randint(MIN_SENTENCES, MAX_SENTENCES)
    kinds = rng.sample(list(TEMPLATES), count)
    return " ".join(
        _write_sentence(rng.choice(TEMPLATES[kind]), topic, warmth, rng) for kind in kinds
    )


def _write_sentence(template: str, topic: Topic, warmth: float, rng: random.Random) -> str:
    used: set[str] = set()

    def fill(match: re.Match[str]) -> str:
        slot = match[1]
        if slot == "noun":
            return topic.noun
        if slot == "city":
            return topic.city
        if slot == "adjective":
            words: Sequence[str] = POSITIVE if rng.random() < warmth else NEGATIVE
        elif slot == "verdict":
            words = PRAISE_VERBS if rng.random() < warmth else BLAME_VERBS
        else:
            words = SLOTS[slot]
        # "great and great" would teach the policy to repeat itself.
        word = rng.choice([w for w in words if w not in used])
        used.add(word)
        return word

    return _SLOT.sub(fill, template)


def corpus(prompts: Sequence[str], count: int, seed: int) -> list[dict[str, str]]:
    """Write `count` reviews for `prompts`, cycling through them in a shuffled order.

    Args:
        prompts: prompts of this task; each is used `count / len(prompts)` times, give or take one.
        count: number of rows.
        seed: the rows are a function of `(prompts, count, seed)`.

    Returns:
        Rows `{"prompt": ..., "completion": ...}`. A completion starts with a space, so that
        `prompt + completion` is the whole text.

    Raises:
        DataError: RF2901 for a prompt of another task, RF2903 for no prompts at all.
    """
    if not prompts:
        raise DataError("RF2903", "no prompts to write reviews for", where="prompts")
    rng = random.Random(f"corpus-{seed}")
    topics = [parse_prompt(prompt) for prompt in prompts]
    rows: list[dict[str, str]] = []
    while len(rows) < count:
        for topic in rng.sample(topics, len(topics))[: count - len(rows)]:
            rows.append({"prompt": topic.prompt, "completion": " " + write_review(topic, rng)})
    return rows


def sentence_patterns() -> dict[str, re.Pattern[str]]:
    """The grammar as one regular expression per kind of sentence, full stop included."""

    def pattern(template: str) -> str:
        parts = [
            f"(?:{'|'.join(SLOTS[word[1:-1]])})" if _SLOT.fullmatch(word) else re.escape(word)
            for word in template.split()
        ]
        return " ".join(parts)

    return {
        kind: re.compile("|".join(f"(?:{pattern(t)})" for t in templates))
        for kind, templates in TEMPLATES.items()
    }


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """Write rows as JSON lines, atomically: readers see the old file or the whole new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    return path


def write_datasets(
    folder: Path, *, sft_rows: int = 16_000, eval_rows: int = 256, seed: int = 0
) -> dict[str, Path]:
    """Write the task's files: everything the three stages need that no model has to produce.

    Preference rows are absent on purpose: they are labels on texts of the SFT policy
    (`rlhf_fast.tasks.gold.preference_rows`).

    Returns:
        Paths by name: `sft_train`, `sft_eval` (prompt-completion rows; the latter on held-out
        prompts), `prompts_train`, `prompts_eval` (prompt rows).
    """
    train, held = prompt_split(seed)
    files: dict[str, Iterator[Mapping[str, Any]]] = {
        "sft_train": iter(corpus(train, sft_rows, seed)),
        "sft_eval": iter(corpus(held, eval_rows, seed + 1)),
        "prompts_train": ({"prompt": prompt} for prompt in train),
        "prompts_eval": ({"prompt": prompt} for prompt in held),
    }
    return {name: write_jsonl(folder / f"{name}.jsonl", rows) for name, rows in files.items()}
