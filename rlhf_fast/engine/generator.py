"""Batched sampling from a Hugging Face causal LM, as `rlhf_fast.protocols.Generator`.

The module that training updates is the module that generates: nothing is copied, so its weights
are never stale. Samples decode in batches of similar prompt length; a group's samples share their
prompt's prefill; rows that finish leave the batch. The result depends on prompt, seed and weights
alone: batch size, order, padding and the company in the batch change nothing but fp rounding.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rlhf_fast.engine.batching import PaddedPrompts, pad_left, plan_batches
from rlhf_fast.engine.kv_cache import DecodeCache, keeps_keys_and_values
from rlhf_fast.engine.sampler import Draw, counter_uniform, sample, validate_sampling
from rlhf_fast.engine.stopping import Decode, StopRule
from rlhf_fast.errors import DivergedGeneration, GenerationError
from rlhf_fast.types import PromptBatch, Rollout, SamplingParams

# A compaction copies the keys and values it moves once; a dead row costs about as much at every
# step. With an eighth of the batch dead the copy has paid for itself within a few steps.
_COMPACT_FRACTION = 8
# What a causal LM calls its key-value cache: transformers renamed it in 5.24.
CACHE_ARGUMENTS = ("cache", "past_key_values")


class Progress(NamedTuple):
    """What a progress bar wants to know: samples finished, samples in all, tokens drawn so far."""

    finished: int
    samples: int
    tokens: int


@dataclass
class _Outputs:
    """Results of all S samples, written in place: tokens, logprobs [S, R]; lengths, ended [S]."""

    tokens: Tensor
    logprobs: Tensor
    lengths: Tensor
    ended: Tensor

    @classmethod
    def empty(cls, samples: int, columns: int, device: torch.device) -> _Outputs:
        return cls(
            torch.zeros(samples, columns, dtype=torch.int64, device=device),
            torch.zeros(samples, columns, dtype=torch.float32, device=device),
            torch.full((samples,), columns, dtype=torch.int64, device=device),
            torch.zeros(samples, dtype=torch.bool, device=device),
        )


@dataclass
class _Rows:
    """The rows of a decoding batch: sample index, next position and liveness, all [n]."""

    sample: Tensor
    uniforms: Tensor  # [n, R] float64, every draw's: hashed at once instead of 25 tiny ops a step
    positions: Tensor
    live: Tensor
    mask: Tensor | None  # [n, prompt width + R] bool, None if no row is padded

    def keep(self, index: Tensor) -> None:
        self.sample, self.uniforms = self.sample[index], self.uniforms[index]
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
    out: _Outputs
    finished: int = 0
    tokens: int = 0


class HFGenerator:
    """Samples responses from the present weights of a Hugging Face causal LM.

    Args:
        module: a causal LM whose forward takes a key-value cache; a peft wrapper is one too.
        eos_ids: ids that end a response. No pad id is needed: padding is known from lengths.
        weight_version: read before and after each rollout; stamped on it.
        max_batch: sequences decoded side by side at most.
        max_batch_tokens: key-value slots (rows x longest prompt plus response) of a batch at most.
        decode: ids to texts, for stop strings.
        autocast_dtype: run forwards under autocast, for instance torch.bfloat16; None runs in the
            module's own dtype. Sampling is float32 in either case.
        on_progress: called after every token step with a `Progress`.
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
        autocast_dtype: torch.dtype | None = None,
        on_progress: Callable[[Progress], None] | None = None,
    ) -> None:
        self.module = module
        self.eos_ids = tuple(sorted(set(eos_ids)))
        self.max_batch = max_batch
        self.max_batch_tokens = max_batch_tokens
        self.on_progress = on_progress
        self._weight_version = weight_version
        self._decode_texts = decode
        self._autocast_dtype = autocast_dtype
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

    @classmethod
    def from_tokenizer(cls, module: nn.Module, tokenizer: Any, **options: Any) -> HFGenerator:
        """A generator that stops where this tokenizer and the model's generation config stop.

        Chat models end their turn with another token than the tokenizer's EOS and name it in their
        generation config, so both are read. `options` are the constructor's.
        """
        config = getattr(module, "generation_config", None)
        named = (tokenizer.eos_token_id, getattr(config, "eos_token_id", None))
        ids = [i for entry in named for i in (entry if isinstance(entry, list) else [entry])]

        def decode(batch: list[list[int]]) -> list[str]:
            return tokenizer.batch_decode(
                batch, skip_special_tokens=False, clean_up_tokenization_spaces=False
            )

        return cls(module, eos_ids=[i for i in ids if i is not None], decode=decode, **options)

    def generate(
        self,
        prompts: PromptBatch,
        sampling: SamplingParams,
        *,
        samples_per_prompt: int,
        seeds: Sequence[int],
    ) -> Rollout:
        """Draw G samples per prompt.

        `rollout_logprobs` are under softmax(logits / temperature), before top-k, top-p and min-p
        (softmax(logits) at temperature 0): the quantity that the trainer recomputes. R is the
        length of the longest response. Tensors come back on the device of the prompts. Modes of the
        module and its submodules are what they were before, whatever happens.

        Args:
            prompts: B prompts of at least one token each.
            sampling: how to draw.
            samples_per_prompt: G.
            seeds: S = B*G integers, see `rlhf_fast.seeds.derive_seed`.

        Raises:
            GenerationError: RF4001 to RF4009; nothing is generated if a check of the input fails.
        """
        self._check(prompts, sampling, samples_per_prompt, seeds)
        version = self._weight_version()
        with self._without_gradients(), _evaluation_mode(self.module):
            job = self._job(prompts, sampling, samples_per_prompt, seeds)
            for batch in plan_batches(
                prompts.sequences.lengths.tolist(),
                samples_per_prompt,
                sampling.max_new_tokens,
                self.max_batch,
                self.max_batch_tokens,
            ):
                self._run_batch(job, batch)
            rollout = _rollout(job, version)
        if self._weight_version() != version:
            raise GenerationError(
                "RF4008",
                f"the weights changed from version {version} to {self._weight_version()} "
                "while a rollout was being generated",
                remedy="finish generate() before the optimizer steps",
            )
        return rollout

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
            _Outputs.empty(len(prompts) * group, sampling.max_new_tokens, device),
        )

    def _device(self) -> torch.device:
        return next(self.module.parameters()).device

    @contextmanager
    def _without_gradients(self) -> Iterator[None]:
        device, dtype = self._device(), self._autocast_dtype
        # no_grad, and not inference_mode even if the caller is in it: FSDP2 modules whose first
        # forward runs under inference_mode cannot be trained afterwards.
        with torch.inference_mode(False), torch.no_grad():
            # Autocast keeps casts of the weights until the OUTERMOST context ends. Inside a
            # caller's context that would hand the generator stale weights, and the next training
            # forward casts that carry no gradient.
            torch.clear_autocast_cache()
            try:
                with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
                    yield
            finally:
                torch.clear_autocast_cache()

    def _check(
        self,
        prompts: PromptBatch,
        sampling: SamplingParams,
        samples_per_prompt: int,
        seeds: Sequence[int],
    ) -> None:
        wrapped: Any = self.module
        vocab = int(wrapped.get_input_embeddings().weight.shape[0])
        validate_sampling(sampling, vocab)
        samples = len(prompts) * samples_per_prompt
        if samples_per_prompt < 1 or len(seeds) != samples:
            raise GenerationError(
                "RF4004",
                f"{len(prompts)} prompts x {samples_per_prompt} samples came with "
                f"{len(seeds)} seeds",
                expected="at least one sample per prompt and one seed for every sample",
            )
        text_config = self._config.get_text_config(decoder=True)
        positions = getattr(text_config, "max_position_embeddings", None)
        _check_lengths(prompts, sampling.max_new_tokens, positions)
        _check_ids(prompts, vocab)

    def _run_batch(self, job: _Job, batch: list[int]) -> None:
        rows, logits, cache, width = self._prefill(job, batch)
        limit = job.sampling.max_new_tokens
        for step in range(limit):
            draw = sample(logits, rows.uniforms[:, step], job.sampling)
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
            counter_uniform(
                job.seeds[sample_index].unsqueeze(-1),
                torch.arange(job.sampling.max_new_tokens, device=device),
            ),
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
        return self.module(input_ids=ids, use_cache=True, **arguments).logits[:, -1]

    def _record(self, job: _Job, rows: _Rows, draw: Draw, step: int) -> int:
        """Write the step's tokens, end the rows that are complete; returns how many live on."""
        out = job.out
        # Dead rows write as well; columns beyond a row's length are cleared at the end.
        out.tokens[rows.sample, step] = draw.tokens
        out.logprobs[rows.sample, step] = draw.raw_logprobs
        ends = job.stop.ends(draw.tokens)
        if job.sampling.stop_strings:
            ends = ends | job.stop.completed(out.tokens[rows.sample, : step + 1].clamp(min=0))
        ends = ends & rows.live
        out.lengths[rows.sample] = torch.where(ends, step + 1, out.lengths[rows.sample])
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
        if self.on_progress is not None:
            self.on_progress(Progress(job.finished, out.lengths.numel(), job.tokens))
        return alive

    def _raise_unusable(self, job: _Job, samples: list[int], step: int) -> None:
        first = samples[0]
        broken = next(
            (n for n, p in self.module.named_parameters() if not bool(p.isfinite().all())), None
        )
        cause = f"parameter {broken} holds NaN or Inf" if broken else "all parameters are finite"
        raise DivergedGeneration(
            "RF4010",
            f"the logits of {len(samples)} of {job.out.lengths.numel()} samples are NaN, +Inf or "
            f"all -Inf at response token {step}; {cause}",
            where=f"sample {first % job.group} of {_prompt_name(job.prompts, first // job.group)}",
            remedy="resume from the last good checkpoint with a lower learning rate"
            if broken
            else "the forward overflows: try float32, or check the attention implementation",
        )


