"""Which samples run, which wait, and who gives way when pages run out. Host side, no tensors.

A `Job` is one distinct prompt and all samples of it, of whatever request: they share its prefill
and, by reference count, its pages. Jobs are admitted longest expected first, which shortens the
tail of a rollout. A job is admitted if the pages it and everybody running are expected to need are
there; expectations may be wrong, so a burst that finds no page takes them from the sample admitted
last, which waits and is recomputed (prompt and the tokens drawn so far). Its draws are keyed by
seed and step, so it goes on with the tokens it would have had.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from rlhf_fast.engine.requests import Request
from rlhf_fast.errors import GenerationError
from rlhf_fast_kernels.kv_pages import PageAllocator


@dataclass(frozen=True)
class Sample:
    """One sample to draw.

    Args:
        index: its place among the completions.
        request: what asked for it.
        seed: of its draws.
    """

    index: int
    request: Request
    seed: int

    @property
    def limit(self) -> int:
        """Response tokens at most."""
        return self.request.sampling.max_new_tokens


@dataclass
class Job:
    """Tokens to store, and the samples that continue from them.

    Args:
        tokens: the prompt; after a preemption also what was drawn.
        samples: who continues; one after a preemption.
        step: response tokens among `tokens`.
        handle: its pages, once admitted.
    """

    tokens: tuple[int, ...]
    samples: deque[Sample]
    step: int = 0
    handle: int = -1


@dataclass
class Row:
    """A running sample: its pages and the tokens stored in them."""

    sample: Sample
    prompt: tuple[int, ...]
    handle: int
    context: int
    step: int
    admitted: int

    @property
    def limit(self) -> int:
        """Tokens it can come to hold: the last one drawn is never stored."""
        return len(self.prompt) + self.sample.limit - 1


@dataclass
class Reservation:
    """Room for a burst.

    Args:
        steps: decoding steps there is room for.
        copies: [C, 2] int32 pages (source, destination) to copy first, in order.
        preempted: rows that gave way, as indices into the rows before the call.
        moved: whether page tables changed.
    """

    steps: int
    copies: list[Tensor] = field(default_factory=list)
    preempted: list[int] = field(default_factory=list)
    moved: bool = False


@dataclass
class Dropped:
    """What samples that were given up leave behind.

    Args:
        rows: that they had, as indices into the rows before.
        jobs: that are gone with them.
        drawn: sample -> tokens it had drawn.
    """

    rows: list[int] = field(default_factory=list)
    jobs: list[Job] = field(default_factory=list)
    drawn: dict[int, int] = field(default_factory=dict)


def jobs_of(requests: Sequence[Request], places: Iterable[int] | None = None) -> list[Job]:
    """One job per distinct prompt, longest expected first.

    Args:
        requests: what is asked for.
        places: of the samples among the completions, in the order they are asked for; None: in
            that order from 0.
    """
    jobs: dict[tuple[int, ...], Job] = {}
    place = iter(itertools.count() if places is None else places)
    for request in requests:
        job = jobs.setdefault(request.prompt, Job(request.prompt, deque()))
        for seed in request.seeds:
            job.samples.append(Sample(next(place), request, seed))

    def length(job: Job) -> float:
        return len(job.tokens) + max(_expected(s, None) for s in job.samples)

    return sorted((job for job in jobs.values() if job.samples), key=length, reverse=True)


def _expected(sample: Sample, typical: float | None) -> float:
    """Response tokens a sample is likely to take: as said, as others took, or all it may."""
    known = sample.request.expected if sample.request.expected is not None else typical
    return sample.limit if known is None else min(known, sample.limit)


class Scheduler:
    """Rows, jobs and pages.

    Args:
        jobs: what there is to do.
        allocator: who holds which page.
        max_rows: samples side by side at most.
        drawn: the first n tokens drawn for a sample; asked for when it gives way.

    Raises:
        GenerationError: RF4007, a sample alone exceeds all pages.
    """

    def __init__(
        self,
        jobs: Sequence[Job],
        allocator: PageAllocator,
        max_rows: int,
        drawn: Callable[[Sample, int], tuple[int, ...]],
    ) -> None:
        self.waiting = deque(jobs)
        self.rows: list[Row] = []
        self.allocator = allocator
        self.max_rows = max_rows
        self._drawn = drawn
        self.preemptions = 0
        self._half_started: list[Job] = []
        # Both are asked for many times between two changes, for every job among many rows.
        self._queued = sum(len(job.samples) for job in jobs)
        self._growth_of_rows: int | None = None
        self._admissions = 0
        self._finished = 0
        self._finished_tokens = 0
        self._all_pages = allocator.free_pages
        for job in jobs:
            self._require_room(job)

    def _require_room(self, job: Job) -> None:
        pages, size = self._all_pages, self.allocator.page_size
        for sample in job.samples:
            tokens = len(job.tokens) + sample.limit - 1
            if -(-tokens // size) > pages:
                raise GenerationError(
                    "RF4007",
                    f"one sample needs {tokens} tokens of key-value memory, more than the "
                    f"{pages * size} there is room for",
                    where=sample.request.name,
                    remedy="raise engine.kv_gb, or lower max_new_tokens or the prompt length",
                )

    # ---- state --------------------------------------------------------------------------------

    @property
    def done(self) -> bool:
        """Nothing runs and nothing waits."""
        return not (self.rows or self.waiting or self._half_started)

    @property
    def waiting_samples(self) -> int:
        """Samples that have not started, or wait to start again."""
        return self._queued + sum(len(job.samples) for job in self._half_started)

    @property
    def typical_length(self) -> float | None:
        """Mean length of what finished in this run; None before anything has."""
        return self._finished_tokens / self._finished if self._finished else None

    # ---- what comes and goes while others run --------------------------------------------------

    def add(self, job: Job) -> None:
        """One job more, behind those that wait.

        Raises:
            GenerationError: RF4007, a sample alone exceeds all pages; nothing was added.
        """
        self._require_room(job)
        self.waiting.append(job)
        self._queued += len(job.samples)

    def drop(self, samples: Collection[int]) -> Dropped:
        """Forget samples that are not finished; their pages are free again."""
        gone, result = set(samples), Dropped()
        for job in (*self.waiting, *self._half_started):
            for sample in [s for s in job.samples if s.index in gone]:
                job.samples.remove(sample)
                result.drawn[sample.index] = job.step
            if not job.samples:
                result.jobs.append(job)
        for job in self._half_started:
            if not job.samples:
                self.allocator.release(job.handle)
        self.waiting = deque(job for job in self.waiting if job.samples)
        self._half_started = [job for job in self._half_started if job.samples]
        self._queued = sum(len(job.samples) for job in self.waiting)
        for index, row in enumerate(self.rows):
            if row.sample.index in gone:
                self.allocator.release(row.handle)
                result.rows.append(index)
                result.drawn[row.sample.index] = row.step
        self.rows = [row for row in self.rows if row.sample.index not in gone]
        self._growth_of_rows = None
        return result

    def _pages(self, tokens: float) -> int:
        return -(-int(tokens) // self.allocator.page_size)

    # ---- admission ----------------------------------------------------------------------------

    def admit(self) -> list[Job]:
        """Jobs to prefill now, with pages for their tokens.

        Nothing is admitted for a few free rows while many run: a prefill holds all of them up.
        """
        if not self.waiting:
            return []
        free = self.max_rows - len(self.rows) - sum(len(j.samples) for j in self._half_started)
        if free < min(self.waiting_samples, -(-self.max_rows // 8)) and self.rows:
            return []
        admitted: list[Job] = []
        budget = self.allocator.free_pages - self._expected_growth()
        while self.waiting and free > 0:
            job = self.waiting[0]
            cost = self._cost(job, min(free, len(job.samples)))
            # With nothing running there is nobody to wait for.
            if cost > budget and (self.rows or admitted or self._half_started):
                break
            job.handle = self.allocator.create()
            if self.allocator.extend([job.handle], [len(job.tokens)]).missing:
                self.allocator.release(job.handle)
                break
            self.waiting.popleft()
            self._queued -= len(job.samples)
            admitted.append(job)
            budget -= cost
            free -= len(job.samples)
        return admitted

    def _cost(self, job: Job, samples: int) -> int:
        """Pages that a job is expected to take in the end: the prompt once, growth per sample."""
        prompt = len(job.tokens) // self.allocator.page_size
        return prompt + sum(self._growth(job, samples))

    def _growth(self, job: Job, samples: int) -> list[int]:
        """Pages that each of a job's first samples is expected to take beyond full shared ones."""
        shared = len(job.tokens) // self.allocator.page_size
        return [
            max(
                self._pages(len(job.tokens) - job.step + _expected(s, self.typical_length)),
                self._pages(len(job.tokens) + 1),
            )
            - shared
            for s in itertools.islice(job.samples, samples)
        ]

    def _affordable(self, job: Job) -> int:
        """Samples of a prefilled job that can start in free rows: one at least if nobody runs."""
        budget = self.allocator.free_pages - self._expected_growth()
        count = 0
        for pages in self._growth(job, self.max_rows - len(self.rows)):
            if pages > budget:
                break
            budget -= pages
            count += 1
        return count if self.rows else max(count, 1)

    def _expected_growth(self) -> int:
        """Pages that running samples are expected to take beyond what they hold."""
        if self._growth_of_rows is None:
            self._growth_of_rows = self._growth_among(self.rows)
        return self._growth_of_rows

    def _growth_among(self, rows: Sequence[Row]) -> int:
        total, typical = 0, self.typical_length
        for row in rows:
            final = len(row.prompt) + _expected(row.sample, typical)
            total += max(0, self._pages(final) - self._pages(row.context))
        return total

    def start(self, job: Job) -> list[Row]:
        """Rows for as many of a prefilled job's samples as there is room for.

        The rest starts from the same pages later, see `half_started`.
        """
        count = min(len(job.samples), self.max_rows - len(self.rows), self._affordable(job))
        chosen = [job.samples.popleft() for _ in range(count)]
        if job.samples:
            handles = self.allocator.fork(job.handle, count) if count else []
            if job not in self._half_started:
                self._half_started.append(job)
        else:
            handles = [*self.allocator.fork(job.handle, count - 1), job.handle]
            if job in self._half_started:
                self._half_started.remove(job)
        prompt = job.tokens[: len(job.tokens) - job.step]
        started = []
        for sample, handle in zip(chosen, handles, strict=True):
            self._admissions += 1
            started.append(Row(sample, prompt, handle, len(job.tokens), job.step, self._admissions))
        self.rows += started
        if self._growth_of_rows is not None:
            self._growth_of_rows += self._growth_among(started)
        return started

    @property
    def half_started(self) -> list[Job]:
        """Prefilled jobs with samples left, if there is a row and pages for one of them."""
        if len(self.rows) >= self.max_rows:
            return []
        return [job for job in self._half_started if self._affordable(job) > 0]

    # ---- decoding -----------------------------------------------------------------------------

    def reserve(self, steps: int) -> Reservation:
        """Pages for the next burst; the newest samples give way if there are too few.

        Args:
            steps: decoding steps wanted.
        """
        result = Reservation(steps)
        before = {id(row): i for i, row in enumerate(self.rows)}
        while True:
            wanted = [min(row.context + result.steps, row.limit) for row in self.rows]
            crossing = any(
                self._pages(new) != self._pages(row.context)
                for new, row in zip(wanted, self.rows, strict=True)
            )
            extension = self.allocator.extend([row.handle for row in self.rows], wanted)
            if extension.missing == 0:
                copied = len(extension.copies) > 0
                result.copies += [extension.copies] if copied else []
                result.moved = result.moved or crossing or copied
                return result
            if result.steps > 1:
                result.steps = 1
                continue
            result.preempted += [before[i] for i in self._give_way()]
            result.moved = True

    def give_back(self, reservation: Reservation, done: int) -> None:
        """A burst ended after `done` steps: pages for the others are free again."""
        if done < reservation.steps:
            used = [min(row.context + done, row.limit) for row in self.rows]
            self.allocator.truncate([row.handle for row in self.rows], used)

    def _give_way(self) -> list[int]:
        """Free the pages of a half-started job, or of the row admitted last; ids of rows."""
        self.preemptions += 1
        if self._half_started:
            job = self._half_started.pop()
            self.allocator.release(job.handle)
            self._queue_again(job)
            return []
        victim = max(self.rows, key=lambda row: row.admitted)
        self.rows.remove(victim)
        self.allocator.release(victim.handle)
        tokens = victim.prompt + self._drawn(victim.sample, victim.step)
        self._queue_again(Job(tokens, deque([victim.sample]), victim.step))
        self._growth_of_rows = None
        return [id(victim)]

    def _queue_again(self, job: Job) -> None:
        self.waiting.appendleft(job)
        self._queued += len(job.samples)

    def advance(self, live: Sequence[bool], steps: Sequence[int]) -> list[int]:
        """After a burst: take over what was drawn, release what ended.

        Args:
            live: whether each row goes on.
            steps: response tokens each has drawn.

        Returns:
            Rows that ended, as indices into the rows before the call.
        """
        self._growth_of_rows = None
        ended = []
        for index, (row, goes_on, step) in enumerate(zip(self.rows, live, steps, strict=True)):
            row.step = step
            row.context = len(row.prompt) + step - 1
            if not goes_on:
                ended.append(index)
                self.allocator.release(row.handle)
                self._finished += 1
                self._finished_tokens += step
        if ended:
            self.rows = [row for row, goes_on in zip(self.rows, live, strict=True) if goes_on]
        return ended
