"""Prompts dealt to ranks, or to groups of ranks in step; the rollout on all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rlhf_fast.distributed.world import World
from rlhf_fast.engine.hybrid import HybridEngine
from rlhf_fast.engine.progress import GenerationSummary
from rlhf_fast.protocols import FinishedScorer, Generator
from rlhf_fast.types import PromptBatch, Rollout, SamplingParams

_PER_TOKEN = ("responses", "response_mask", "rollout_logprobs")
_PER_SAMPLE = ("lengths", "ended")


class DealtGenerator:
    """A generator on every rank, each of which draws the samples of some prompts.

    Prompt b is drawn by rank b modulo their number; where the ranks that hold a model between them
    generate in step, by replica b modulo the number of replicas. As a sample depends on its prompt,
    its seed and the weights alone, the rollout is that of one process; who does not generate in
    step runs as many decoding steps as its own prompts take.

    Args:
        generator: of this rank; all have the same weights.
        world: the ranks.
        engine: in `generator`, if there is one: how it sees sharded weights, and the lengths it
            expects.

    Attributes:
        last: what the last rollout took, all ranks together; None without an engine.
    """

    def __init__(
        self, generator: Generator, world: World, engine: HybridEngine | None = None
    ) -> None:
        self.generator = generator
        self.world = world
        self.engine = engine
        self._sharded = engine is not None and engine.view is not None
        in_step = engine is not None and engine.view is not None and engine.view.lockstep
        self._in_step = in_step
        self._dealers = world.replicas if in_step else world.size
        self._dealer = world.replica if in_step else world.rank
        # One of those in step tells the others of the samples.
        self._tells = not in_step or world.shard_rank == 0
        self.last: GenerationSummary | None = None

    def generate(
        self,
        prompts: PromptBatch,
        sampling: SamplingParams,
        *,
        samples_per_prompt: int,
        seeds: Sequence[int],
        scorer: FinishedScorer | None = None,
    ) -> Rollout:
        """Draw G samples per prompt; every rank returns all of them, on its prompts' device.

        No scorer is given samples.

        Raises:
            torch.OutOfMemoryError: on all ranks, if one ran out of memory.
            LoneOutOfMemory: on that rank, if the others cannot come out of a decoding step.
            Other errors as the rank's generator, on that rank.
        """
        group, dealers = samples_per_prompt, self._dealers
        mine = list(range(self._dealer, len(prompts), dealers))
        rollout, exhausted = None, False
        try:
            # Sharded weights are gathered by all ranks together, with or without prompts.
            if mine or self._sharded:
                rollout = self.generator.generate(
                    prompts.select(mine),
                    sampling,
                    samples_per_prompt=group,
                    seeds=[seeds[b * group + g] for b in mine for g in range(group)],
                )
        except torch.OutOfMemoryError:
            exhausted = True
        # Who decodes in step waits for the others in every layer, all else go on by themselves.
        agreed = self.world.any_exhausted if self._in_step else self.world.any
        if agreed(exhausted):
            raise torch.OutOfMemoryError("generation ran out of memory on some rank")
        dealt = [b for dealer in range(dealers) for b in range(dealer, len(prompts), dealers)]
        spent = self._spent() if rollout is not None else [-1, 0, 0, -1]
        whole = self._gathered(
            prompts, sampling, group, rollout if self._tells else None, dealt, spent
        )
        self._observe(whole, sorted(set(range(len(prompts))) - set(mine)))
        return whole

    def _observe(self, rollout: Rollout, others: Sequence[int]) -> None:
        """Expect of the next rollout what all ranks have seen: any of them may save the state."""
        if self.engine is None or not others:
            return
        group, lengths = rollout.samples_per_prompt, rollout.lengths.tolist()
        self.engine.expected.observe(
            [rollout.prompts.uid[b] for b in others],
            [n for b in others for n in lengths[b * group : (b + 1) * group]],
        )

    def _gathered(
        self,
        prompts: PromptBatch,
        sampling: SamplingParams,
        group: int,
        mine: Rollout | None,
        dealt: Sequence[int],
        spent: Sequence[int],
    ) -> Rollout:
        """The ranks' rollouts as one: `dealt` are the prompts in the order of the ranks' rows.

        What the ranks have spent becomes `last`.
        """
        home = prompts.sequences.ids.device
        if mine is None:  # more ranks than prompts
            mine = _empty(prompts.select([]), sampling, group)
        facts = torch.tensor([[mine.responses.shape[1], mine.weight_version, *spent]])
        told = self._all_rows(facts, torch.device("cpu"))
        columns, version, *_ = told.amax(0).tolist()
        self.last = self._summary(told[:, 2:])
        order = torch.tensor([b * group + g for b in dealt for g in range(group)])
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order))
        found: dict[str, Any] = {
            name: self._all_rows(_padded(getattr(mine, name), columns), home)[place.to(home)]
            for name in _PER_TOKEN
        }
        found |= {
            name: self._all_rows(getattr(mine, name), home)[place.to(home)] for name in _PER_SAMPLE
        }
        return replace(mine, prompts=prompts, weight_version=version, **found)

    @property
    def _device(self) -> torch.device:
        return self.world.device

    def _spent(self) -> list[int]:
        """Tokens this rank drew for all, microseconds, preemptions, millionths of cache used."""
        last = None if self.engine is None else self.engine.last
        if last is None:
            return [-1, 0, 0, -1]
        tokens, preemptions = (last.tokens, last.preemptions) if self._tells else (0, 0)
        peak = -1.0 if last.peak_cache_use is None else last.peak_cache_use
        return [tokens, round(1e6 * last.seconds), preemptions, round(1e6 * peak)]

    @staticmethod
    def _summary(spent: Tensor) -> GenerationSummary | None:
        """Of what all ranks have spent [ranks, 4]; the slowest sets the time."""
        if int(spent[:, 0].amax()) < 0:
            return None
        tokens, _, preemptions, _ = spent.clamp_min(0).sum(0).tolist()
        _, microseconds, _, peak = spent.amax(0).tolist()
        use = None if peak < 0 else peak / 1e6
        return GenerationSummary(tokens, microseconds / 1e6, preemptions, use)

    def _all_rows(self, rows: Tensor, home: torch.device) -> Tensor:
        """Rows of all ranks, one rank after another."""
        # Not every backend takes bool.
        sent = rows.to(self._device, torch.int64 if rows.dtype == torch.bool else rows.dtype)
        return torch.cat(self.world.gather_rows(sent)).to(home, rows.dtype)


def _padded(rows: Tensor, columns: int) -> Tensor:
    return torch.nn.functional.pad(rows, (0, columns - rows.shape[1]))


def _empty(prompts: PromptBatch, sampling: SamplingParams, group: int) -> Rollout:
    """A rollout without any sample."""
    none = torch.zeros(0, 0, dtype=torch.int64)
    return Rollout(
        *(prompts, group, none, none.bool(), none[:, :0].flatten(), none.flatten().bool()),
        rollout_logprobs=none.float(),
        sampling=sampling,
        weight_version=0,
    )
