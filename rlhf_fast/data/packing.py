"""Which sequences share a forward pass: bin packing by tokens. Pure functions of lengths."""

from __future__ import annotations

import bisect
import heapq
from collections.abc import Sequence
from typing import NamedTuple

from rlhf_fast.errors import DataError


def _check(lengths: Sequence[int], budget: int) -> None:
    for index, length in enumerate(lengths):
        if length < 0 or length > budget:
            raise DataError(
                "RF2060",
                f"a sequence of {length} tokens does not fit a budget of {budget} tokens",
                where=f"sequence {index}",
                expected=f"0 to {budget} tokens",
                remedy="raise the token budget (microbatch_tokens), or lower data.max_length",
            )


def _longest_first(lengths: Sequence[int]) -> list[int]:
    return sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))


def pack_best_fit(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Pack sequences into as few bins as best-fit-decreasing finds.

    Each sequence, longest first, goes to the fullest bin it still fits in. The number of bins is at
    most 11/9 of the optimum plus one (Johnson et al. 1974). Ties go to the lower index, so the
    result depends on `lengths` and `budget` alone.

    Args:
        lengths: tokens of each sequence.
        budget: tokens of one bin.

    Returns:
        Bins of ascending indices, ordered by their first index; every index appears once.

    Raises:
        DataError: RF2060 if a sequence is longer than the budget.
    """
    _check(lengths, budget)
    bins: list[list[int]] = []
    # Bins by the room left in them. There are at most `budget` + 1 different rooms, so a search
    # costs its logarithm however many bins there are.
    rooms: list[int] = []
    bins_with: dict[int, list[int]] = {}
    for index in _longest_first(lengths):
        spot = bisect.bisect_left(rooms, lengths[index])
        if spot == len(rooms):
            bins.append([])
            room, target = budget, len(bins) - 1
        else:
            room = rooms[spot]
            target = heapq.heappop(bins_with[room])
            if not bins_with[room]:
                del bins_with[room], rooms[spot]
        bins[target].append(index)
        left = room - lengths[index]
        if left not in bins_with:
            bins_with[left] = []
            bisect.insort(rooms, left)
        heapq.heappush(bins_with[left], target)
    return sorted(sorted(b) for b in bins)


def pack_by_tokens(
    lengths: Sequence[int], budget: int, *, balanced: bool = False, min_bins: int = 1
) -> list[list[int]]:
    """Split sequences into microbatches of at most `budget` tokens.

    Args:
        lengths: tokens of each sequence.
        budget: tokens of one microbatch.
        balanced: False keeps the order and fills greedily: each microbatch is a run of neighbours.
            True evens out the tokens of the microbatches (longest first, each to the emptiest), so
            that ranks and steps take equal time; indices ascend inside a microbatch.
        min_bins: microbatches wanted at least, such as the largest count over ranks. If there are
            fewer sequences than that, empty microbatches make up the number.

    Returns:
        Lists of indices; every index appears once.

    Raises:
        DataError: RF2060 if a sequence is longer than the budget.
    """
    _check(lengths, budget)
    bins = (
        _balanced(lengths, budget, min_bins)
        if balanced
        else _split_heaviest(_in_order(lengths, budget), lengths, min_bins)
    )
    return bins + [[] for _ in range(min_bins - len(bins))]


def _in_order(lengths: Sequence[int], budget: int) -> list[list[int]]:
    bins: list[list[int]] = []
    used = budget + 1
    for index, length in enumerate(lengths):
        if used + length > budget:
            bins.append([])
            used = 0
        bins[-1].append(index)
        used += length
    return bins


def _split_heaviest(
    bins: list[list[int]], lengths: Sequence[int], min_bins: int
) -> list[list[int]]:
    while len(bins) < min_bins:
        splittable = [b for b in bins if len(b) > 1]
        if not splittable:
            break
        heaviest = max(splittable, key=lambda b: sum(lengths[i] for i in b))
        total = sum(lengths[i] for i in heaviest)
        left, cut, best = 0, 1, total + 1
        for position in range(1, len(heaviest)):
            left += lengths[heaviest[position - 1]]
            if max(left, total - left) < best:
                best, cut = max(left, total - left), position
        at = bins.index(heaviest)
        bins[at : at + 1] = [heaviest[:cut], heaviest[cut:]]
    return bins


def _balanced(lengths: Sequence[int], budget: int, min_bins: int) -> list[list[int]]:
    if not lengths:
        return []
    fallback = pack_best_fit(lengths, budget)
    fewest = min(max(-(-sum(lengths) // budget) if budget else 1, min_bins, 1), len(lengths))
    for count in dict.fromkeys((fewest, max(fewest, len(fallback)))):
        bins = _emptiest_first(lengths, count)
        if max(sum(lengths[i] for i in b) for b in bins) <= budget:
            return bins
    # Emptiest-first may need one bin more than best fit; the tighter packing then wins, evened out
    # as far as `min_bins` asks.
    return _split_heaviest(fallback, lengths, min_bins)


def _emptiest_first(lengths: Sequence[int], count: int) -> list[list[int]]:
    """Longest processing time first (Graham 1969) over `count` bins; no bin stays empty."""
    heap = [(0, 0, b) for b in range(count)]
    bins: list[list[int]] = [[] for _ in range(count)]
    for index in _longest_first(lengths):
        # The number of items breaks ties, so that sequences of length 0 spread too.
        tokens, items, target = heapq.heappop(heap)
        bins[target].append(index)
        heapq.heappush(heap, (tokens + lengths[index], items + 1, target))
    return sorted(sorted(b) for b in bins)


def deal(
    bins: Sequence[Sequence[int]], lengths: Sequence[int], ranks: int
) -> list[list[list[int]]]:
    """Deal forwards over ranks: all run equally many, and at a time those of about equal size.

    Where the number of bins is no multiple of `ranks`, the heaviest are split; what cannot be split
    any further leaves empty bins. The heaviest bins come first. In each round the heaviest goes to
    the rank that has the fewest tokens so far. The result depends on the arguments alone, so every
    rank finds the same. One rank keeps its bins as they are.

    Args:
        bins: sequences of each forward.
        lengths: tokens of each sequence.
        ranks: that share the work.

    Returns:
        Rounds of `ranks` bins each, the bin of rank r at place r.
    """
    if ranks == 1:
        return [[list(b)] for b in bins]
    wanted = -(-len(bins) // ranks) * ranks
    split = _split_heaviest([list(b) for b in bins], lengths, wanted)
    split += [[] for _ in range(wanted - len(split))]
    tokens = [sum(lengths[i] for i in b) for b in split]
    order = sorted(range(wanted), key=lambda b: (-tokens[b], b))
    total = [0] * ranks
    rounds = []
    for start in range(0, wanted, ranks):
        takers = sorted(range(ranks), key=lambda r: (total[r], r))
        dealt: list[list[int]] = [[] for _ in range(ranks)]
        for rank, b in zip(takers, order[start : start + ranks], strict=True):
            dealt[rank] = split[b]
            total[rank] += tokens[b]
        rounds.append(dealt)
    return rounds


class Share(NamedTuple):
    """Sequences of one forward of a rank.

    `idle`: they are read because the other ranks read something; nothing of it counts.
    """

    rows: list[int]
    idle: bool = False


def share_of(
    bins: Sequence[Sequence[int]], lengths: Sequence[int], rank: int, ranks: int
) -> list[Share]:
    """The forwards of one rank, as `deal` deals them; in place of an empty one the shortest row."""
    mine = [dealt[rank] for dealt in deal(bins, lengths, ranks)]
    shortest = min(range(len(lengths)), key=lengths.__getitem__, default=0)
    return [Share(rows) if rows or ranks == 1 else Share([shortest], True) for rows in mine]
