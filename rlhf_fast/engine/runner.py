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

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from rlhf_fast.engine.decode_graphs import GraphReport, Recorder
from rlhf_fast.engine.paged_batch import PagedForward
from rlhf_fast.engine.paged_cache import PagedCache, default_page_size, pages_wanted
from rlhf_fast.engine.progress import GenerationSummary, ProgressReports
from rlhf_fast.engine.requests import Completions, Request
from rlhf_fast.engine.run import Machine, Room, Run
from rlhf_fast.engine.scheduler import jobs_of
from rlhf_fast.engine.stopping import Decode
from rlhf_fast.errors import GenerationError


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
        hooks = {"reports": reports, "on_finished": on_finished, "after_burst": after_burst}
        with self._run(Room.of(requests), requests, **hooks) as run:
            run.all()
        return run.out

    def open(
        self, room: Room, on_finished: Callable[[list[int], Completions], None]
    ) -> AbstractContextManager[Run]:
        """A run without jobs yet, for as long as the block lasts.

        Args:
            room: how large it may become.
            on_finished: as for `run`.
        """
        return self._run(room, (), on_finished=on_finished)

    @contextmanager
    def _run(self, room: Room, requests: Sequence[Request], **hooks: Any) -> Iterator[Run]:
        settings = self.settings
        try:
            machine = Machine(
                *(self.forward, self.device, self.eos_ids, self.decode, settings.max_rows),
                *(settings.prefill_tokens, self.burst, self.recorder),
            )
            run = Run(machine, room, self._cache_for(room), jobs_of(requests), **hooks)
            with self.forward.running(room.longest):
                yield run
            self.last = run.summary()
            self.last_graphs = GraphReport() if run.graphs is None else run.graphs.report
        except BaseException:
            self.cache = None  # its pages are held by samples that will not come back
            raise

    def _cache_for(self, room: Room) -> PagedCache:
        """Pages for this run: the ones at hand if they suffice, at most the budget."""
        size, shape = self.page_size, self.forward.cache_shape
        rows = min(room.samples, self.settings.max_rows)
        wanted = pages_wanted(rows, room.longest, size)
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
