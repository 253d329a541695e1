"""Our sampler inside transformers' continuous batching.

transformers hands the logits of a step to a list of processors and takes the best token of what
they return. A processor for continuous batching also gets one integer a row that it computes from
the row's request. Here that integer is the sample's index, and the processor draws: with the
sample's own seed, step and settings, by the op that every other path draws with. What it returns
leaves one token to choose.
"""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.generation.continuous_batching.cb_logits_processors import (
    ContinuousBatchingLogitsProcessor,
)

from rlhf_fast.engine.progress import Progress
from rlhf_fast.engine.requests import Completions, Request
from rlhf_fast.engine.stopping import Decode, StopRule
from rlhf_fast.errors import DivergedGeneration
from rlhf_fast_kernels import sample


class SeededSampler(ContinuousBatchingLogitsProcessor):
    """Draws for the rows of a step and records what it drew.

    It runs in the thread of transformers' loop. What the caller's thread has to know goes through
    `events`: a `Progress` after every step, or the exception that ended the run.

    Args:
        requests: what is asked for; sample s of `Completions` is the s-th of all their seeds.
        eos_ids: ids that end every response.
        decode: ids to texts, for stop strings.
        device: where the model lives.
        cancel: ends a sample that transformers would go on with.
    """

    def __init__(
        self,
        requests: Sequence[Request],
        eos_ids: Sequence[int],
        decode: Decode | None,
        device: torch.device,
        cancel: Callable[[int], None],
    ) -> None:
        # What `add_request` may be called with for this processor, and what it would overlook.
        self.supported_kwargs = {"sample": int}
        self.ignored_kwargs = ()
        self._cancel = cancel
        self.requests = [r for r in requests for _ in r.seeds]
        self.samples = len(self.requests)
        columns = max(r.sampling.max_new_tokens for r in requests)
        self.out = Completions.empty(self.samples, columns, device)
        self.events: queue.SimpleQueue[Progress | BaseException] = queue.SimpleQueue()
        self.stop_ids = [(*eos_ids, *r.sampling.stop_token_ids) for r in self.requests]

        def column(values: Sequence[float], dtype: torch.dtype) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=device)

        settings = [r.sampling for r in self.requests]
        self._seeds = column([s for r in requests for s in r.seeds], torch.int64)
        self._limits = column([s.max_new_tokens for s in settings], torch.int64)
        self._temperature = column([s.temperature for s in settings], torch.float32)
        self._top_k = column([s.top_k for s in settings], torch.int64)
        self._top_p = column([s.top_p for s in settings], torch.float32)
        self._min_p = column([s.min_p for s in settings], torch.float32)
        longest = max(map(len, self.stop_ids))
        padded = [[*ids, *[-1] * (longest - len(ids))] for ids in self.stop_ids]
        self._stops = torch.tensor(padded, dtype=torch.int64, device=device)
        self._strings = {
            s.stop_strings: StopRule((), s.stop_strings, decode, device)
            for s in settings
            if s.stop_strings
        }
        self._rows = 0
        self._started = time.perf_counter()
        self._finished = 0
        self._tokens = 0
        self._failed = False

    # ---- what transformers calls --------------------------------------------------------------

    def fill_defaults(self, int32_tensor: Tensor) -> None:
        """Rows that belong to no request."""
        int32_tensor.fill_(0)

    def prepare_tensor_args(self, requests_with_new_token: list[Any]) -> Tensor:
        """The sample of each row of the next step."""
        rows = [r.state.logit_processor_kwargs["sample"] for r in requests_with_new_token]
        self._rows = len(rows)
        return torch.tensor(rows, dtype=torch.int32)

    def __call__(self, scores: Tensor, tensor_arg: Tensor) -> Tensor:
        """[n, V] logits to 0 at the tokens drawn and -inf elsewhere."""
        # Prompts that are not complete yet have a row at the end, of which nothing is read.
        rows = self._rows
        tokens = torch.zeros(scores.shape[0], dtype=torch.int64, device=scores.device)
        if not self._failed:
            try:
                tokens[:rows] = self._draw(scores[:rows], tensor_arg[:rows].long())
            except BaseException as error:
                # Raised here it would end in transformers' log; the caller gets it instead.
                self._failed = True
                self.events.put(error)
        chosen = torch.full_like(scores, -torch.inf)
        return chosen.scatter_(1, tokens[:, None], 0.0)

    # ---- a step -------------------------------------------------------------------------------

    def _draw(self, scores: Tensor, samples: Tensor) -> Tensor:
        out, steps = self.out, self.out.lengths[samples]
        drawn = sample(
            scores,
            seeds=self._seeds[samples],
            step=steps,
            temperature=self._temperature[samples],
            top_k=self._top_k[samples],
            top_p=self._top_p[samples],
            min_p=self._min_p[samples],
            with_entropy=False,
        )
        out.tokens[samples, steps] = drawn.tokens
        out.logprobs[samples, steps] = drawn.logprobs
        out.raw_logprobs[samples, steps] = drawn.raw_logprobs
        out.lengths[samples] = steps + 1
        over = (drawn.tokens[:, None] == self._stops[samples]).any(1)
        full = steps + 1 == self._limits[samples]
        # The one wait for the device of a step.
        rows = torch.stack([samples, steps, drawn.tokens, over, full]).T.tolist()
        broken = [row for row in rows if row[2] < 0]
        if broken:
            raise self._diverged(broken)
        ended = [index for index, _, _, stopped, _ in rows if stopped]
        ended += self._ended_by_strings(rows)
        out.ended[ended] = True
        finished = {*ended, *(index for index, *_, at_limit in rows if at_limit)}
        self._finished += len(finished)
        self._tokens += len(rows)
        running = len(rows) - len(finished)
        waiting = self.samples - self._finished - running
        speed = self._tokens / max(time.perf_counter() - self._started, 1e-9)
        self.events.put(
            Progress(
                *(self._finished, self.samples, self._tokens, running, waiting),
                tokens_per_second=speed,
            )
        )
        return drawn.tokens

    def _ended_by_strings(self, rows: list[list[int]]) -> list[int]:
        """Samples whose text now holds one of their stop strings."""
        hits = []
        for index, step, _, stopped, full in rows:
            rule = self._strings.get(self.requests[index].sampling.stop_strings)
            if rule is None or stopped:
                continue
            if bool(rule.completed(self.out.tokens[index : index + 1, : step + 1])):
                hits.append(index)
                if not full:
                    self._cancel(index)
        return hits

    def _diverged(self, broken: list[list[int]]) -> DivergedGeneration:
        index, step = broken[0][:2]
        return DivergedGeneration(
            "RF4010",
            f"the logits of {len(broken)} of {self.samples} samples are NaN, +Inf or all -Inf at "
            f"response token {step}",
            where=f"sample {index} of {self.requests[index].name}",
        )
