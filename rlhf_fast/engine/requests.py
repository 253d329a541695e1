"""What is asked of the runner and what it answers: one prompt, some samples, their own settings.

A request is one prompt and G samples of it that share its prefill. Every request brings its own
`SamplingParams`, every sample its own seed, so requests of different kinds decode side by side and
a sample does not depend on its company.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from rlhf_fast.engine.sampling_params import is_int64, validate_sampling
from rlhf_fast.errors import GenerationError
from rlhf_fast.types import PromptBatch, Rollout, SamplingParams


@dataclass(frozen=True)
class Request:
    """G samples of one prompt.

    Args:
        prompt: P token ids, at least one.
        sampling: how to draw.
        seeds: G integers, one a sample.
        expected: response tokens it is likely to take; None: nobody knows.
        name: what a message calls it.
    """

    prompt: tuple[int, ...]
    sampling: SamplingParams
    seeds: tuple[int, ...]
    expected: float | None = None
    name: str = "prompt"


@dataclass
class Completions:
    """S samples, those of request 0 first; written in place while they are generated.

    Args:
        tokens: [S, R] int64, R the largest max_new_tokens; garbage at and after `lengths`.
        logprobs: [S, R] float32 under the distribution that was drawn from, after every filter.
        raw_logprobs: [S, R] float32 under softmax(logits / temperature) before top-k, top-p and
            min-p (softmax(logits) at temperature 0): what a trainer recomputes.
        lengths: [S] int64 tokens, the one that ended the sample included.
        ended: [S] bool, false if the sample was cut at max_new_tokens.
    """

    tokens: Tensor
    logprobs: Tensor
    raw_logprobs: Tensor
    lengths: Tensor
    ended: Tensor

    @classmethod
    def empty(cls, samples: int, columns: int, device: torch.device) -> Completions:
        """Room for S samples of at most `columns` tokens."""
        return cls(
            torch.zeros(samples, columns, dtype=torch.int64, device=device),
            torch.zeros(samples, columns, dtype=torch.float32, device=device),
            torch.zeros(samples, columns, dtype=torch.float32, device=device),
            torch.zeros(samples, dtype=torch.int64, device=device),
            torch.zeros(samples, dtype=torch.bool, device=device),
        )

    def select(self, samples: Sequence[int]) -> Completions:
        """A copy of the named samples."""
        index = torch.tensor(samples, dtype=torch.int64, device=self.lengths.device)
        return Completions(*(getattr(self, f.name)[index] for f in fields(self)))

    def first(self, samples: int) -> Completions:
        """A view of the first samples."""
        return Completions(*(getattr(self, f.name)[:samples] for f in fields(self)))


def requests_of(
    prompts: PromptBatch,
    sampling: SamplingParams | Sequence[SamplingParams],
    samples_per_prompt: int,
    seeds: Sequence[int],
    expected: Mapping[int, float] | None = None,
) -> list[Request]:
    """One request a prompt.

    Args:
        prompts: B prompts.
        sampling: for all of them, or B of them.
        samples_per_prompt: G.
        seeds: S = B*G integers.
        expected: uid -> response tokens its samples took before.

    Raises:
        GenerationError: RF4004, counts that do not fit.
    """
    samples = len(prompts) * samples_per_prompt
    each = [sampling] * len(prompts) if isinstance(sampling, SamplingParams) else list(sampling)
    if samples_per_prompt < 1 or len(seeds) != samples or len(each) != len(prompts):
        raise GenerationError(
            "RF4004",
            f"{len(prompts)} prompts x {samples_per_prompt} samples came with {len(seeds)} seeds "
            f"and {len(each)} sampling settings",
            expected="at least one sample per prompt, one seed for every sample, and settings for "
            "all prompts or one for each",
        )
    ids, bounds = prompts.sequences.ids.tolist(), prompts.sequences.cu_seqlens.tolist()
    return [
        Request(
            tuple(ids[bounds[b] : bounds[b + 1]]),
            each[b],
            tuple(int(s) for s in seeds[b * samples_per_prompt : (b + 1) * samples_per_prompt]),
            None if expected is None else expected.get(prompts.uid[b]),
            prompt_name(prompts, b),
        )
        for b in range(len(prompts))
    ]


def prompt_name(prompts: PromptBatch, index: int) -> str:
    """What a message calls a prompt: index, uid and the start of its text."""
    text = prompts.texts[index]
    shown = text if len(text) <= 80 else text[:77] + "..."
    return f"prompt {index} (uid {prompts.uid[index]}): {shown!r}"


def context_limit(config: Any) -> int | None:
    """Positions a model has, or None if it names no limit."""
    return getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)


def check_requests(requests: Sequence[Request], vocab: int, positions: int | None) -> None:
    """Refuse what cannot be generated, before anything is.

    Args:
        requests: what is asked for.
        vocab: rows of the embedding.
        positions: longest sequence the model reads; None: no limit.

    Raises:
        GenerationError: RF4001 sampling, RF4004 a seed that is none, RF4005 empty prompt, RF4006
            too long, RF4009 unknown id.
    """
    # What is wrong may not even have a hash.
    for sampling in {id(request.sampling): request.sampling for request in requests}.values():
        validate_sampling(sampling, vocab)
    for request in requests:
        strange = [seed for seed in request.seeds if not is_int64(seed)]
        if strange:
            raise GenerationError(
                "RF4004",
                f"{strange[0]!r} is no seed",
                where=request.name,
                expected="integers of 64 bits with a sign, one for every sample",
            )
        length, new_tokens = len(request.prompt), request.sampling.max_new_tokens
        if length == 0:
            raise GenerationError(
                "RF4005",
                "a prompt has no token, so there is nothing to predict from",
                where=request.name,
                remedy="drop the row, or begin prompts with a BOS token",
            )
        if positions is not None and length + new_tokens > positions:
            raise GenerationError(
                "RF4006",
                f"{length} prompt tokens + max_new_tokens={new_tokens} exceed "
                f"the model's {positions} positions",
                where=request.name,
                remedy="shorten or filter prompts (data.max_prompt_length), or lower "
                "sampling.max_new_tokens",
            )
        whole = set(map(type, request.prompt)) == {int} or all(map(is_int64, request.prompt))
        if not (whole and 0 <= min(request.prompt) <= max(request.prompt) < vocab):
            stranger = next(i for i in request.prompt if not (is_int64(i) and 0 <= i < vocab))
            raise GenerationError(
                "RF4009",
                f"token id {stranger!r} does not exist in a model with {vocab} embedding rows",
                where=request.name,
                remedy="use the tokenizer that belongs to the model",
            )


def rollout_of(
    prompts: PromptBatch, sampling: SamplingParams, group: int, out: Completions, version: int
) -> Rollout:
    """The completions of one set of settings as the trainer reads them."""
    device = prompts.sequences.ids.device
    lengths = out.lengths.to(device)
    columns = int(lengths.max()) if lengths.numel() else 0
    mask = torch.arange(columns, device=device) < lengths.unsqueeze(-1)
    return Rollout(
        prompts=prompts,
        samples_per_prompt=group,
        responses=out.tokens[:, :columns].to(device).where(mask, 0),
        response_mask=mask,
        lengths=lengths,
        ended=out.ended.to(device),
        rollout_logprobs=out.raw_logprobs[:, :columns].to(device).where(mask, 0.0),
        sampling=sampling,
        weight_version=version,
    )
