"""One run of the generator: prefill, bursts and retirement over one set of pages.

A run begins with the jobs of a rollout and ends when nothing is left, or it is kept open: then jobs
are added and samples dropped between two turns, and the places of finished samples are used again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf_fast.engine.decode_graphs import DecodeGraphs, Recorder, bucket_of
from rlhf_fast.engine.decode_rows import DecodeRows, NewRow
from rlhf_fast.engine.paged_batch import PagedBatch, PagedForward
from rlhf_fast.engine.paged_cache import PagedCache
from rlhf_fast.engine.progress import GenerationSummary, Progress, ProgressReports
from rlhf_fast.engine.requests import Completions, Request
from rlhf_fast.engine.scheduler import Job, Row, Scheduler
from rlhf_fast.engine.stopping import Decode, StopRule
from rlhf_fast.errors import DivergedGeneration
from rlhf_fast.types import SamplingParams


@dataclass(frozen=True)
class Room:
    """How large a run may become.

    Args:
        samples: that are not finished, at most: rows of the completions.
        columns: response tokens of one of them.
        longest: tokens of a prompt and its response together.
        stops: stop ids of a request, those of every response not among them.
    """

    samples: int
    columns: int
    longest: int
    stops: int

    @classmethod
    def of(cls, requests: Sequence[Request]) -> Room:
        """What these need."""
        return cls(
            sum(len(request.seeds) for request in requests),
            max((r.sampling.max_new_tokens for r in requests), default=0),
            max((len(r.prompt) + r.sampling.max_new_tokens for r in requests), default=0),
            max((len(r.sampling.stop_token_ids) for r in requests), default=0),
        )

    def holds(self, other: Room) -> bool:
        """Whether what needs `other` fits, but for the number of samples."""
        mine, theirs = ((r.columns, r.longest, r.stops) for r in (self, other))
        return all(a >= b for a, b in zip(mine, theirs, strict=True))


@dataclass(frozen=True)
class Machine:
    """What a run works with.

    Args:
        forward: the model over pages.
        device: where it lives.
        eos_ids: ids that end every response.
        decode: ids to texts, for stop strings.
        max_rows: samples decoded side by side at most.
        prefill_tokens: tokens of one prefill forward.
        burst: decoding steps between two looks of the host; 0: what suits the device.
        recorder: makes what records decoding steps as graphs; None: they run as they are.
    """

    forward: PagedForward
    device: torch.device
    eos_ids: tuple[int, ...]
    decode: Decode | None
    max_rows: int
    prefill_tokens: int
    burst: int
    recorder: Callable[[], Recorder] | None


class Run:
    """Samples that decode side by side.

    Args:
        machine: model, device and sizes.
        room: how large it may become.
        cache: pages for it.
        jobs: what there is to do at first.
        reports: given the progress after every burst.
        on_finished: called with the samples that finished in a burst, while others go on; their
            rows of the completions are final.
        after_burst: called with the numbers of running and of waiting samples; the forward may be
            `paused` in it.

    Raises:
        GenerationError: RF4007, a sample of the jobs does not fit into all pages.
    """

    def __init__(
        self,
        machine: Machine,
        room: Room,
        cache: PagedCache,
        jobs: Sequence[Job] = (),
        *,
        reports: ProgressReports | None = None,
        on_finished: Callable[[list[int], Completions], None] | None = None,
        after_burst: Callable[[int, int, Completions], None] | None = None,
    ) -> None:
        self.machine = machine
        self.cache = cache
        self.room = room
        self.samples = room.samples
        self.reports = reports
        self.on_finished = on_finished
        self.after_burst = after_burst
        device = machine.device
        # Rows that pad a batch write to one more.
        written = Completions.empty(self.samples + 1, room.columns, device)
        self.out = written.first(self.samples)
        tokens = self.out.tokens
        # No method of this run: in a circle its pages would outlive it until the next collection.
        self.scheduler = Scheduler(
            *(jobs, cache.allocator, machine.max_rows),
            lambda sample, count: tuple(tokens[sample.index, :count].tolist()),
        )
        recorder = None if machine.recorder is None else machine.recorder()
        most = min(self.samples, machine.max_rows)
        self.rows = DecodeRows(
            most if recorder is None else bucket_of(most),
            -(-room.longest // cache.page_size),
            len(machine.eos_ids) + room.stops,
            written,
            device,
            machine.forward.parallel,
        )
        self.graphs: DecodeGraphs | None = None
        if recorder is not None:
            self.graphs = DecodeGraphs(self.rows, machine.forward, cache, recorder)
        self._rules: dict[tuple[str, ...], StopRule] = {}
        # Rows on the host, of which the used part is copied to the device when pages change.
        self._table = torch.zeros_like(self.rows.page_table, device="cpu")
        self._logits: dict[int, Tensor] = {}
        self._started = time.perf_counter()
        self._finished = 0
        self._tokens = 0
        self._peak_pages = 0

    def all(self) -> None:
        """Run until nothing is left; every page is free again."""
        while not self.scheduler.done:
            self.turn()
        self.cache.sweep()
        assert self.cache.allocator.used_pages == 0, "a finished run holds pages"

    def turn(self) -> None:
        """Admit what there is room for, decode a burst, retire what ended."""
        scheduler = self.scheduler
        waiting = scheduler.half_started
        for job in waiting:
            self._start([job], self._logits[id(job)])
        jobs = scheduler.admit()
        if jobs:
            self._note_pages()
            self._prefill(jobs)
        if waiting or jobs:
            self._retire()  # a first token may be the last: such a row needs no page
        self._burst()
        self._retire()

    # ---- a run that is kept open --------------------------------------------------------------

    def add(self, job: Job) -> None:
        """One job more; its samples have places of the completions that are in no use.

        Raises:
            GenerationError: RF4007, a sample does not fit into all pages; the run goes on.
        """
        assert self.room.holds(Room.of([sample.request for sample in job.samples]))
        self.scheduler.add(job)
        for sample in job.samples:
            self.out.lengths[sample.index] = 0
            self.out.ended[sample.index] = False

    def drop(self, samples: Collection[int]) -> dict[int, int]:
        """Give up samples that are not finished.

        Returns:
            Tokens that each has drawn; they stay in its row of the completions until it is used
            again.
        """
        dropped = self.scheduler.drop(samples)
        for job in dropped.jobs:
            self._logits.pop(id(job), None)
        if dropped.rows:
            gone = set(dropped.rows)
            self.rows.keep([i for i in range(self.rows.count) if i not in gone])
        self.cache.sweep()
        return dropped.drawn

    def _note_pages(self) -> None:
        self._peak_pages = max(self._peak_pages, self.cache.allocator.used_pages)

    def _stop_ids(self, sampling: SamplingParams) -> tuple[int, ...]:
        return tuple(sorted({*self.machine.eos_ids, *sampling.stop_token_ids}))

    # ---- prefill ------------------------------------------------------------------------------

    def _prefill(self, jobs: list[Job]) -> None:
        """Store the tokens of the jobs and start their samples."""
        for pieces in _chunks(jobs, self.machine.prefill_tokens):
            batch, complete = self._prefill_batch(pieces)
            logits = self.machine.forward.logits(batch)
            if complete:
                self._start(complete, logits)

    def _prefill_batch(self, pieces: list[tuple[Job, int, int]]) -> tuple[PagedBatch, list[Job]]:
        """The packed tokens [start, stop) of some jobs, and those jobs that they complete."""
        device, allocator = self.machine.device, self.cache.allocator
        handles = [job.handle for job, _, _ in pieces]
        starts = [start for _, start, _ in pieces]
        counts = [stop - start for _, start, stop in pieces]
        contexts = [stop for _, _, stop in pieces]
        bounds = torch.tensor([0, *counts]).cumsum(0)
        total = int(bounds[-1])
        slots = torch.empty(total, dtype=torch.int64)
        allocator.fill_slots(handles, starts, counts, slots)
        # All pages of a job are there from the start, also those of later chunks.
        width = max(-(-len(job.tokens) // self.cache.page_size) for job, _, _ in pieces)
        table = torch.zeros(len(pieces), width, dtype=torch.int32)
        allocator.fill_table(handles, table)
        ids = [token for job, start, stop in pieces for token in job.tokens[start:stop]]
        positions = torch.cat([torch.arange(start, stop) for _, start, stop in pieces])
        complete = [k for k, (job, _, stop) in enumerate(pieces) if stop == len(job.tokens)]
        batch = PagedBatch(
            ids=torch.tensor(ids).to(device),
            positions=positions.to(device),
            slots=slots.to(device),
            page_table=table.to(device),
            context_lengths=torch.tensor(contexts, dtype=torch.int32).to(device),
            cu_queries=bounds.to(device, torch.int32),
            rows=(bounds[1:][complete] - 1).to(device),
            max_query=max(counts),
            max_context=max(contexts),
            cache=self.cache,
            fresh=not any(starts),
        )
        return batch, [pieces[k][0] for k in complete]

    def _start(self, jobs: list[Job], logits: Tensor) -> None:
        """Rows for the samples of prefilled jobs; logits [jobs, V] follow their last tokens."""
        rows: list[Row] = []
        source: list[int] = []
        for index, job in enumerate(jobs):
            self._logits.pop(id(job), None)
            started = self.scheduler.start(job)
            rows += started
            source += [index] * len(started)
            if job.samples:
                self._logits[id(job)] = logits[index : index + 1].clone()
        if not rows:
            return
        new = [
            NewRow(
                row.sample.index,
                row.sample.seed,
                row.context,
                row.step,
                row.sample.request.sampling,
                self._stop_ids(row.sample.request.sampling),
            )
            for row in rows
        ]
        # A job that found no room has no row, one that has samples to spare has several.
        alone = source == list(range(len(jobs)))
        first = self.rows.count
        self.rows.add(new, logits if alone else logits[torch.tensor(source, device=logits.device)])
        self._copy_tables()
        self._end_by_strings(range(first, self.rows.count))

    # ---- decoding -----------------------------------------------------------------------------

    def _burst(self) -> None:
        """Some decoding steps of all rows."""
        scheduler = self.scheduler
        if not scheduler.rows:
            return
        longest = max(row.limit - row.context for row in scheduler.rows)
        steps = min(1 if self._reads_texts else self.burst, longest)
        if steps == 0:
            return  # every row has drawn all it may
        reservation = scheduler.reserve(steps)
        self._note_pages()
        if reservation.preempted:
            gone = set(reservation.preempted)
            self.rows.keep([i for i in range(self.rows.count) if i not in gone])
        for copies in reservation.copies:
            self.cache.copy_pages(copies)
        if reservation.moved:
            self._copy_tables()
        if self.graphs is not None:
            self.graphs.prepare(max(row.context for row in scheduler.rows) + reservation.steps)
            for _ in range(reservation.steps):
                self.graphs.step()
        else:
            done = self.rows.step(self.machine.forward, self.cache, times=reservation.steps)
            scheduler.give_back(reservation, done)
        self._end_by_strings(range(self.rows.count))  # then it was one step

    @property
    def burst(self) -> int:
        """Steps until the next look."""
        if self.machine.burst > 0:
            return self.machine.burst
        # A look costs a GPU its queue of launches. A CPU has none, and an ended row costs it work,
        # unless the burst ends with the step in which the row did.
        on_cpu = self.machine.device.type == "cpu"
        return 1 if on_cpu and (self.graphs is not None or not self.rows.stop_early) else 8

    def _copy_tables(self) -> None:
        """Write the pages of all rows to the device."""
        rows = self.scheduler.rows
        table = self._table[: len(rows)]
        self.cache.allocator.fill_table([row.handle for row in rows], table)
        self.rows.page_table[: len(rows)] = table.to(self.machine.device)

    @property
    def _reads_texts(self) -> bool:
        """Whether a running row ends by its text."""
        return any(row.sample.request.sampling.stop_strings for row in self.scheduler.rows)

    def _end_by_strings(self, indices: range) -> None:
        """End rows whose text now contains one of their stop strings."""
        if not self._reads_texts:
            return
        _, steps, broken = self.rows.observe()
        hits = []
        for index in indices:
            row = self.scheduler.rows[index].sample
            strings = row.request.sampling.stop_strings
            # A row that has drawn all it may can have ended with its last token.
            if not strings or broken[index]:
                continue
            rule = self._rules.get(strings)
            if rule is None:
                rule = StopRule((), strings, self.machine.decode, self.machine.device)
                self._rules[strings] = rule
            if bool(rule.completed(self.out.tokens[row.index : row.index + 1, : steps[index]])):
                hits.append(index)
        if hits:
            self.rows.end(hits, [steps[index] for index in hits])

    def _retire(self) -> None:
        """Look at the rows; those that ended leave."""
        scheduler = self.scheduler
        if not scheduler.rows:
            return
        before = sum(row.step for row in scheduler.rows)
        finished_before = list(scheduler.rows)
        live, steps, broken = self.rows.observe()
        if any(broken):
            self._raise_broken(broken, steps)
        self._tokens += sum(steps) - before
        ended = scheduler.advance(live, steps)
        if ended:
            gone = set(ended)
            self.rows.keep([i for i in range(len(live)) if i not in gone])
            self._finished += len(ended)
            self.cache.sweep()
            if self.on_finished is not None:
                self.on_finished([finished_before[i].sample.index for i in ended], self.out)
        if self.after_burst is not None:
            self.after_burst(len(scheduler.rows), scheduler.waiting_samples, self.out)
        if self.reports is not None:
            self.reports.give(self._progress, last=self._finished == self.samples)

    def summary(self) -> GenerationSummary:
        """What the run took so far."""
        return GenerationSummary(
            tokens=self._tokens,
            seconds=time.perf_counter() - self._started,
            preemptions=self.scheduler.preemptions,
            peak_cache_use=self._peak_pages / self.cache.pages,
        )

    def _progress(self) -> Progress:
        return Progress(
            finished=self._finished,
            samples=self.samples,
            tokens=self._tokens,
            running=len(self.scheduler.rows),
            waiting=self.scheduler.waiting_samples,
            cache_use=self.cache.use,
            tokens_per_second=self.summary().tokens_per_second,
        )

    def _raise_broken(self, broken: list[bool], steps: list[int]) -> None:
        index = broken.index(True)
        sample = self.scheduler.rows[index].sample
        raise DivergedGeneration(
            "RF4010",
            f"the logits of {sum(broken)} of {self.samples} samples are NaN, +Inf or all -Inf at "
            f"response token {steps[index] - 1}",
            where=f"sample {sample.index} of {sample.request.name}",
        )


def _chunks(jobs: Sequence[Job], budget: int) -> Iterator[list[tuple[Job, int, int]]]:
    """Tokens of the jobs in forwards of at most `budget`: (job, start, stop) pieces."""
    pieces: list[tuple[Job, int, int]] = []
    room = budget
    for job in jobs:
        start = 0
        while start < len(job.tokens):
            stop = min(len(job.tokens), start + room)
            pieces.append((job, start, stop))
            room -= stop - start
            start = stop
            if room == 0:
                yield pieces
                pieces, room = [], budget
    if pieces:
        yield pieces
