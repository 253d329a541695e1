"""The scheduler's bookkeeping: what it remembers is what a count would give, at linear cost."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

import pytest

from rlhf_fast.engine import scheduler
from rlhf_fast.engine.requests import Request
from rlhf_fast.engine.scheduler import Job, Row, Scheduler, jobs_of
from rlhf_fast.errors import GenerationError
from rlhf_fast.types import SamplingParams
from rlhf_fast_kernels.kv_pages import PageAllocator

PAGE = 4


def requests(prompts: int, samples: int, response: int) -> list[Request]:
    """Distinct prompts of 3 to 7 tokens; expectations that are too low, so that pages run out."""
    return [
        Request(
            tuple(range(i, i + 3 + i % 5)),
            SamplingParams(response),
            tuple(range(samples)),
            expected=2.0,
        )
        for i in range(prompts)
    ]


def counted(work: Scheduler) -> tuple[int, int]:
    """Waiting samples and expected growth, from nothing but the lists."""
    waiting = sum(len(job.samples) for job in (*work.waiting, *work._half_started))
    typical = work.typical_length

    def growth(row: Row) -> int:
        final = len(row.prompt) + scheduler._expected(row.sample, typical)
        return max(0, -(-int(final) // PAGE) - -(-row.context // PAGE))

    return waiting, sum(map(growth, work.rows))


def run(work: Scheduler, response: int, check: bool = False) -> int:
    """Until nothing is left; returns the number of bursts. Rows end at different lengths."""
    bursts = 0

    def agree() -> None:
        if check:
            assert (work.waiting_samples, work._expected_growth()) == counted(work)

    while not work.done:
        for job in work.half_started:
            work.start(job)
            agree()
        for job in work.admit():
            agree()
            work.start(job)
            agree()
        steps = work.reserve(3).steps
        agree()
        drawn = [
            min(row.step + steps, response - row.sample.index % response // 2) for row in work.rows
        ]
        live = [
            step < response - row.sample.index % response // 2
            for step, row in zip(drawn, work.rows, strict=True)
        ]
        work.advance(live, drawn)
        agree()
        bursts += 1
    return bursts


@pytest.mark.parametrize("pages", [12, 40])
def test_what_is_remembered_is_what_a_count_gives(pages: int) -> None:
    jobs = jobs_of(requests(prompts=9, samples=5, response=12))
    work = Scheduler(jobs, PageAllocator(pages, PAGE), 6, lambda sample, count: (1,) * count)
    assert work.waiting_samples == 45
    assert run(work, 12, check=True) > 20
    assert work.waiting_samples == 0
    assert (work.preemptions > 0) == (pages == 12)


def test_jobs_that_come_and_samples_that_go_leave_the_count_right() -> None:
    """Of jobs that wait, that are half started and that run; in the end every page is free."""
    allocator = PageAllocator(40, PAGE)
    free = allocator.free_pages
    first, *later = jobs_of(requests(prompts=9, samples=5, response=12))
    work = Scheduler([first], allocator, 3, lambda sample, count: (1,) * count)

    def agree() -> None:
        assert (work.waiting_samples, work._expected_growth()) == counted(work)

    for job in later:
        work.add(job)
        agree()
    for job in work.admit():
        work.start(job)
        agree()
    assert len(work.rows) == 3
    assert len(work._half_started) == 1
    running = [row.sample.index for row in work.rows]
    half = [sample.index for sample in work._half_started[0].samples]
    waiting = [sample.index for sample in work.waiting[-1].samples]
    work.advance([True] * 3, [2, 2, 2])
    chosen = [running[1], *half, waiting[0]]
    dropped = work.drop(chosen)
    agree()
    assert dropped.rows == [1]
    assert dropped.drawn == {running[1]: 2, waiting[0]: 0} | dict.fromkeys(half, 0)
    assert [job.samples for job in dropped.jobs] == [deque()]
    assert [row.sample.index for row in work.rows] == [running[0], running[2]]
    assert work.waiting_samples == 45 - 3 - len(half) - 1
    run(work, 12, check=True)
    assert allocator.free_pages == free


def test_a_job_that_no_page_holds_is_not_added() -> None:
    work = Scheduler([], PageAllocator(4, PAGE), 3, lambda *_: ())
    with pytest.raises(GenerationError, match="RF4007"):
        work.add(jobs_of(requests(prompts=1, samples=1, response=40))[0])
    assert work.done


def test_samples_take_the_places_they_are_given() -> None:
    jobs = jobs_of(requests(prompts=2, samples=2, response=3), [7, 5, 3, 1])
    assert sorted(s.index for job in jobs for s in job.samples) == [1, 3, 5, 7]


@pytest.mark.parametrize("axis", ["prompts", "samples", "rows"])
def test_expectations_are_formed_a_bounded_number_of_times_a_sample(
    axis: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of every row or waiting sample anew for each job, they were most of a large rollout."""
    calls = 0
    expected = scheduler._expected

    def counting(*arguments: object) -> float:
        nonlocal calls
        calls += 1
        return expected(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(scheduler, "_expected", counting)
    found = []
    for size in (32, 256):
        sizes = {"prompts": (size, 1, 8), "samples": (2, size, 8), "rows": (size, 1, size)}
        prompts, samples, rows = sizes[axis]
        jobs = jobs_of(requests(prompts, samples, 12))
        calls = 0
        work = Scheduler(jobs, PageAllocator(8 * rows + 8, PAGE), rows, lambda *_: ())
        run(work, 12)
        found.append(calls / (prompts * samples))
    assert found[1] < 1.3 * found[0] + 1


def test_those_who_wait_are_not_counted_one_by_one() -> None:
    class Waiting(deque[Job]):
        def __iter__(self) -> Iterator[Job]:
            pytest.fail("looked at every waiting job")

    jobs = jobs_of(requests(prompts=20, samples=2, response=12))
    work = Scheduler(jobs, PageAllocator(40, PAGE), 4, lambda *_: ())
    work.waiting = Waiting(work.waiting)
    run(work, 12)
    assert work.done
