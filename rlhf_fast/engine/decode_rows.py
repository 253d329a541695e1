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
from typing import Any

import torch
from torch import Tensor

from rlhf_fast.engine.paged_batch import Call, PagedBatch, PagedForward
from rlhf_fast.engine.paged_cache import PagedCache
from rlhf_fast.engine.requests import Completions
from rlhf_fast.engine.tensor_parallel import TensorParallel
from rlhf_fast.types import SamplingParams
from rlhf_fast_kernels import SampleOutput, dispatch, sample
from rlhf_fast_kernels.decode_fields import (
    BROKEN,
    CONTEXT,
    FIELDS,
    LIMIT,
    LIVE,
    NO_STOP,
    SAMPLE,
    SEED,
    STEP,
    TOP_K,
    Drawn,
    Places,
    Record,
)
from rlhf_fast_kernels.decode_state import (
    place_tokens,
    prepare_place,
    prepare_record,
    record_tokens,
)
from rlhf_fast_kernels.row_ops import Steps
from rlhf_fast_kernels.sample import prepare as prepare_sample


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
        parallel: ranks with which the vocabulary is shared.
    """

    def __init__(
        self,
        capacity: int,
        table_width: int,
        stop_width: int,
        out: Completions,
        device: torch.device,
        parallel: TensorParallel | None = None,
    ) -> None:
        self._parallel = parallel
        self.count = 0
        self.out = out
        new = partial(torch.zeros, device=device)
        self.page_table = new(capacity, table_width, dtype=torch.int32)
        # A setting of all rows lies in one piece, as the sampler reads it.
        self._state = new(FIELDS, capacity, dtype=torch.int64)
        self._settings = new(3, capacity, dtype=torch.float32)  # temperature, top_p, min_p
        self._stops = torch.full(
            (capacity, max(1, stop_width)), NO_STOP, dtype=torch.int64, device=device
        )
        self.warps = False
        wide, real = partial(new, capacity, dtype=torch.int64), partial(new, capacity)
        self._places = Places(wide(), wide(), wide(), new(capacity, dtype=torch.int32))
        self._drawn = Drawn(wide(), real(), real())
        self._record = Record(out.tokens, out.logprobs, out.raw_logprobs, out.lengths, out.ended)
        self._native = dispatch.choose("place_tokens", None, self._state).impl == "cpu"
        self._batch: PagedBatch | None = None
        # Laid out when the rows come to lie elsewhere.
        self._steps: Steps | None = None
        # A dead row with one token, which it reads from page 0.
        padding = torch.zeros(FIELDS, 1, dtype=torch.int64)
        padding[[CONTEXT, STEP, LIMIT]] = 1
        padding[SAMPLE] = len(out.lengths) - 1
        self._padding = padding.to(device)
        self._padded = 0

    @property
    def tensors(self) -> list[Tensor]:
        """All that a step reads and writes beside the model and its pages."""
        settings = (self.page_table, self._state, self._settings, self._stops)
        return [*settings, *self._places, *self._drawn, *self._record]

    @property
    def stop_early(self) -> bool:
        """Whether several steps end with the one in which a row does."""
        return self._steps is not None and self._steps.rows is not None

    def pad(self, width: int) -> None:
        """Make rows `count` to `width` padding."""
        if self._padded == width:
            return
        part = slice(self.count, width)
        self._state[:, part] = self._padding
        self._settings[:, part] = 0.0
        self._stops[part] = NO_STOP
        self.page_table[part] = 0
        self._padded = width

    def forget(self) -> None:
        """Give the forward a new batch at the next step."""
        self._batch = self._steps = None

    def add(self, rows: Sequence[NewRow], logits: Tensor) -> None:
        """Draw the first token of new rows from the logits [rows, V] after their last token."""
        start, self.count = self.count, self.count + len(rows)
        self.forget()
        self._padded = 0
        part = slice(start, self.count)
        state = [
            [
                *(r.sample, 0, r.context, r.step, r.sampling.max_new_tokens),
                *(r.seed, r.sampling.top_k, 1, 0),
            ]
            for r in rows
        ]
        settings = [(r.sampling.temperature, r.sampling.top_p, r.sampling.min_p) for r in rows]
        width = self._stops.shape[1]
        stops = [[*r.stop_ids, *[NO_STOP] * (width - len(r.stop_ids))] for r in rows]
        self._state[:, part] = torch.tensor(state).T.to(self._state.device)
        self._settings[:, part] = torch.tensor(settings).T.to(self._settings.device)
        self._stops[part] = torch.tensor(stops).to(self._stops.device)
        self.warps = self.warps or any(r.sampling.warps for r in rows)
        for call in self._drawing(part, logits):
            call()

    def step(
        self,
        forward: PagedForward,
        cache: PagedCache,
        width: int | None = None,
        max_context: int | None = None,
        *,
        times: int = 1,
    ) -> int:
        """One token more for every row, `times` times.

        Args:
            forward: the model.
            cache: holds room for the tokens of every live row.
            width: rows that take part, padding included; None: those in use.
            max_context: tokens that no row goes beyond; None: those of all pages of the table.
            times: at most so often.

        Returns:
            How often it was: in C++ a step in which a row ended is the last.
        """
        rows = slice(self.count if width is None else width)
        batch = self._batch_of(rows, cache, max_context)
        if self._steps is None:
            self._steps = self._laid_out(forward, batch, slice(batch.ids.numel()))
        return self._steps.run(rows.stop, times)

    def _laid_out(self, forward: PagedForward, batch: PagedBatch, rows: slice) -> Steps:
        """The step of these rows."""
        places = Places(batch.ids, batch.positions, batch.slots, batch.context_lengths)
        prepare = prepare_place if self._native else partial(partial, place_tokens)
        place = prepare(self._state[:, rows], batch.page_table, batch.cache.page_size, places)
        decoding = forward.decoding(batch)
        if decoding is not None:
            calls, logits = decoding
            return Steps([place, *calls, *self._drawing(rows, logits)])
        draws: dict[tuple[int, int], list[Call]] = {}

        def forward_and_draw() -> None:
            logits = forward.logits(batch)
            address = logits.data_ptr(), logits.stride(0)
            if address not in draws:
                draws.clear()
                draws[address] = self._drawing(rows, logits)
            for call in draws[address]:
                call()

        return Steps([place, forward_and_draw])

    def _batch_of(self, rows: slice, cache: PagedCache, max_context: int | None) -> PagedBatch:
        """The forward's view of the rows: the same object while their number stays.

        Where steps can do fewer rows than they are laid out for, also if it falls.
        """
        context = max_context or self.page_table.shape[1] * cache.page_size
        batch = self._batch
        # A graph has its own width, which comes with its own bound of contexts.
        most = None if self._steps is None or max_context is not None else self._steps.rows
        serves_fewer = most is not None and rows.stop <= most
        if (
            batch is None
            or batch.cache is not cache
            or batch.max_context != context
            or (batch.ids.numel() != rows.stop and not serves_fewer)
        ):
            self.forget()
            places = Places(*(buffer[rows] for buffer in self._places))
            self._batch = batch = PagedBatch(
                ids=places.ids,
                positions=places.positions,
                slots=places.slots,
                page_table=self.page_table[rows],
                context_lengths=places.contexts,
                cu_queries=None,
                rows=None,
                max_query=1,
                max_context=context,
                cache=cache,
            )
        return batch

    def _drawing(self, rows: slice, logits: Tensor) -> list[Call]:
        """Calls that sample the rows' next tokens and record those of live ones."""
        state, stops = self._state[:, rows], self._stops[rows]
        temperature, top_p, min_p = self._settings[:, rows]
        drawn = Drawn(*(buffer[rows] for buffer in self._drawn))
        out = SampleOutput(*drawn, None)
        draw: Call
        record: Call
        # Plain sampling has a kernel without filters, which numbers ask for.
        off = not self.warps
        settings: dict[str, Any] = {
            "seeds": state[SEED],
            "step": state[STEP],
            "temperature": temperature,
            "top_k": 0 if off else state[TOP_K],
            "top_p": 1.0 if off else top_p,
            "min_p": 0.0 if off else min_p,
            "out": out,
        }
        on_cpu = self._native and dispatch.choose("sample", None, logits).impl == "cpu"
        if self._parallel is not None:
            draw = self._parallel.drawing(logits, **settings)
            record = partial(record_tokens, state, stops, drawn, self._record)
        elif on_cpu and logits.stride(1) == 1:
            draw = prepare_sample(
                *(logits, state[SEED], state[STEP], temperature, state[TOP_K], top_p, min_p, out)
            )
            record = prepare_record(state, stops, drawn, self._record)
        else:
            draw = partial(sample, logits, with_entropy=False, **settings)
            record = partial(record_tokens, state, stops, drawn, self._record)
        return [draw, record]

    def observe(self) -> tuple[list[bool], list[int], list[bool]]:
        """(live, response tokens, broken) of every row: the one wait for the device of a burst."""
        seen = self._state[[LIVE, STEP, BROKEN], : self.count].tolist()
        return [x > 0 for x in seen[0]], seen[1], [x > 0 for x in seen[2]]

    def end(self, rows: Sequence[int], lengths: Sequence[int]) -> None:
        """Stop strings: these rows ended after so many tokens, which may be fewer than drawn."""
        index = torch.tensor(rows, device=self._state.device)
        samples = self._state[SAMPLE, index]
        self._state[LIVE, index] = 0
        self.out.lengths[samples] = torch.tensor(lengths, device=self._state.device)
        self.out.ended[samples] = True

    def keep(self, index: Sequence[int]) -> None:
        """Continue with rows `index` only, in that order."""
        chosen = torch.tensor(list(index), dtype=torch.int64, device=self._state.device)
        self.count = len(index)
        if not self.stop_early:
            self.forget()
        self._padded = 0
        for buffer in (self._state, self._settings):
            buffer[:, : self.count] = buffer[:, chosen]
        for buffer in (self._stops, self.page_table):
            buffer[: self.count] = buffer[chosen]
        if self.count == 0:
            self.warps = False
