"""The order of examples: a permutation per epoch that depends on (seed, epoch) and nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import numpy as np

from rlhf_fast.errors import DataError

T = TypeVar("T")

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(z: np.ndarray[Any, np.dtype[np.uint64]]) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """SplitMix64's finaliser (Steele, Lea, Flood 2014): a bijection of 64-bit integers."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def epoch_permutation(n: int, seed: int, epoch: int) -> list[int]:
    """A permutation of range(n) from (seed, epoch).

    Indices are sorted by a hash of (seed, epoch, index): plain integer arithmetic, so the order is
    the same on every machine and with every version of the libraries, which no library's own
    shuffle promises.
    """
    with np.errstate(over="ignore"):
        key = _mix(np.array([seed & (2**64 - 1)], dtype=np.uint64) + _GOLDEN)
        key = _mix(key ^ _mix(np.array([epoch], dtype=np.uint64) * _GOLDEN + np.uint64(1)))
        keys = _mix(key + (np.arange(n, dtype=np.uint64) + np.uint64(1)) * _GOLDEN)
    order: list[int] = np.argsort(keys, kind="stable").tolist()
    return order


class EpochSampler:
    """Endless batches of indices, resumable bit-exactly, the same for every world size.

    Each batch is global: all ranks draw the same one and take their `rank_slice`.

    Args:
        n: examples.
        batch_size: indices of one batch.
        seed: seed of the order.
        drop_last: True ends each epoch after its last full batch; the examples left over are not
            used in that epoch (another permutation leaves out others). False lets a batch run over
            into the next epoch's permutation: every example is used once an epoch, every batch is
            full, and a dataset smaller than a batch repeats inside it.
        shuffle: False keeps the order of the data in every epoch.
        fingerprint: of the data; a state saved with another one is refused.
        setting: the config's key of `batch_size`, for messages.
        where: what data they are, for messages.

    Raises:
        DataError: RF2061 if there is not a single batch.
    """

    def __init__(
        self,
        n: int,
        batch_size: int,
        seed: int,
        *,
        drop_last: bool = True,
        shuffle: bool = True,
        fingerprint: str = "",
        setting: str = "the batch size",
        where: str = "training data",
    ) -> None:
        if n < 1 or (drop_last and n < batch_size):
            raise DataError(
                "RF2061",
                f"{n} examples are fewer than one batch of {batch_size}",
                where=where,
                expected=f"at least {max(batch_size, 1) if drop_last else 1} examples",
                remedy=f"lower {setting}, add data, or look above for rows that were left out",
            )
        if batch_size < 1:
            raise ValueError(f"batch_size: got {batch_size}, expected at least 1")
        self.n, self.batch_size, self.seed = n, batch_size, seed
        self.drop_last, self.shuffle, self.fingerprint = drop_last, shuffle, fingerprint
        self.epoch = 0
        self.cursor = 0
        self._order = self._permutation(0)

    def _permutation(self, epoch: int) -> list[int]:
        return epoch_permutation(self.n, self.seed, epoch) if self.shuffle else list(range(self.n))

    def batches(self, epochs: int) -> int:
        """Batches of so many epochs from the first on.

        Without drop_last those in which every example is used `epochs` times: the last batch of all
        is filled up from the epoch after, and no other is.
        """
        if self.drop_last:
            return epochs * (self.n // self.batch_size)
        return -(-epochs * self.n // self.batch_size)

    def _advance_epoch(self) -> None:
        self.epoch += 1
        self.cursor = 0
        self._order = self._permutation(self.epoch)

    def next_batch(self) -> list[int]:
        """The next `batch_size` indices."""
        if self.drop_last and self.cursor + self.batch_size > self.n:
            self._advance_epoch()
        batch: list[int] = []
        while len(batch) < self.batch_size:
            if self.cursor == self.n:
                self._advance_epoch()
            take = self._order[self.cursor : self.cursor + self.batch_size - len(batch)]
            self.cursor += len(take)
            batch += take
        return batch

    def __iter__(self) -> Iterator[list[int]]:
        while True:
            yield self.next_batch()

    def state_dict(self) -> dict[str, Any]:
        """Position in the data as JSON-serialisable values."""
        return {
            "epoch": self.epoch,
            "cursor": self.cursor,
            "seed": self.seed,
            "n": self.n,
            "fingerprint": self.fingerprint,
        }

    def load_state_dict(self, state: dict[str, Any], *, allow_data_change: bool = False) -> None:
        """Go to a saved position. Another batch size is fine: the cursor counts examples.

        Args:
            state: from `state_dict`.
            allow_data_change: accept other data, and start it at the beginning of the saved epoch.

        Raises:
            DataError: RF2062 if the data or the seed is not that of the state, RF2063 if the state
                is not one.
        """
        epoch, cursor = _state_integer(state, "epoch"), _state_integer(state, "cursor")
        seed, n = _state_integer(state, "seed"), _state_integer(state, "n")
        changed = _changes(self, state, seed, n)
        if changed and not allow_data_change:
            raise DataError(
                "RF2062",
                f"the data changed since the checkpoint: {'; '.join(changed)}",
                where="training data",
                expected="the data and the seed the run was started with",
                remedy="restore them, or set run.allow_data_change=true to start the new data from "
                "its beginning",
            )
        if not changed and not 0 <= cursor <= self.n:
            raise _bad_state("cursor", cursor)
        self.epoch, self.cursor = epoch, 0 if changed else cursor
        self._order = self._permutation(epoch)


def _changes(sampler: EpochSampler, state: dict[str, Any], seed: int, n: int) -> list[str]:
    changed = []
    if n != sampler.n:
        changed.append(f"{n} examples then, {sampler.n} now")
    if seed != sampler.seed:
        changed.append(f"seed {seed} then, {sampler.seed} now")
    if state.get("fingerprint", "") != sampler.fingerprint:
        changed.append("the content differs")
    return changed


def _bad_state(key: str, value: Any) -> DataError:
    return DataError(
        "RF2063",
        f"the saved data position is unusable: {key}={value!r}",
        where="data position in the checkpoint",
        expected="non-negative integers epoch, cursor, seed and n, with cursor up to n",
        remedy="resume from another checkpoint (run.resume_step)",
    )


def _state_integer(state: dict[str, Any], key: str) -> int:
    value = state.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise _bad_state(key, value)
    return value


def rank_slice(batch: Sequence[T], rank: int, world_size: int) -> list[T]:
    """This rank's contiguous part of a global batch; parts in rank order make up the batch.

    Sizes differ by at most one, so any world size works.
    """
    low = rank * len(batch) // world_size
    high = (rank + 1) * len(batch) // world_size
    return list(batch[low:high])


def sequential_batches(n: int, batch_size: int) -> Iterator[list[int]]:
    """All indices in order, each once; the last batch may be smaller. For evaluation."""
    for start in range(0, n, batch_size):
        yield list(range(start, min(start + batch_size, n)))
