"""A reward over texts: `reward.function: examples/reward_function.py:reward`.

The trainer calls it once per rollout batch with keyword arguments: `prompts` and `completions`,
lists of S texts, and one list of S values for every further data column that the signature names.
It returns S values: a finite number, None to abstain (the row then takes no part in the losses),
or a list of numbers, one for each response token.
"""

from __future__ import annotations

WORDS_WANTED = 40


def reward(prompts: list[str], completions: list[str]) -> list[float | None]:
    """1 for a completion of about 40 different words, less for shorter or repetitive ones."""
    scores: list[float | None] = []
    for _, completion in zip(prompts, completions, strict=True):
        words = completion.lower().split()
        scores.append(min(1.0, len(set(words)) / WORDS_WANTED) if words else None)
    return scores
