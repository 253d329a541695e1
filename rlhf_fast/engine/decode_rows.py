"""The rows of the running batch on the device, and what one decoding step does to them.

Everything a step reads or writes lies in these tensors, at fixed addresses: a step is a sequence of
launches without a wait for the host, and several steps can follow each other (a burst). A row that
has ended goes on computing until the host looks at the end of the burst; what it yields is not
recorded. A CUDA graph runs a bucket of rows: those beyond `count` are padding, dead from the start,
and write to the last row of the completions.
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
        out: where tokens and log-probs go; its last row belongs to no sample.
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
        self.warps = False
        wide = partial(torch.zeros, capacity, dtype=torch.int64, device=device)
        self._ids, self._positions, self._slots = wide(), wide(), wide()
        self._contexts = torch.zeros(capacity, dtype=torch.int32, device=device)
        self._batch: PagedBatch | None = None
        # A dead row with one token, which it reads from page 0.
        padding = [len(out.lengths) - 1, 0, 1, 1, 1, 0, 0, 0, 0]
        self._padding = torch.tensor(padding, dtype=torch.int64).to(device)
        self._padded = 0

    @property
    def tensors(self) -> list[Tensor]:
        """All that a step reads and writes beside the model and its pages."""
        return [
            *(self.page_table, self._state, self._settings, self._stops),
            *(self._ids, self._positions, self._slots, self._contexts),
            *(self.out.tokens, self.out.logprobs, self.out.raw_logprobs),
            *(self.out.lengths, self.out.ended),
        ]

    def pad(self, width: int) -> None:
        """Make rows `count` to `width` padding."""
        if self._padded == width:
            return
        part = slice(self.count, width)
        self._state[part] = self._padding
        self._settings[part] = 0.0
        self._stops[part] = NO_STOP
        self.page_table[part] = 0
        self._padded = width

    def forget(self) -> None:
        """Give the forward a new batch at the next step."""
        self._batch = None

    def add(self, rows: Sequence[NewRow], logits: Tensor) -> None:
        """Draw the first token of new rows from the logits [rows, V] after their last token."""
        start, self.count = self.count, self.count + len(rows)
        self._batch, self._padded = None, 0
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
        self.warps = self.warps or any(r.sampling.warps for r in rows)
        self._draw(part, logits)

    def step(
        self,
        forward: PagedForward,
        cache: PagedCache,
        width: int | None = None,
        max_context: int | None = None,
    ) -> None:
        """One token more for every row.

        Args:
            forward: the model.
            cache: holds room for the token of every live row.
            width: rows that take part, padding included; None: those in use.
            max_context: tokens that no row goes beyond; None: those of all pages of the table.
        """
        rows = slice(self.count if width is None else width)
        state = self._state[rows]
        batch = self._batch_of(rows, cache, max_context)
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

    def _batch_of(self, rows: slice, cache: PagedCache, max_context: int | None) -> PagedBatch:
        """The forward's view of the rows: the same object while their number stays."""
        context = max_context or self.page_table.shape[1] * cache.page_size
        batch = self._batch
        if (
            batch is None
            or batch.cache is not cache
            or (batch.ids.numel(), batch.max_context) != (rows.stop, context)
        ):
            self._batch = batch = PagedBatch(
                ids=self._ids[rows],
                positions=self._positions[rows],
                slots=self._slots[rows],
                page_table=self.page_table[rows],
                context_lengths=self._contexts[rows],
                cu_queries=None,
                rows=None,
                max_query=1,
                max_context=context,
                cache=cache,
            )
        return batch

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
        off = not self.warps
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
        self._batch, self._padded = None, 0
        for buffer in (self._state, self._settings, self._stops, self.page_table):
            buffer[: self.count] = buffer[chosen]
        if self.count == 0:
            self.warps = False
