"""The generator's loop: admit and prefill, decode a burst, retire, until nothing is left.

    prefill   the tokens of admitted jobs, packed, at most `prefill_tokens` a forward
    start     one row per sample, its first token drawn from the logits after the last of them
    burst     `burst` decoding steps of all rows without a look from the host
    retire    rows that ended free their pages and leave the batch

Samples depend on prompt, seed, settings and weights: a row's forward does not read its neighbours,
and its draws are keyed by its seed. Batch size, order, sharing and preemption change rounding
alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf_fast.engine.decode_graphs import DecodeGraphs, GraphReport, Recorder, bucket_of
from rlhf_fast.engine.decode_rows import DecodeRows, NewRow
from rlhf_fast.engine.paged_batch import PagedBatch, PagedForward
from rlhf_fast.engine.paged_cache import PagedCache, default_page_size, pages_wanted
from rlhf_fast.engine.progress import GenerationSummary, Progress, ProgressReports
from rlhf_fast.engine.requests import Completions, Request
from rlhf_fast.engine.scheduler import Job, Row, Sample, Scheduler, jobs_of
from rlhf_fast.engine.stopping import Decode, StopRule
from rlhf_fast.errors import DivergedGeneration, GenerationError


@dataclass(frozen=True)
class RunnerSettings:
    """Sizes of a run.

    Args:
        max_rows: samples decoded side by side at most.
        page_size: tokens of a page; 0: what suits the device.
        prefill_tokens: tokens of one prefill forward; longer prompts take several.
        burst: decoding steps between two looks of the host; 0: what suits the device.
        poison: debug mode, freed pages become NaN.
    """

    max_rows: int = 256
    page_size: int = 0
    prefill_tokens: int = 8192
    burst: int = 0
    poison: bool = False


class Runner:
    """Generates for requests on one device.

    Args:
        forward: the model over pages.
        device: where it lives.
        eos_ids: ids that end every response.
        decode: ids to texts, for stop strings.
        settings: sizes.
        cache_bytes: how much key-value memory there may be, asked for before each run.
        recorder: makes what records a run's decoding steps as graphs; None: they run as they are.
    """

    def __init__(
        self,
        forward: PagedForward,
        device: torch.device,
        *,
        eos_ids: Sequence[int],
        decode: Decode | None,
        settings: RunnerSettings,
        cache_bytes: Callable[[], int],
        recorder: Callable[[], Recorder] | None = None,
    ) -> None:
        self.forward = forward
        self.device = device
        self.eos_ids = tuple(eos_ids)
        self.decode = decode
        self.settings = settings
        self._cache_bytes = cache_bytes
        self.page_size = settings.page_size or default_page_size(device.type)
        self.burst = settings.burst
        self.cache: PagedCache | None = None
        self.last: GenerationSummary | None = None
        self.recorder = recorder
        self.last_graphs = GraphReport()

    def release(self) -> None:
        """Give the key-value memory back."""
        self.cache = None

    def run(
        self,
        requests: Sequence[Request],
        *,
        reports: ProgressReports | None = None,
        on_finished: Callable[[list[int], Completions], None] | None = None,
        after_burst: Callable[[int, int, Completions], None] | None = None,
    ) -> Completions:
        """Generate all samples of all requests, in the order they are asked for.

        Args:
            requests: checked by `check_requests`.
            reports: given the progress after every burst.
            on_finished: called with the samples that finished in a burst, while others go on; their
                rows of the completions are final.
            after_burst: called with the numbers of running and of waiting samples; the forward may
                be `paused` in it.

        Raises:
            GenerationError: RF4007, a sample does not fit into all pages.
            DivergedGeneration: RF4010, logits that are no distribution.
        """
        if not any(request.seeds for request in requests):
            return Completions.empty(0, 0, self.device)
        longest = max(len(r.prompt) + r.sampling.max_new_tokens for r in requests)
        try:
            cache = self._cache_for(requests, longest)
            run = _Run(self, requests, cache, longest, reports, on_finished, after_burst)
            with self.forward.running(longest):
                run.all()
            self.last = run.summary()
            self.last_graphs = GraphReport() if run.graphs is None else run.graphs.report
        except BaseException:
            self.cache = None  # its pages are held by samples that will not come back
            raise
        return run.out

    def _cache_for(self, requests: Sequence[Request], longest: int) -> PagedCache:
        """Pages for this run: the ones at hand if they suffice, at most the budget."""
        size, shape = self.page_size, self.forward.cache_shape
        samples = sum(len(request.seeds) for request in requests)
        rows = min(samples, self.settings.max_rows)
        wanted = pages_wanted(rows, longest, size)
        budget = self._cache_bytes()
        affordable = budget // (shape.token_bytes * size)
        held = self.cache if self.cache is None or self.cache.shape == shape else None
        # Pages that were kept cost nothing more, however little is free beside them.
        pages = min(wanted, max(affordable, 0 if held is None else held.pages))
        if pages < 1:
            raise GenerationError(
                "RF4007",
                f"key-value memory of {budget} bytes does not hold one page of "
                f"{shape.token_bytes * size} bytes",
                remedy="raise engine.kv_gb",
            )
        if held is None or held.pages < pages:
            self.cache = held = None
            held = PagedCache(shape, pages, size, self.device, poison=self.settings.poison)
        self.cache = held
        return held


class _Run:
    """One `Runner.run`."""

    def __init__(
        self,
        runner: Runner,
        requests: Sequence[Request],
        cache: PagedCache,
        longest: int,
        reports: ProgressReports | None,
        on_finished: Callable[[list[int], Completions], None] | None,
        after_burst: Callable[[int, int, Completions], None] | None,
    ) -> None:
        self.runner = runner
        self.cache = cache
        self.requests = requests
        self.longest = longest
        self.reports = reports
        self.on_finished = on_finished
        self.after_burst = after_burst
        device = runner.device
        self.samples = sum(len(request.seeds) for request in requests)
        columns = max(request.sampling.max_new_tokens for request in requests)
        # Rows that pad a batch write to one more.
        room = Completions.empty(self.samples + 1, columns, device)
        self.out = room.first(self.samples)
        jobs = jobs_of(requests)
        self.scheduler = Scheduler(jobs, cache.allocator, runner.settings.max_rows, self._drawn)
        self._stop_ids = {
            request.sampling.stop_token_ids: tuple(
                sorted({*runner.eos_ids, *request.sampling.stop_token_ids})
            )
            for request in requests
        }
        recorder = None if runner.recorder is None else runner.recorder()
        most = min(self.samples, runner.settings.max_rows)
        self.rows = DecodeRows(
            most if recorder is None else bucket_of(most),
            -(-longest // cache.page_size),
            max(len(ids) for ids in self._stop_ids.values()),
            room,
            device,
            runner.forward.parallel,
        )
        self.graphs: DecodeGraphs | None = None
        if recorder is not None:
            self.graphs = DecodeGraphs(self.rows, runner.forward, cache, recorder)
        self._strings = {
            strings: StopRule((), strings, runner.decode, device)
            for strings in {r.sampling.stop_strings for r in requests}
            if strings
        }
        # Rows on the host, of which the used part is copied to the device when pages change.
        self._table = torch.zeros_like(self.rows.page_table, device="cpu")
        self._logits: dict[int, Tensor] = {}
        self._started = time.perf_counter()
        self._finished = 0
        self._tokens = 0
        self._peak_pages = 0

    def all(self) -> None:
        """Run until nothing is left; every page is free again."""
        scheduler = self.scheduler
        while not scheduler.done:
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
        self.cache.sweep()
        assert self.cache.allocator.used_pages == 0, "a finished run holds pages"

    def _note_pages(self) -> None:
        self._peak_pages = max(self._peak_pages, self.cache.allocator.used_pages)

    def _drawn(self, sample: Sample, count: int) -> tuple[int, ...]:
        return tuple(self.out.tokens[sample.index, :count].tolist())

    # ---- prefill ------------------------------------------------------------------------------

    def _prefill(self, jobs: list[Job]) -> None:
        """Store the tokens of the jobs and start their samples."""
        for pieces in _chunks(jobs, self.runner.settings.prefill_tokens):
            batch, complete = self._prefill_batch(pieces)
            logits = self.runner.forward.logits(batch)
            if complete:
                self._start(complete, logits)

    def _prefill_batch(self, pieces: list[tuple[Job, int, int]]) -> tuple[PagedBatch, list[Job]]:
        """The packed tokens [start, stop) of some jobs, and those jobs that they complete."""
        device, allocator = self.runner.device, self.cache.allocator
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
                self._stop_ids[row.sample.request.sampling.stop_token_ids],
            )
            for row in rows
        ]
        alone = len(source) == len(jobs)
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
        steps = min(1 if self._strings else self.burst, longest)
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
            done = self.rows.step(self.runner.forward, self.cache, times=reservation.steps)
            scheduler.give_back(reservation, done)
        self._end_by_strings(range(self.rows.count))  # then it was one step

    @property
    def burst(self) -> int:
        """Steps until the next look."""
        if self.runner.burst > 0:
            return self.runner.burst
        # A look costs a GPU its queue of launches. A CPU has none, and an ended row costs it work,
        # unless the burst ends with the step in which the row did.
        on_cpu = self.runner.device.type == "cpu"
        return 1 if on_cpu and (self.graphs is not None or not self.rows.stop_early) else 8

    def _copy_tables(self) -> None:
        """Write the pages of all rows to the device."""
        rows = self.scheduler.rows
        table = self._table[: len(rows)]
        self.cache.allocator.fill_table([row.handle for row in rows], table)
        self.rows.page_table[: len(rows)] = table.to(self.runner.device)

    def _end_by_strings(self, indices: range) -> None:
        """End rows whose text now contains one of their stop strings."""
        if not self._strings:
            return
        _, steps, broken = self.rows.observe()
        hits = []
        for index in indices:
            row = self.scheduler.rows[index].sample
            rule = self._strings.get(row.request.sampling.stop_strings)
            # A row that has drawn all it may can have ended with its last token.
            if rule is None or broken[index]:
                continue
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