def _check_lengths(prompts: PromptBatch, max_new_tokens: int, positions: int | None) -> None:
    for index, length in enumerate(prompts.sequences.lengths.tolist()):
        if length == 0:
            raise GenerationError(
                "RF4005",
                "a prompt has no token, so there is nothing to predict from",
                where=_prompt_name(prompts, index),
                remedy="drop the row, or begin prompts with a BOS token",
            )
        if positions is not None and length + max_new_tokens > positions:
            raise GenerationError(
                "RF4006",
                f"{length} prompt tokens + max_new_tokens={max_new_tokens} exceed "
                f"the model's {positions} positions",
                where=_prompt_name(prompts, index),
                remedy="shorten or filter prompts (data.max_prompt_length), or lower "
                "sampling.max_new_tokens",
            )


def _check_ids(prompts: PromptBatch, vocab: int) -> None:
    ids = prompts.sequences.ids
    strangers = ((ids < 0) | (ids >= vocab)).nonzero().flatten().tolist()
    if strangers:
        bounds = prompts.sequences.cu_seqlens.tolist()
        index = sum(bound <= strangers[0] for bound in bounds) - 1
        raise GenerationError(
            "RF4009",
            f"token id {int(ids[strangers[0]])} does not exist in a model with {vocab} "
            "embedding rows",
            where=_prompt_name(prompts, index),
            remedy="use the tokenizer that belongs to the model",
        )


