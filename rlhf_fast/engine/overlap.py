"""Scoring of finished samples while the last ones are still drawn.

Towards the end of a rollout few rows decode, and decoding few rows leaves an accelerator idle: a
step reads all weights for a handful of tokens. From the moment when nothing waits and at most half
of the rows run, samples that are finished are handed to a scorer between two bursts, one pack at a
time, on a stream of its own on CUDA. What is left when the last row ends is scored afterwards.

Which samples share a pack follows from the order in which they finished and from nothing else: no
clock decides, so a run with as many pages repeats to the bit. On a CPU nothing is idle.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch

from rlhf_fast.engine.requests import Completions, rollout_of
from rlhf_fast.engine.side_streams import side_stream
from rlhf_fast.protocols import FinishedScorer
from rlhf_fast.types import PromptBatch, Rollout, SamplingParams


class Overlap:
    """Collects the finished samples of one rollout and scores them once its batch is small.

    Args:
        scorer: reads them.
        prompts, sampling, group, version: of the rollout.
        capacity: rows that decode side by side at most.
        surroundings: entered around each call of the scorer; must make the module what it is
            outside generation.
        device: where the module is.
    """

    def __init__(
        self,
        scorer: FinishedScorer,
        prompts: PromptBatch,
        sampling: SamplingParams,
        group: int,
        version: int,
        *,
        capacity: int,
        surroundings: Callable[[], AbstractContextManager[None]],
        device: torch.device,
    ) -> None:
        self._scorer = scorer
        self._prompts, self._sampling = prompts, sampling
        self._group, self._version = group, version
        self._capacity = min(capacity, len(prompts) * group)
        self._surroundings = surroundings
        self._device = device
        self._stream = side_stream(device, "score")
        self._prompt_lengths = prompts.sequences.lengths.tolist()
        self._fresh: list[int] = []
        self._queue: deque[tuple[int, int]] = deque()
        # Their memory is the generating stream's, which would write to it again once it is free.
        self._lent: list[Rollout] = []

    def finished(self, samples: Sequence[int]) -> None:
        """Samples that ended in a burst, in the order of their rows."""
        self._fresh += samples

    def after_burst(self, running: int, waiting: int, out: Completions) -> None:
        """Score one pack if it is full and the batch has become small.

        Args:
            running, waiting: samples that are not finished.
            out: final for the finished ones.
        """
        if waiting or not 0 < 2 * running <= self._capacity:
            return
        pack = self._next_pack(out)
        if pack:
            # Read by the stream that has just been waited for; the other one may be at work.
            rollout = self._rollout(pack, out)
            self._lent.append(rollout)
            with self._surroundings(), self._aside():
                self._scorer.score(pack, rollout)

    def join(self) -> None:
        """What was scored may be read by the stream that generates."""
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)
        self._lent.clear()

    @contextmanager
    def _aside(self) -> Iterator[None]:
        """Behind all that was asked for so far, beside all that comes."""
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            yield

    def _next_pack(self, out: Completions) -> list[int]:
        """The oldest finished samples that fill a pack; nothing if they do not fill one yet."""
        if self._fresh:
            # The device has just been waited for, so that the host could see who ended.
            lengths = out.lengths[torch.tensor(self._fresh, device=out.lengths.device)].tolist()
            for sample, length in zip(self._fresh, lengths, strict=True):
                self._queue.append((sample, self._prompt_lengths[sample // self._group] + length))
            self._fresh = []
        count, tokens = 0, 0
        for _, length in self._queue:
            if tokens + length > self._scorer.pack_tokens:
                return [self._queue.popleft()[0] for _ in range(count)]
            count, tokens = count + 1, tokens + length
        return []

    def _rollout(self, samples: Sequence[int], out: Completions) -> Rollout:
        prompts = self._prompts.select([sample // self._group for sample in samples])
        return rollout_of(prompts, self._sampling, 1, out.select(samples), self._version)
