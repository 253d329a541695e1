"""FLOPs that a step needs, by phase: two for every weight and token, four for every pair attended.

They are those of the algorithm: whatever a side computes beyond them (padding, a forward of the
policy for anchors that the generator knows already) lowers its utilisation. The update is a forward
and a backward of twice as much, for policy and critic.
"""

from __future__ import annotations

from .case import Case


def trunk(case: Case, sequences: list[int]) -> float:
    """One forward of all layers over sequences of so many tokens."""
    weights = case.layers * (4 * case.hidden**2 + 3 * case.hidden * case.inner)
    pairs = sum(n * (n + 1) // 2 for n in sequences)
    return 2.0 * weights * sum(sequences) + 4.0 * case.layers * case.hidden * pairs


def head(case: Case, rows: int) -> float:
    """The vocabulary head on so many rows."""
    return 2.0 * case.hidden * case.vocab * rows


def of_step(case: Case) -> dict[str, float]:
    """FLOPs by phase, and of the whole step."""
    lengths = case.response_lengths()
    sequences = [case.prompt + n for n in lengths]
    responses = sum(lengths)
    layers, vocabulary = trunk(case, sequences), head(case, responses)
    found = {
        # The last token of a response is drawn and not read.
        "generate": trunk(case, [n - 1 for n in sequences]) + vocabulary,
        "score": 3 * layers + vocabulary,  # reference, critic, reward model
        "update": case.epochs * 3 * (2 * layers + vocabulary),
    }
    return found | {"step": sum(found.values())}
