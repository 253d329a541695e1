"""The runner's work done by transformers' continuous batching, with our sampler in it.

transformers schedules, keeps the pages and runs the model in a thread of its own; what is drawn and
what is returned comes from `SeededSampler`, so seeds, settings a request, stop strings and raw
log-probs mean what they mean on every path. Each run makes a manager of its own: one that is kept
keeps the keys and values of prompts it has seen, which belong to older weights.
"""

from __future__ import annotations

import functools
import queue
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from transformers import ContinuousBatchingConfig, GenerationConfig, LogitsProcessorList
from transformers.generation.continuous_batching.cb_logits_processors import (
    ContinuousBatchingLogitsProcessorList,
)

from rlhf_fast.engine.module_forward import cache_shape_of, unwrapped
from rlhf_fast.engine.paged_cache import default_page_size
from rlhf_fast.engine.progress import GenerationSummary, Progress, ProgressReports
from rlhf_fast.engine.requests import Completions, Request
from rlhf_fast.engine.runner import RunnerSettings
from rlhf_fast.engine.stopping import Decode
from rlhf_fast.engine.transformers_path import why_not_transformers
from rlhf_fast.engine.transformers_sampler import SeededSampler
from rlhf_fast.errors import GenerationError
from rlhf_fast.models.attention_mode import attention_configs, attention_mode

# Without a flash kernel every step attends under a mask [tokens of the step, all tokens in pages],
# which exists at its largest from the start.
_MASKED_TOKENS = 256
# What transformers 5.17 called `block_size`.
PAGE_SIZE = "page_size" if hasattr(ContinuousBatchingConfig, "page_size") else "block_size"


