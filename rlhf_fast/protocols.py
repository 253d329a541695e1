"""What the PPO trainer asks of the objects it is given; it never imports their classes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

from torch import Tensor, nn

from rlhf_fast.types import (
    HeadRows,
    PackedSequences,
    PromptBatch,
    Rollout,
    SamplingParams,
    VocabularyHead,
)


@runtime_checkable
class PolicyModel(Protocol):
    """A causal language model that yields log-probs of given tokens: actor and reference."""

    module: nn.Module

    def logprobs(
        self,
        sequences: PackedSequences,
        targets: Tensor,
        *,
        temperature: float = 1.0,
        with_entropy: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """(log-probs [N] float32, entropy [N] float32 or None) of `targets` [N] at each position.

        Positions whose target is IGNORE_INDEX give exact 0 and cost no vocabulary work. Gradients
        flow if grad mode is on.
        """
        ...

    def vocabulary_head(self) -> VocabularyHead | None:
        """The head as numbers; None if it is more than one linear map."""
        ...

    def head_rows(self, sequences: PackedSequences) -> HeadRows | None:
        """Hidden states [N, H] and the head that reads them; None if there is no such head.

        For ops that go from hidden states to losses. Gradients flow if grad mode is on.
        """
        ...


@runtime_checkable
class ValueModel(Protocol):
    """A critic."""

    module: nn.Module

    def values(self, sequences: PackedSequences) -> Tensor:
        """[N] float32: the value of the state after reading each position."""
        ...


@runtime_checkable
class TrunkValueModel(ValueModel, Protocol):
    """A critic that reads what the actor's forward has made already."""

    def values_from(self, hidden: Tensor) -> Tensor:
        """[N] float32 of the actor's last hidden states [N, H]; gradients flow to both."""
        ...


class RewardOutput(NamedTuple):
    """scores [S] or [S, R] float32, finite; scored [S] bool, false where the reward abstained."""

    scores: Tensor
    scored: Tensor


# Launches forwards; what it returns waits for the scores.
Start = Callable[[], Callable[[], RewardOutput]]


@runtime_checkable
class Reward(Protocol):
    """Scores finished responses: a model, a function over texts, or a sum of both."""

    def score(self, rollout: Rollout) -> RewardOutput:
        """Score all S samples of a rollout, before any KL term."""
        ...


@runtime_checkable
class SampleReward(Reward, Protocol):
    """A reward of whose samples some may be scored before others.

    `splits`: whether that is so. A function over all texts of a rollout is not split.
    """

    @property
    def splits(self) -> bool:
        """Whether a sample's score depends on that sample alone, and is one number."""
        ...

    def prepare(self, rollout: Rollout, samples: Sequence[int], *, at_once: bool = False) -> Start:
        """Check and encode K samples, without any forward.

        What is returned launches the forwards, and returns in turn what waits for the scores [K]:
        an accelerator is not waited for before that. `samples` are the K numbers that messages call
        them by. `at_once`: in one forward, however long; else as many as the reward sees fit.
        """
        ...


class FinishedScorer(Protocol):
    """Reads samples that are finished while others are still drawn.

    `pack_tokens`: tokens of prompts and responses that one call takes at most.
    """

    @property
    def pack_tokens(self) -> int:
        """Tokens of one call at most; less is not worth a forward."""
        ...

    def score(self, samples: Sequence[int], rollout: Rollout) -> None:
        """Read K finished samples, on the host.

        Args:
            samples: their K indices among all samples.
            rollout: these K alone, each with its prompt (G = 1).
        """
        ...


@runtime_checkable
class Generator(Protocol):
    """Samples responses from the actor's present weights."""

    def generate(
        self,
        prompts: PromptBatch,
        sampling: SamplingParams,
        *,
        samples_per_prompt: int,
        seeds: Sequence[int],
        scorer: FinishedScorer | None = None,
    ) -> Rollout:
        """Draw G samples per prompt; `seeds` has S = B*G entries, one a sample.

        A sample depends on its prompt, its seed and the weights alone, not on its batch. `scorer`
        may be given finished samples while others are drawn: some, all or none of them.
        """
        ...


class WorkSplit(Protocol):
    """The ranks that share the forwards of a batch which all of them hold.

    Every rank calls the same methods in the same order; what a method returns is the same on all.
    """

    @property
    def rank(self) -> int:
        """This process among all."""
        ...

    @property
    def ranks(self) -> int:
        """How many there are."""
        ...

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over ranks of tensors of one shape and dtype, on one kind of device."""
        ...

    def sum_numbers(self, numbers: Sequence[float]) -> list[float]:
        """Sum over ranks of equally many numbers, each as float64."""
        ...

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on some rank."""
        ...

    def exhausted(self, flag: bool) -> bool:
        """Whether memory ran out on some rank, which then broke off forwards or backwards.

        Raises:
            LoneOutOfMemory: on a rank with the flag, if the others cannot come out of them.
        """
        ...


class Alone:
    """`WorkSplit` of a single rank: everything is its own."""

    rank = 0
    ranks = 1

    def sum(self, tensor: Tensor) -> Tensor:
        """The tensor itself."""
        return tensor

    def sum_numbers(self, numbers: Sequence[float]) -> list[float]:
        """The numbers themselves."""
        return list(numbers)

    def any(self, flag: bool) -> bool:
        """The flag itself."""
        return flag

    def exhausted(self, flag: bool) -> bool:
        """The flag itself."""
        return flag