@contextmanager
def _evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Eval mode inside; afterwards every submodule has the mode it had, not just the root's."""
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True


def _survivors(live: Tensor, alive: int) -> Tensor:
    """[alive] int64 rows to keep: row i itself where it lives, else a live row from the end."""
    index = torch.arange(alive, device=live.device)
    index[~live[:alive]] = live[alive:].nonzero().squeeze(-1) + alive
    return index


def _decode_mask(padded: PaddedPrompts, source: Tensor, new_tokens: int) -> Tensor:
    prompt = padded.mask[source]
    return torch.cat([prompt, prompt.new_ones(prompt.shape[0], new_tokens)], dim=-1)


def _prompt_name(prompts: PromptBatch, index: int) -> str:
    text = prompts.texts[index]
    shown = text if len(text) <= 80 else text[:77] + "..."
    return f"prompt {index} (uid {prompts.uid[index]}): {shown!r}"


def _rollout(job: _Job, version: int) -> Rollout:
    device = job.prompts.sequences.ids.device
    out = job.out
    lengths = out.lengths.to(device)
    columns = int(lengths.max()) if lengths.numel() else 0
    mask = torch.arange(columns, device=device) < lengths.unsqueeze(-1)
    return Rollout(
        prompts=job.prompts,
        samples_per_prompt=job.group,
        responses=out.tokens[:, :columns].to(device).where(mask, 0),
        response_mask=mask,
        lengths=lengths,
        ended=out.ended.to(device),
        rollout_logprobs=out.logprobs[:, :columns].to(device).where(mask, 0.0),
        sampling=job.sampling,
        weight_version=version,
    )
