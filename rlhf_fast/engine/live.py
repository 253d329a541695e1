"""Requests that come one by one and decode side by side: the generator as a server needs it.

`LiveRequests` is a thread with a queue over a `HybridEngine`. The first request opens a run, and
who comes later joins it at its next turn, in the place of a sample that has ended. The run stays
open, with its pages, until `pause`: that ends every request and leaves the engine in mode TRAIN, so
that weights may change. A sample depends on prompt, settings, seed and weights, not on its company.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import torch

from rlhf_fast.engine.hybrid import HybridEngine
from rlhf_fast.engine.requests import Completions, Request
from rlhf_fast.engine.run import Room, Run
from rlhf_fast.engine.scheduler import jobs_of
from rlhf_fast.errors import GenerationError


@dataclass(frozen=True)
class Answer:
    """What was drawn for a request.

    Args:
        tokens: R ids, the one that ended the response included.
        logprobs: R, under the distribution that was drawn from, after every filter.
        raw_logprobs: R, under softmax(logits / temperature) before the filters (softmax(logits) at
            temperature 0).
        ended: by a stop; false if it was cut at max_new_tokens or given up.
        aborted: it was given up before its end.
    """

    tokens: list[int]
    logprobs: list[float]
    raw_logprobs: list[float]
    ended: bool
    aborted: bool = False


@dataclass(eq=False)
class _Pending:
    """A request that is not answered."""

    request: Request
    future: Future[Answer]


class LiveRequests:
    """Answers requests of one sample each, as many side by side as the engine decodes.

    Args:
        engine: what generates; nobody else may use it before `pause`. On one of the paths fused
            and modules.
        room: what a run is laid out for at first: response tokens, tokens of a whole sequence and
            stop ids. A request that needs more waits until nothing runs, and the next run has it.

    Raises:
        ValueError: there is room for no sample.
    """

    def __init__(self, engine: HybridEngine, room: Room) -> None:
        if room.samples < 1:
            raise ValueError(f"room for {room.samples} samples, of which no request can be one")
        self._engine = engine
        self._base = self._room = room
        self._changed = threading.Condition()
        self._queue: deque[_Pending] = deque()
        self._running: dict[int, _Pending] = {}
        self._given_up: list[Future[Answer]] = []
        self._free: list[int] = []
        self._paused = self._closed = self._serving = self._begun = False
        self._thread = threading.Thread(target=self._work, name="live-requests", daemon=True)
        self._thread.start()

    # ---- for others -----------------------------------------------------------------------------

    def submit(self, request: Request) -> Future[Answer]:
        """Ask for one sample; while paused, the request waits.

        Raises:
            GenerationError: as `HybridEngine.check`; the future's, as `HybridEngine.complete`.
            RuntimeError: it is closed.
        """
        if len(request.seeds) != 1:
            raise ValueError(f"a request of one sample has {len(request.seeds)} seeds")
        self._engine.check([request])
        pending = _Pending(request, Future())
        pending.future.set_running_or_notify_cancel()  # who awaits it may go; it is answered still
        with self._changed:
            if self._closed:
                raise RuntimeError("closed")
            self._queue.append(pending)
            self._changed.notify_all()
        return pending.future

    def abort(self, futures: Collection[Future[Answer]]) -> None:
        """Answer these soon with what they have so far; those that are answered stay so."""
        with self._changed:
            self._given_up += futures
            self._changed.notify_all()

    def pause(self) -> int:
        """End every request with what it has; none starts until `resume`.

        Returns:
            How many were ended. The engine is in mode TRAIN and holds no pages of theirs.
        """
        with self._changed:
            ended = len(self._queue) + len(self._running)
            self._paused = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._serving)
            self._answer_queue()
        return ended

    def resume(self) -> None:
        """Requests start again."""
        with self._changed:
            self._paused = False
            self._changed.notify_all()

    def close(self) -> None:
        """As `pause`, for good."""
        with self._changed:
            self._closed = True
        self.pause()
        self._thread.join()

    @property
    def unanswered(self) -> int:
        """Requests that run or wait."""
        return len(self._queue) + len(self._running)

    # ---- the thread -----------------------------------------------------------------------------

    def _work(self) -> None:
        device = next(self._engine.module.parameters()).device
        if device.type == "cuda":
            torch.cuda.set_device(device)
        while True:
            with self._changed:
                self._changed.wait_for(self._has_work)
                if self._closed:
                    return
                if self._given_up:
                    self._answer_given_up(None)
                    continue
                self._serving = True
                self._room = _larger(self._base, Room.of([self._queue[0].request]))
                self._begun = False
            try:
                with self._engine.serving(self._room, self._finished) as run:
                    self._free = list(range(self._room.samples))
                    while self._turn(run):
                        pass
            except Exception as error:  # whatever ended the run, somebody waits for an answer
                self._fail(error)
            finally:
                with self._changed:
                    self._serving = False
                    self._changed.notify_all()

    def _has_work(self) -> bool:
        return self._closed or bool(self._given_up) or (bool(self._queue) and not self._paused)

    def _turn(self, run: Run) -> bool:
        """Whoever came joins, then a burst; false: this run is over."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._paused or self._queue or self._running or self._given_up
            )
            if self._paused:
                self._answer_dropped(run, list(self._running))
                return False
            self._answer_given_up(run)
            if self._queue and not self._running and not self._fits(self._queue[0]):
                return False
            joining = self._joining()
        self._add(run, joining)
        if self._running:
            run.turn()
        return True

    def _fits(self, pending: _Pending) -> bool:
        return self._room.holds(Room.of([pending.request]))

    def _joining(self) -> dict[int, _Pending]:
        """Those at the head of the queue that there is a place for, by place."""
        joining: dict[int, _Pending] = {}
        while self._queue and self._free and self._fits(self._queue[0]):
            joining[self._free.pop()] = self._queue.popleft()
        self._running |= joining
        self._begun = self._begun or bool(joining)
        return joining

    def _add(self, run: Run, joining: dict[int, _Pending]) -> None:
        for job in jobs_of([pending.request for pending in joining.values()], joining):
            places = [sample.index for sample in job.samples]
            try:
                run.add(job)
            except GenerationError as error:  # too long for all pages; the others go on
                for place in places:
                    self._leave(place).future.set_exception(error)

    def _leave(self, place: int) -> _Pending:
        with self._changed:
            self._free.append(place)
            return self._running.pop(place)

    # ---- answers --------------------------------------------------------------------------------

    def _finished(self, places: list[int], out: Completions) -> None:
        """Samples that ended in a burst."""
        lengths = out.lengths[torch.tensor(places, device=out.lengths.device)].tolist()
        for place, answer in zip(places, _answers(places, lengths, out), strict=True):
            self._leave(place).future.set_result(answer)

    def _answer_dropped(self, run: Run, places: Sequence[int]) -> None:
        drawn = run.drop(places)
        lengths = [drawn[place] for place in places]
        answers = _answers(places, lengths, run.out, aborted=True)
        for place, answer in zip(places, answers, strict=True):
            self._leave(place).future.set_result(answer)

    def _answer_given_up(self, run: Run | None) -> None:
        gone, self._given_up = {id(future) for future in self._given_up}, []
        self._answer_queue(lambda pending: id(pending.future) in gone)
        if run is not None:
            running = [p for p, pending in self._running.items() if id(pending.future) in gone]
            self._answer_dropped(run, running)

    def _answer_queue(self, chosen: Callable[[_Pending], bool] = lambda _: True) -> None:
        answered = [pending for pending in self._queue if chosen(pending)]
        self._queue = deque(pending for pending in self._queue if pending not in answered)
        for pending in answered:
            pending.future.set_result(Answer([], [], [], False, aborted=True))

    def _fail(self, error: Exception) -> None:
        with self._changed:
            failed = list(self._running.values())
            self._running.clear()
            if not self._begun:  # a run that cannot begin would not begin for the next one either
                failed += self._queue
                self._queue.clear()
        for pending in failed:
            pending.future.set_exception(error)


def _larger(room: Room, other: Room) -> Room:
    """The first, with room for what needs the second."""
    return Room(
        room.samples,
        max(room.columns, other.columns),
        max(room.longest, other.longest),
        max(room.stops, other.stops),
    )


def _answers(
    places: Sequence[int], lengths: Sequence[int], out: Completions, *, aborted: bool = False
) -> list[Answer]:
    if not places:
        return []
    found = out.select(places)
    columns = max(lengths)
    rows = (x[:, :columns].tolist() for x in (found.tokens, found.logprobs, found.raw_logprobs))
    ended = found.ended.tolist()
    return [
        Answer(t[:n], p[:n], raw[:n], end and not aborted, aborted)
        for n, t, p, raw, end in zip(lengths, *rows, ended, strict=True)
    ]
