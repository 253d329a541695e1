"""Actor, reference, critic and reward model on one trunk: as in `roles`, each with its adapter on.

`module` of a role is an `AdapterModule`: what optimizer and checkpoint see. The trunk runs within a
method of the role, with the role's adapter, and is as it was before when the method returns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_fast.models.adapter_files import AdapterFile
from rlhf_fast.models.adapters import AdapterModule, SharedTrunk
from rlhf_fast.models.forward import packed_hidden
from rlhf_fast.models.heads import get_calibration, scalar_outputs, set_calibration
from rlhf_fast.models.loading import critic_from
from rlhf_fast.models.roles import Actor, Critic, RewardModel, last_token_hidden
from rlhf_fast.protocols import FinishedScorer, Generator
from rlhf_fast.types import (
    HeadRows,
    PackedSequences,
    PromptBatch,
    Rollout,
    SamplingParams,
    VocabularyHead,
)


class AdapterActor:
    """The policy that is trained: the trunk with the actor's adapter.

    Args:
        trunk: the shared trunk.
        name: its adapter; None is the bare trunk.

    Attributes:
        weight_version: counts optimizer steps; a rollout carries the version that generated it.
    """

    weight_version: int = 0

    def __init__(self, trunk: SharedTrunk, name: str | None = "actor") -> None:
        self.trunk = trunk
        self.name = name
        self.adapted = trunk.role_module(name)
        self.module: nn.Module = self.adapted
        self._policy = Actor(trunk.model)

    def logprobs(
        self,
        sequences: PackedSequences,
        targets: Tensor,
        *,
        temperature: float = 1.0,
        with_entropy: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As `Actor.logprobs`."""
        with self.trunk.adapter(self.name):
            return self._policy.logprobs(
                sequences, targets, temperature=temperature, with_entropy=with_entropy
            )

    def likeliest_tokens(self, sequences: PackedSequences, rows: Tensor) -> Tensor:
        """As `Actor.likeliest_tokens`."""
        with self.trunk.adapter(self.name):
            return self._policy.likeliest_tokens(sequences, rows)

    def vocabulary_head(self) -> VocabularyHead | None:
        """The trunk's head, which no adapter changes and no gradient reaches."""
        return self._policy.vocabulary_head()

    def head_rows(self, sequences: PackedSequences) -> HeadRows | None:
        """As `Actor.head_rows`."""
        with self.trunk.adapter(self.name):
            return self._policy.head_rows(sequences)

    def bump_version(self) -> int:
        """Count one change of the weights; returns the new version."""
        self.weight_version += 1
        return self.weight_version


class AdapterReference(AdapterActor):
    """The frozen policy the KL term is measured against: the bare trunk, or a frozen adapter."""

    @torch.no_grad()
    def logprobs(
        self,
        sequences: PackedSequences,
        targets: Tensor,
        *,
        temperature: float = 1.0,
        with_entropy: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As `Actor.logprobs`, never with a graph."""
        return super().logprobs(
            sequences, targets, temperature=temperature, with_entropy=with_entropy
        )

    @torch.no_grad()
    def head_rows(self, sequences: PackedSequences) -> HeadRows | None:
        """As `Actor.head_rows`, never with a graph."""
        return super().head_rows(sequences)


class AdapterCritic(Critic):
    """The value function: the trunk with the critic's adapter under a scalar head.

    Args:
        trunk: the shared trunk.
        start: a reward model whose head and calibration it starts from; None: a head of zeros.
        name: its adapter.
    """

    def __init__(
        self, trunk: SharedTrunk, start: AdapterFile | None = None, name: str = "critic"
    ) -> None:
        self.adapted = _with_head(trunk, name, start)
        super().__init__(self.adapted)

    def values(self, sequences: PackedSequences) -> Tensor:
        """[N] float32: the value of the state after reading each position; gradients flow."""
        trunk = self.adapted.trunk
        with trunk.adapter(self.adapted.name):
            return scalar_outputs(self.module, packed_hidden(trunk.model, sequences))


class AdapterRewardModel(RewardModel):
    """The frozen judge: the trunk with the reward adapter under its scalar head.

    Args:
        trunk: the shared trunk, with the adapter on it.
        start: the file that the adapter came from, for head and calibration.
        name: its adapter.
    """

    def __init__(self, trunk: SharedTrunk, start: AdapterFile, name: str = "reward") -> None:
        self.adapted = _with_head(trunk, name, start)
        super().__init__(self.adapted)

    def _last_hidden(self, sequences: PackedSequences) -> Tensor:
        return adapted_last_hidden(self.adapted, sequences)


class AdapterGenerator:
    """A generator over a shared trunk that samples with one adapter on.

    Args:
        generator: samples from `trunk.model` as it stands.
        trunk: the shared trunk.
        name: adapter of the policy.
    """

    def __init__(self, generator: Generator, trunk: SharedTrunk, name: str = "actor") -> None:
        self.generator = generator
        self.trunk = trunk
        self.name = name

    def generate(
        self,
        prompts: PromptBatch,
        sampling: SamplingParams,
        *,
        samples_per_prompt: int,
        seeds: Sequence[int],
        scorer: FinishedScorer | None = None,
    ) -> Rollout:
        """As `rlhf_fast.protocols.Generator.generate`; a scorer selects adapters for itself."""
        more: dict[str, Any] = {} if scorer is None else {"scorer": scorer}
        with self.trunk.adapter(self.name):
            return self.generator.generate(
                prompts, sampling, samples_per_prompt=samples_per_prompt, seeds=seeds, **more
            )


def adapted_last_hidden(module: AdapterModule, sequences: PackedSequences) -> Tensor:
    """As `last_token_hidden`, of the module's trunk with its adapter."""
    with module.trunk.adapter(module.name):
        return last_token_hidden(module.trunk.model, sequences)


def merged_classifier(module: AdapterModule) -> Any:
    """A sequence classifier of its own: the adapter merged into a copy of the trunk, and the head.

    fp32, on the CPU; its calibration is the module's.
    """
    assert module.name is not None
    merged = critic_from(module.trunk.merged(module.name))
    with torch.no_grad():
        merged.score.weight.copy_(module.score.weight)
    calibration = get_calibration(module)
    set_calibration(merged, calibration.gain, calibration.bias)
    return merged


def _with_head(trunk: SharedTrunk, name: str, start: AdapterFile | None) -> AdapterModule:
    module = trunk.role_module(name, head=True)
    if start is not None and start.head is not None:
        with torch.no_grad():
            module.score.weight.copy_(start.head)
        set_calibration(module, start.calibration.gain, start.calibration.bias)
    return module