class TransformersRunner:
    """Generates for requests on one device; see `rlhf_fast.engine.runner.Runner` for the contract.

    `burst` and `poison` of the settings have no meaning here. Samples that run out of pages are
    recomputed by transformers, which does not count them.

    Args:
        module: the model, or a peft wrapper around it; adapters that are active take part.
        device: where it lives.
        eos_ids: ids that end every response.
        decode: ids to texts, for stop strings.
        settings: sizes.
        cache_bytes: how much key-value memory there may be, asked for before each run.
    """

    def __init__(
        self,
        module: nn.Module,
        device: torch.device,
        *,
        eos_ids: Sequence[int],
        decode: Decode | None,
        settings: RunnerSettings,
        cache_bytes: Callable[[], int],
    ) -> None:
        self.module = module
        self.device = device
        self.eos_ids = tuple(eos_ids)
        self.decode = decode
        self.settings = settings
        self.page_size = settings.page_size or default_page_size(device.type)
        self.last: GenerationSummary | None = None
        self._cache_bytes = cache_bytes

    def release(self) -> None:
        """Nothing is held between runs."""

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
            reports: given the progress after every step.
            on_finished: called once, with all samples: while others go on, the model is in use by
                another thread.
            after_burst: never called, for the same reason.

        Raises:
            GenerationError: RF4007, a sample does not fit into the pages; RF4032, the model has
                become one that transformers would get wrong; RF4036, transformers failed.
            DivergedGeneration: RF4010, logits that are no distribution.
        """
        if not any(request.seeds for request in requests):
            return Completions.empty(0, 0, self.device)
        fault = why_not_transformers(self.module)
        if fault is not None:
            raise GenerationError(
                "RF4032",
                f"the model has changed since the engine was made: {fault}",
                remedy="change the model before the engine is made",
            )
        sizes, started = self._sizes(requests), time.perf_counter()

        def cancel(index: int) -> None:
            manager.cancel_request(str(index))

        sampler = SeededSampler(requests, self.eos_ids, self.decode, self.device, cancel)
        model = unwrapped(self.module)
        devices = [self.device] if self.device.type == "cuda" else []
        # transformers chooses its attention, and seeds the generator of torch, which nobody uses.
        with (
            attention_mode(attention_configs(self.module), model.config._attn_implementation),
            torch.random.fork_rng(devices),
        ):
            manager = _manager(model, sizes, sampler)
            finished = False
            try:
                manager.start()
                _submit(manager, sampler)
                _follow(manager, sampler, reports)
                finished = True
            finally:
                manager.stop(block=True, hard_stop=not finished)
                manager.destroy()
            _require_agreement(manager, sampler)
        tokens = int(sampler.out.lengths.sum())
        self.last = GenerationSummary(tokens, time.perf_counter() - started)
        if on_finished is not None:
            on_finished(list(range(sampler.samples)), sampler.out)
        return sampler.out

    def _sizes(self, requests: Sequence[Request]) -> dict[str, Any]:
        """Rows, tokens of a step and pages of this run."""
        size = self.page_size
        page_bytes = cache_shape_of(self.module).token_bytes * size
        longest = max(len(r.prompt) + r.sampling.max_new_tokens for r in requests)
        rows = min(sum(len(r.seeds) for r in requests), self.settings.max_rows)
        affordable = self._cache_bytes() // page_bytes
        # Whole pages, and one for each row that is shared no longer.
        needed = -(-longest // size) + 1
        if affordable < needed:
            raise GenerationError(
                "RF4007",
                f"key-value memory holds {affordable} pages of {size} tokens; one sample of "
                f"{longest} tokens takes up to {needed}",
                remedy="raise engine.kv_gb",
            )
        return {
            PAGE_SIZE: size,
            "num_blocks": min((rows + 1) * needed, affordable),
            "max_requests_per_batch": rows,
            "max_batch_tokens": max(rows, min(self.settings.prefill_tokens, _MASKED_TOKENS)),
        }


def _manager(model: Any, sizes: dict[str, Any], sampler: SeededSampler) -> Any:
    """A manager of its own that draws with `sampler`."""
    # A manager kept on the model would be handed out again, with pages of older weights.
    model.destroy_cached_continuous_batching_manager()
    manager = model.init_continuous_batching(
        # Which tokens end a response comes with each request; -1 is none.
        generation_config=GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0),
        # The sampler keeps its books on the host, step by step.
        continuous_batching_config=ContinuousBatchingConfig(
            use_async_batching=False, use_cuda_graph=False, **sizes
        ),
    )
    processors = ContinuousBatchingLogitsProcessorList(LogitsProcessorList([sampler]))
    processors.tensors_required = 1  # the sample of each row
    manager.logit_processor = processors
    return manager


def _submit(manager: Any, sampler: SeededSampler) -> None:
    for index, request in enumerate(sampler.requests):
        manager.add_request(
            list(request.prompt),
            request_id=str(index),
            max_new_tokens=request.sampling.max_new_tokens,
            eos_token_id=list(sampler.stop_ids[index]),
            sample=index,
        )


def _follow(manager: Any, sampler: SeededSampler, reports: ProgressReports | None) -> None:
    """Wait for the last sample, or raise what went wrong in the other thread."""
    while True:
        try:
            event = sampler.events.get(timeout=0.1)
        except queue.Empty:
            if manager.is_running():
                continue
            raise _failure(manager, "its loop ended early") from None
        if isinstance(event, BaseException):
            raise event
        last = event.finished == event.samples
        if reports is not None:
            reports.give(functools.partial(_same, event), last=last)
        if last:
            return


def _same(event: Progress) -> Progress:
    return event


def _require_agreement(manager: Any, sampler: SeededSampler) -> None:
    """What transformers recorded must be what was drawn.

    Cancelled samples have no record there.
    """
    lengths = sampler.out.lengths.tolist()
    while (result := manager.get_result(timeout=0.0)) is not None:
        index = int(result.request_id)
        if result.error is not None:
            raise _failure(manager, result.error)
        drawn = sampler.out.tokens[index, : lengths[index]].tolist()
        if result.generated_tokens != drawn:
            raise _failure(manager, f"sample {index} is not what was drawn")


def _failure(manager: Any, what: str) -> GenerationError:
    result = manager.get_result(timeout=0.0)
    cause = f"{what}: {result.error}" if result is not None and result.error else what
    return GenerationError(
        "RF4036",
        f"transformers' continuous batching failed: {cause}",
        remedy="use engine.path=auto or padded",
    )
