"""Batched sampling from a Hugging Face causal LM, as `rlhf_fast.protocols.Generator`.

The module that training updates is the module that generates: nothing is copied, so its weights
are never stale. Samples decode in batches of similar prompt length; a group's samples share their
prompt's prefill; rows that finish leave the batch. The result depends on prompt, seed and weights
alone: batch size, order, padding and the company in the batch change nothing but fp rounding.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_fast.engine.batching import PaddedPrompts, pad_left, plan_batches
from rlhf_fast.engine.kv_cache import DecodeCache, keeps_keys_and_values
from rlhf_fast.engine.module_forward import at_most_float32, batch_dependent_rope, uncompiled
from rlhf_fast.engine.progress import GenerationSummary, Progress, ProgressReports
from rlhf_fast.engine.requests import (
    Completions,
    check_requests,
    context_limit,
    prompt_name,
    requests_of,
    rollout_of,
)
from rlhf_fast.engine.stopping import Decode, StopRule, checked_eos_ids, stops_of
from rlhf_fast.errors import DivergedGeneration, GenerationError
from rlhf_fast.models.forward import autocast, device_of
from rlhf_fast.models.longrope import tables_by_sequence
from rlhf_fast.protocols import FinishedScorer
from rlhf_fast.types import PromptBatch, Rollout, SamplingParams
from rlhf_fast_kernels import SampleOutput, sample

# A compaction copies the keys and values it moves once; a dead row costs about as much at every
# step. With an eighth of the batch dead the copy has paid for itself within a few steps.
_COMPACT_FRACTION = 8
# What a causal LM calls its key-value cache: transformers renamed it in 5.24.
CACHE_ARGUMENTS = ("cache", "past_key_values")


@dataclass
class _Rows:
    """The rows of a decoding batch: sample index, seed, next position and liveness, all [n]."""

    sample: Tensor
    seeds: Tensor
    positions: Tensor
    live: Tensor
    mask: Tensor | None  # [n, prompt width + R] bool, None if no row is padded

    def keep(self, index: Tensor) -> None:
        self.sample, self.seeds = self.sample[index], self.seeds[index]
        self.positions, self.live = self.positions[index], self.live[index]
        if self.mask is not None:
            self.mask = self.mask[index]


@dataclass
class _Job:
    """One `generate` call: what every batch of it shares."""

    prompts: PromptBatch
    group: int
    sampling: SamplingParams
    seeds: Tensor
    stop: StopRule
    out: Completions
    reports: ProgressReports | None
    started: float = field(default_factory=time.perf_counter)
    finished: int = 0
    tokens: int = 0

    def summary(self) -> GenerationSummary:
        return GenerationSummary(self.tokens, time.perf_counter() - self.started)

    def progress(self, running: int) -> Progress:
        samples = self.out.lengths.numel()
        return Progress(
            *(self.finished, samples, self.tokens, running, samples - self.finished - running),
            tokens_per_second=self.summary().tokens_per_second,
        )


class HFGenerator:
    """Samples responses from the present weights of a Hugging Face causal LM.

    Args:
        module: a causal LM whose forward takes a key-value cache; a peft wrapper is one too.
        eos_ids: ids that end a response. No pad id is needed: padding is known from lengths.
        weight_version: read before and after each rollout; stamped on it.
        max_batch: sequences decoded side by side at most.
        max_batch_tokens: key-value slots (rows x longest prompt plus response) of a batch at most.
        decode: ids to texts, for stop strings.
        on_progress: called after every token step with a `Progress`.
        progress_seconds: but not more often than that.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        eos_ids: Iterable[int],
        weight_version: Callable[[], int] = lambda: 0,
        max_batch: int = 256,
        max_batch_tokens: int | None = None,
        decode: Decode | None = None,
        on_progress: Callable[[Progress], None] | None = None,
        progress_seconds: float = 0.0,
    ) -> None:
        self.module = module = uncompiled(module)
        self.eos_ids = checked_eos_ids(eos_ids)
        self.max_batch = max_batch
        self.max_batch_tokens = max_batch_tokens
        self.on_progress = on_progress
        self.progress_seconds = progress_seconds
        self.last: GenerationSummary | None = None
        self._weight_version = weight_version
        self._decode_texts = decode
        # peft's forward hides the model's parameters behind **kwargs.
        unwrap: Any = getattr(module, "get_base_model", None)
        inner: Any = module if unwrap is None else unwrap()
        self._config = inner.config
        self._accepts = frozenset(inspect.signature(inner.forward).parameters)
        names = [name for name in CACHE_ARGUMENTS if name in self._accepts]
        if not names or not keeps_keys_and_values(self._config):
            raise GenerationError(
                "RF4003",
                f"{type(inner).__name__} cannot decode with a key-value cache",
                expected=f"a causal LM whose forward takes {' or '.join(CACHE_ARGUMENTS)}",
            )
        self._cache_argument = names[0]
        self._by_longest = batch_dependent_rope(self._config)

    @classmethod
    def from_tokenizer(cls, module: nn.Module, tokenizer: Any, **options: Any) -> HFGenerator:
        """A generator that stops where this tokenizer and the model's generation config stop.

        Chat models end their turn with another token than the tokenizer's EOS and name it in their
        generation config, so both are read. `options` are the constructor's.
        """
        eos_ids, decode = stops_of(module, tokenizer)
        return cls(module, eos_ids=eos_ids, decode=decode, **options)

    def generate(
        self,
        prompts: PromptBatch,
        sampling: SamplingParams,
        *,
        samples_per_prompt: int,
        seeds: Sequence[int],
        scorer: FinishedScorer | None = None,
    ) -> Rollout:
        """Draw G samples per prompt, as `HybridEngine.generate` says.

        A `scorer` is given nothing: whole batches end, not samples.

        Raises:
            GenerationError: RF4001 to RF4010; nothing is generated if a check of the input fails.
        """
        wrapped: Any = self.module
        vocab = int(wrapped.get_input_embeddings().weight.shape[0])
        requests = requests_of(prompts, sampling, samples_per_prompt, seeds)
        check_requests(requests, vocab, context_limit(self._config))
        version = self._weight_version()
        with without_gradients(self.module), evaluation_mode(self.module):
            job = self._job(prompts, sampling, samples_per_prompt, seeds)
            for batch in plan_batches(
                prompts.sequences.lengths.tolist(),
                samples_per_prompt,
                sampling.max_new_tokens,
                self.max_batch,
                self.max_batch_tokens,
            ):
                self._run_batch(job, batch)
        self.last = job.summary()
        require_same_version(version, self._weight_version())
        return rollout_of(prompts, sampling, samples_per_prompt, job.out, version)

    def _job(
        self, prompts: PromptBatch, sampling: SamplingParams, group: int, seeds: Sequence[int]
    ) -> _Job:
        device = self._device()
        ids = (*self.eos_ids, *sampling.stop_token_ids)
        return _Job(
            prompts,
            group,
            sampling,
            torch.tensor(seeds, dtype=torch.int64, device=device),
            StopRule(ids, sampling.stop_strings, self._decode_texts, device),
            Completions.empty(len(prompts) * group, sampling.max_new_tokens, device),
            None
            if self.on_progress is None
            else ProgressReports(self.on_progress, self.progress_seconds),
        )

    def _device(self) -> torch.device:
        return next(self.module.parameters()).device

    def _run_batch(self, job: _Job, batch: list[int]) -> None:
        rows, logits, cache, width = self._prefill(job, batch)
        limit = job.sampling.max_new_tokens
        for step in range(limit):
            draw = _sample(logits, rows.seeds, step, job.sampling)
            alive = self._record(job, rows, draw, step)
            if alive == 0 or step + 1 == limit:
                break
            tokens = draw.tokens
            if len(batch) - alive >= max(1, len(batch) // _COMPACT_FRACTION):
                index = _survivors(rows.live, alive)
                tokens = tokens[index]
                rows.keep(index)
                cache.keep(index)
                batch = batch[:alive]
            # Rows that ended but still take part read a valid id; what they yield is not recorded.
            logits = self._forward(
                tokens.clamp(min=0).unsqueeze(-1),
                None if rows.mask is None else rows.mask[:, : width + step + 1],
                rows.positions.unsqueeze(-1),
                cache,
            )
            rows.positions = rows.positions + 1

    def _prefill(self, job: _Job, batch: list[int]) -> tuple[_Rows, Tensor, DecodeCache, int]:
        device = self._device()
        unique = list(dict.fromkeys(s // job.group for s in batch))
        slot = {prompt: row for row, prompt in enumerate(unique)}
        padded = pad_left(job.prompts.sequences, unique, device)
        width = padded.ids.shape[1]
        uneven = not bool(padded.mask.all())
        cache = DecodeCache(self._config)
        logits = self._forward(padded.ids, padded.mask if uneven else None, padded.positions, cache)
        source = torch.tensor([slot[s // job.group] for s in batch], device=device)
        cache.expand(source)
        sample_index = torch.tensor(batch, device=device)
        rows = _Rows(
            sample_index,
            job.seeds[sample_index],
            padded.positions[source, -1] + 1,
            torch.ones(len(batch), dtype=torch.bool, device=device),
            _decode_mask(padded, source, job.sampling.max_new_tokens) if uneven else None,
        )
        return rows, logits[source], cache, width

    def _forward(
        self, ids: Tensor, mask: Tensor | None, positions: Tensor, cache: DecodeCache
    ) -> Tensor:
        """[B, V] logits after the last column of ids [B, q]."""
        arguments: dict[str, Any] = {"attention_mask": mask, self._cache_argument: cache.hf}
        if "position_ids" in self._accepts:
            arguments["position_ids"] = positions
        if "logits_to_keep" in self._accepts:
            arguments["logits_to_keep"] = 1
        with self._own_tables(positions):
            logits = self.module(input_ids=ids, use_cache=True, **arguments).logits
        return at_most_float32(logits[:, -1])

    def _own_tables(self, positions: Tensor) -> AbstractContextManager[None]:
        """Rotary tables by the length of each row, where a model would ask the longest of them."""
        if not self._by_longest:
            return nullcontext()
        return tables_by_sequence(self.module, positions.amax(dim=1).cpu() + 1, packed=False)

    def _record(self, job: _Job, rows: _Rows, draw: SampleOutput, step: int) -> int:
        """Write the step's tokens, end the rows that are complete; returns how many live on."""
        out = job.out
        # Dead rows write as well; columns beyond a row's length are cleared at the end.
        out.tokens[rows.sample, step] = draw.tokens
        out.logprobs[rows.sample, step] = draw.logprobs
        out.raw_logprobs[rows.sample, step] = draw.raw_logprobs
        ends = job.stop.ends(draw.tokens)
        if job.sampling.stop_strings:
            ends = ends | job.stop.completed(out.tokens[rows.sample, : step + 1].clamp(min=0))
        ends = ends & rows.live
        out.lengths[rows.sample] = torch.where(rows.live, step + 1, out.lengths[rows.sample])
        out.ended[rows.sample] |= ends
        unusable = rows.live & (draw.tokens < 0)
        was_live = rows.live
        rows.live = was_live & ~ends
        # The one synchronisation of a step.
        before, alive, faults = torch.stack(
            [was_live.sum(), rows.live.sum(), unusable.sum()]
        ).tolist()
        if faults:
            self._raise_unusable(job, rows.sample[unusable].tolist(), step)
        job.tokens += before
        last = step + 1 == job.sampling.max_new_tokens
        job.finished += before if last else before - alive
        if job.reports is not None:
            job.reports.give(
                lambda: job.progress(running=0 if last else alive),
                last=job.finished == out.lengths.numel(),
            )
        return alive

    def _raise_unusable(self, job: _Job, samples: list[int], step: int) -> None:
        first = samples[0]
        raise diverged(
            self.module,
            f"the logits of {len(samples)} of {job.out.lengths.numel()} samples are NaN, +Inf or "
            f"all -Inf at response token {step}",
            f"sample {first % job.group} of {prompt_name(job.prompts, first // job.group)}",
        )


def diverged(module: nn.Module, what: str, where: str) -> DivergedGeneration:
    """RF4010, saying whether a parameter is to blame."""
    broken = next((n for n, p in module.named_parameters() if not bool(p.isfinite().all())), None)
    cause = f"parameter {broken} holds NaN or Inf" if broken else "all parameters are finite"
    return DivergedGeneration(
        "RF4010",
        f"{what}; {cause}",
        where=where,
        remedy="resume from the last good checkpoint with a lower learning rate"
        if broken
        else "the forward overflows: try float32, or check the attention implementation",
    )


def require_same_version(before: int, after: int) -> None:
    """Refuse a rollout during which weights changed.

    Raises:
        GenerationError: RF4008.
    """
    if after != before:
        raise GenerationError(
            "RF4008",
            f"the weights changed from version {before} to {after} "
            "while a rollout was being generated",
            remedy="finish generate() before the optimizer steps",
        )


@contextmanager
def without_gradients(module: nn.Module) -> Iterator[None]:
    """No graph, in the type the module computes in, with weights as they are now."""
    # no_grad, and not inference_mode even if the caller is in it: FSDP2 modules whose first
    # forward runs under inference_mode cannot be trained afterwards.
    with torch.inference_mode(False), torch.no_grad():
        # Autocast keeps casts of the weights until the OUTERMOST context ends. Inside a
        # caller's context that would hand the generator stale weights, and the next training
        # forward casts that carry no gradient.
        torch.clear_autocast_cache()
        try:
            # Off first: a caller's autocast is not how this module is trained.
            with torch.autocast(device_of(module).type, enabled=False), autocast(module):
                yield
        finally:
            torch.clear_autocast_cache()


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[list[nn.Module]]:
    """Eval mode inside; afterwards every submodule has the mode it had, not just the root's.

    Yields:
        Those that were in train mode.
    """
    training = [part for part in module.modules() if part.training]
    try:
        module.eval()  # an interrupt may come among the submodules
        yield training
    finally:
        for part in training:
            part.training = True


@contextmanager
def training_mode(parts: Sequence[nn.Module]) -> Iterator[None]:
    """Inside `evaluation_mode`: these submodules in train mode, for a while."""
    try:
        for part in parts:
            part.training = True
        yield
    finally:
        for part in parts:
            part.training = False


@contextmanager
def no_autocast(module: nn.Module) -> Iterator[None]:
    """Inside `without_gradients`: autocast off, and what is cast by those who turn it on not kept.

    The outermost region would keep the casts of every model that is read here to its end.
    """
    with torch.autocast(device_of(module).type, enabled=False, cache_enabled=False):
        yield


def _sample(logits: Tensor, seeds: Tensor, step: int, sampling: SamplingParams) -> SampleOutput:
    return sample(
        logits,
        seeds=seeds,
        step=step,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
        with_entropy=False,
    )


def _survivors(live: Tensor, alive: int) -> Tensor:
    """[alive] int64 rows to keep: row i itself where it lives, else a live row from the end."""
    index = torch.arange(alive, device=live.device)
    index[~live[:alive]] = live[alive:].nonzero().squeeze(-1) + alive
    return index


def _decode_mask(padded: PaddedPrompts, source: Tensor, new_tokens: int) -> Tensor:
    prompt = padded.mask[source]
    return torch.cat([prompt, prompt.new_ones(prompt.shape[0], new_tokens)], dim=-1)
