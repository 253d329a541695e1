"""The rows of the running batch on the device, and what one decoding step does to them.

Everything a step reads or writes lies in these tensors, at fixed addresses: a step is a sequence of
launches without a wait for the host, and several steps can follow each other (a burst). A row that
has ended goes on computing until the host looks at the end of the burst; what it yields is not
recorded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from rlhf_fast.engine.paged_batch import PagedBatch, PagedForward
from rlhf_fast.engine.paged_cache import PagedCache
from rlhf_fast.engine.requests import Completions
from rlhf_fast.types import SamplingParams
from rlhf_fast_kernels import SampleOutput, sample

# Columns of the integer state, [rows, _FIELDS] int64: one gather moves a row with all it has.
_SAMPLE, _TOKEN, _CONTEXT, _STEP, _LIMIT, _SEED, _TOP_K, _LIVE, _BROKEN = range(9)
_FIELDS = 9
# Columns of the sampling settings, [rows, 3] float32.
_TEMPERATURE, _TOP_P, _MIN_P = range(3)
NO_STOP = -1


@dataclass(frozen=True)
class NewRow:
    """A sample whose prompt (and, after a preemption, first tokens) is in the cache already.

    Args:
        sample: its index among the completions.
        seed: of its draws.
        context: tokens that are stored.
        step: response tokens drawn so far.
        sampling: its settings.
        stop_ids: tokens that end it.
    """

    sample: int
    seed: int
    context: int
    step: int
    sampling: SamplingParams
    stop_ids: tuple[int, ...]


class DecodeRows:
    """At most `capacity` running samples; the first `count` rows are in use.

    Args:
        capacity: rows side by side at most.
        table_width: pages of the longest sequence.
        stop_width: stop ids of the request that has most.
        out: where tokens and log-probs go.
        device: of everything here.
    """

    def __init__(
        self,
        capacity: int,
        table_width: int,
        stop_width: int,
        out: Completions,
        device: torch.device,
    ) -> None:
        self.count = 0
        self.out = out
        self.page_table = torch.zeros(capacity, table_width, dtype=torch.int32, device=device)
        self._state = torch.zeros(capacity, _FIELDS, dtype=torch.int64, device=device)
        self._settings = torch.zeros(capacity, 3, dtype=torch.float32, device=device)
        self._stops = torch.full(
            (capacity, max(1, stop_width)), NO_STOP, dtype=torch.int64, device=device
        )
        self._warps = False
        wide = partial(torch.zeros, capacity, dtype=torch.int64, device=device)
        self._ids, self._positions, self._slots = wide(), wide(), wide()
        self._contexts = torch.zeros(capacity, dtype=torch.int32, device=device)
        self._batch: PagedBatch | None = None

    def add(self, rows: Sequence[NewRow], logits: Tensor) -> None:
        """Draw the first token of new rows from the logits [rows, V] after their last token."""
        start, self.count = self.count, self.count + len(rows)
        self._batch = None
        part = slice(start, self.count)
        state = [
            [
                *(r.sample, 0, r.context, r.step, r.sampling.max_new_tokens),
                *(r.seed, r.sampling.top_k, 1, 0),
            ]
            for r in rows
        ]
        settings = [[r.sampling.temperature, r.sampling.top_p, r.sampling.min_p] for r in rows]
        width = self._stops.shape[1]
        stops = [[*r.stop_ids, *[NO_STOP] * (width - len(r.stop_ids))] for r in rows]
        for buffer, values in (
            (self._state, state),
            (self._settings, settings),
            (self._stops, stops),
        ):
            buffer[part] = torch.tensor(values, dtype=buffer.dtype).to(buffer.device)
        self._warps = self._warps or any(r.sampling.warps for r in rows)
        self._draw(part, logits)

    def step(self, forward: PagedForward, cache: PagedCache) -> None:
        """One token more for every row.

        Args:
            forward: the model.
            cache: holds room for the token of every live row.
        """
        rows = slice(self.count)
        state = self._state[rows]
        batch = self._batch_of(cache)
        # A row that ended earlier in the burst has no place for another token: it reads its last
        # one again, stores nothing and keeps its context.
        live = state[:, _LIVE]
        context = state[:, _CONTEXT]
        context += live
        positions = torch.sub(context, 1, out=batch.positions)
        held = batch.page_table.gather(1, (positions // cache.page_size)[:, None])[:, 0]
        slots = held * cache.page_size + positions % cache.page_size
        torch.sub((slots + 1) * live, 1, out=batch.slots)  # -1 where the row has ended
        batch.context_lengths.copy_(context)
        torch.clamp(state[:, _TOKEN], min=0, out=batch.ids)
        self._draw(rows, forward.logits(batch))

    def _batch_of(self, cache: PagedCache) -> PagedBatch:
        """The forward's view of the rows: the same object until their number changes."""
        if self._batch is None or self._batch.cache is not cache:
            rows = slice(self.count)
            self._batch = PagedBatch(
                ids=self._ids[rows],
                positions=self._positions[rows],
                slots=self._slots[rows],
                page_table=self.page_table[rows],
                context_lengths=self._contexts[rows],
                cu_queries=None,
                rows=None,
                max_query=1,
                max_context=self.page_table.shape[1] * cache.page_size,
                cache=cache,
            )
        return self._batch

    def _draw(self, rows: slice, logits: Tensor) -> None:
        """Sample the rows' next tokens and record those of live ones."""
        state = self._state[rows]
        drawn = self._sample(rows, logits)
        live = state[:, _LIVE] > 0
        index, column = state[:, _SAMPLE], state[:, _STEP]
        out = self.out
        # A dead row writes its sample's last column again, with what is there: no branch, and no
        # two rows have the same sample.
        column = column - (~live).to(column.dtype)
        for buffer, values in (
            (out.tokens, drawn.tokens),
            (out.logprobs, drawn.logprobs),
            (out.raw_logprobs, drawn.raw_logprobs),
        ):
            buffer[index, column] = torch.where(live, values, buffer[index, column])
        state[:, _TOKEN] = drawn.tokens
        broken = live & (drawn.tokens < 0)
        state[:, _BROKEN] |= broken
        state[:, _STEP] += live
        ended = live & (drawn.tokens[:, None] == self._stops[rows]).any(1) & ~broken
        full = state[:, _STEP] >= state[:, _LIMIT]
        out.lengths[index] = state[:, _STEP]
        out.ended[index] |= ended
        state[:, _LIVE] = (live & ~ended & ~full & ~broken).to(torch.int64)

    def _sample(self, rows: slice, logits: Tensor) -> SampleOutput:
        state, settings = self._state[rows], self._settings[rows]
        # Plain sampling has a kernel without filters, which numbers ask for.
        off = not self._warps
        return sample(
            logits,
            seeds=state[:, _SEED].contiguous(),
            step=state[:, _STEP].contiguous(),
            temperature=settings[:, _TEMPERATURE].contiguous(),
            top_k=0 if off else state[:, _TOP_K].contiguous(),
            top_p=1.0 if off else settings[:, _TOP_P].contiguous(),
            min_p=0.0 if off else settings[:, _MIN_P].contiguous(),
            with_entropy=False,
        )

    def observe(self) -> tuple[list[bool], list[int], list[bool]]:
        """(live, response tokens, broken) of every row: the one wait for the device of a burst."""
        seen = self._state[: self.count, [_LIVE, _STEP, _BROKEN]].T.tolist()
        return [x > 0 for x in seen[0]], seen[1], [x > 0 for x in seen[2]]

    def end(self, rows: Sequence[int], lengths: Sequence[int]) -> None:
        """Stop strings: these rows ended after so many tokens, which may be fewer than drawn."""
        index = torch.tensor(rows, device=self._state.device)
        samples = self._state[index, _SAMPLE]
        self._state[index, _LIVE] = 0
        self.out.lengths[samples] = torch.tensor(lengths, device=self._state.device)
        self.out.ended[samples] = True

    def keep(self, index: Sequence[int]) -> None:
        """Continue with rows `index` only, in that order."""
        chosen = torch.tensor(list(index), dtype=torch.int64, device=self._state.device)
        self.count = len(index)
        self._batch = None
        for buffer in (self._state, self._settings, self._stops, self.page_table):
            buffer[: self.count] = buffer[chosen]
        if self.count == 0:
            self._warps = False
