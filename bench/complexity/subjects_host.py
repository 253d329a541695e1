"""Algorithms of the host: what they cost must not grow faster than what they arrange."""

from __future__ import annotations

from typing import Any

import torch

from rlhf_fast.data import collate_prompts, load_prompts
from rlhf_fast.data.packing import pack_best_fit, pack_by_tokens
from rlhf_fast.engine.requests import Request
from rlhf_fast.engine.scheduler import Scheduler, jobs_of
from rlhf_fast.types import SamplingParams
from rlhf_fast_kernels.kv_pages import PageAllocator

from ..distributed.bench_step import build_tokenizer
from .subject import Run, Subject, powers

BUDGET, LONGEST, VOCABULARY = 2048, 512, 512
PROMPT, RESPONSE, BURST, PAGE = 8, 32, 8, 16


def _lengths(count: int) -> list[int]:
    generator = torch.Generator().manual_seed(0)
    found: list[int] = torch.randint(1, LONGEST, (count,), generator=generator).tolist()
    return found


def packing(count: int) -> Run:
    lengths = _lengths(count)
    return lambda: pack_best_fit(lengths, BUDGET)


def microbatches(count: int) -> Run:
    lengths = _lengths(count)
    return lambda: pack_by_tokens(lengths, BUDGET, balanced=True)


def reading(rows: int) -> Run:
    """Checks, encodes and lays out rows of prompts."""
    tokenizer = build_tokenizer(VOCABULARY)
    words = torch.randint(4, VOCABULARY, (rows, PROMPT), generator=torch.Generator().manual_seed(0))
    source = [{"prompt": " ".join(f"w{i}" for i in row)} for row in words.tolist()]
    return lambda: collate_prompts(load_prompts(source, tokenizer).examples)


def rollout(prompts: int, samples: int, rows: int) -> None:
    """All that the scheduler does in a rollout: admit, start, reserve, advance, until done."""
    sampling = SamplingParams(RESPONSE)
    requests = [
        Request((i, *range(1, PROMPT)), sampling, tuple(range(samples))) for i in range(prompts)
    ]
    pages = 2 + rows * -(-(PROMPT + RESPONSE) // PAGE) * 2
    work = Scheduler(jobs_of(requests), PageAllocator(pages, PAGE), rows, lambda *_: ())
    seen: list[int] = []
    while not work.done:
        for job in (*work.half_started, *work.admit()):
            work.start(job)
        steps = work.reserve(BURST).steps
        drawn = [min(row.step + steps, RESPONSE) for row in work.rows]
        work.advance([step < RESPONSE for step in drawn], drawn)
        seen.append(work.waiting_samples)  # as a report of progress asks


def subjects() -> list[Subject]:
    """All of them."""

    def of(name: str, axis: str, make: Any, first: int, count: int) -> Subject:
        return Subject(name, axis, make, powers(first, count))

    return [
        of("pack_best_fit", "sequences", packing, 512, 6),
        of("pack_by_tokens, balanced", "sequences", microbatches, 512, 6),
        of("load_prompts", "rows", reading, 256, 6),
        of("scheduler, 32 rows", "prompts", lambda n: lambda: rollout(n, 1, 32), 128, 6),
        of("scheduler, 32 rows", "samples a prompt", lambda n: lambda: rollout(2, n, 32), 64, 6),
        of("scheduler, all at once", "rows", lambda n: lambda: rollout(n, 1, n), 32, 6),
    ]
