"""Prompts dealt to ranks that each hold whole weights; the rollout gathered on all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rlhf_fast.distributed.world import World
from rlhf_fast.protocols import FinishedScorer, Generator
from rlhf_fast.types import PromptBatch, Rollout, SamplingParams

_PER_TOKEN = ("responses", "response_mask", "rollout_logprobs")
_PER_SAMPLE = ("lengths", "ended")


class DealtGenerator:
    """A generator on every rank, each of which draws the samples of some prompts.

    Prompt b is drawn by rank b modulo their number. As a sample depends on its prompt, its seed and
    the weights alone, the rollout is that of one process; ranks run as many decoding steps as their
    own prompts take.

    Args:
        generator: of this rank; all have the same weights.
        world: the ranks.
    """

    def __init__(self, generator: Generator, world: World) -> None:
        self.generator = generator
        self.world = world

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
            Other errors as the rank's generator, on that rank.
        """
        group, ranks = samples_per_prompt, self.world.size
        mine = list(range(self.world.rank, len(prompts), ranks))
        rollout, exhausted = None, False
        try:
            if mine:
                rollout = self.generator.generate(
                    prompts.select(mine),
                    sampling,
                    samples_per_prompt=group,
                    seeds=[seeds[b * group + g] for b in mine for g in range(group)],
                )
        except torch.OutOfMemoryError:
            exhausted = True
        if self.world.any(exhausted):
            raise torch.OutOfMemoryError("generation ran out of memory on some rank")
        dealt = [b for rank in range(ranks) for b in range(rank, len(prompts), ranks)]
        return self._gathered(prompts, sampling, group, rollout, dealt)

    def _gathered(
        self,
        prompts: PromptBatch,
        sampling: SamplingParams,
        group: int,
        mine: Rollout | None,
        dealt: Sequence[int],
    ) -> Rollout:
        """The ranks' rollouts as one: `dealt` are the prompts in the order of the ranks' rows."""
        home = prompts.sequences.ids.device
        if mine is None:  # more ranks than prompts
            mine = _empty(prompts.select([]), sampling, group)
        facts = torch.tensor([[mine.responses.shape[1], mine.weight_version]])
        columns, version = self._all_rows(facts, home).amax(0).tolist()
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
