"""The four models of PPO: actor, reference, critic, reward model.

Each wraps a Hugging Face module and adds what its role needs; `module` stays an ordinary module
that optimizers, checkpoints and generators use as it is. Dropout is off in all of them, in train
mode too: with it the PPO ratio is not 1 on the first minibatch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_fast.errors import RewardError
from rlhf_fast.models.dropout import disable_dropout
from rlhf_fast.models.forward import device_of, packed_hidden
from rlhf_fast.models.heads import ValueHead, scalar_head, scalar_outputs
from rlhf_fast.models.offload import StreamedModule
from rlhf_fast.models.vocabulary import likeliest_tokens, target_logprobs, vocabulary_head
from rlhf_fast.transfer import sent
from rlhf_fast.types import HeadRows, PackedSequences, VocabularyHead

DEFAULT_TOKEN_BUDGET = 16384


class _Policy:
    """What actor and reference share; arguments as for `Actor`."""

    def __init__(
        self,
        module: nn.Module,
        *,
        vocab_size: int | None = None,
        chunk_rows: int | None = None,
    ) -> None:
        self._prepare(module)
        self.module = module
        self.vocab_size = vocab_size
        self.chunk_rows = chunk_rows

    def _prepare(self, module: nn.Module) -> None:
        disable_dropout(module)

    def logprobs(
        self,
        sequences: PackedSequences,
        targets: Tensor,
        *,
        temperature: float = 1.0,
        with_entropy: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Log-probs of `targets` under softmax(logits / temperature).

        Args:
            sequences: N packed tokens.
            targets: [N] int64, the token after each position, IGNORE_INDEX where none is asked for.
            temperature: as in sampling.
            with_entropy: also return the entropy at each target.

        Returns:
            (log-probs [N] float32, entropy [N] float32 or None), exact 0 where IGNORE_INDEX.
        """
        return target_logprobs(
            self.module,
            sequences,
            targets,
            temperature=temperature,
            with_entropy=with_entropy,
            vocab_size=self.vocab_size,
            chunk_rows=self.chunk_rows,
        )

    def likeliest_tokens(self, sequences: PackedSequences, rows: Tensor) -> Tensor:
        """[M] int64 argmax of the next-token distribution at packed positions `rows` [M]."""
        return likeliest_tokens(self.module, sequences, rows)

    def vocabulary_head(self) -> VocabularyHead | None:
        """The head as numbers; None if it is more than one linear map."""
        return vocabulary_head(self.module, vocab_size=self.vocab_size, chunk_rows=self.chunk_rows)

    def head_rows(self, sequences: PackedSequences) -> HeadRows | None:
        """Hidden states [N, H] of packed tokens and the head; None without a head of one map."""
        head = self.vocabulary_head()
        return None if head is None else HeadRows(packed_hidden(self.module, sequences), head)


class Actor(_Policy):
    """The policy that is trained.

    Args:
        module: causal LM; its dropout is switched off.
        vocab_size: number of real tokens, to leave padded embedding rows out of the softmax; None
            keeps every row, as stock transformers does.
        chunk_rows: rows whose logits exist at once, in forward and backward; None: what suits the
            device.

    Attributes:
        weight_version: counts optimizer steps; a rollout carries the version that generated it.
    """

    weight_version: int = 0

    def bump_version(self) -> int:
        """Count one change of the weights; returns the new version."""
        self.weight_version += 1
        return self.weight_version


class Reference(_Policy):
    """The frozen policy the KL term is measured against: parameters frozen, eval mode, no graph.

    Args:
        module, vocab_size, chunk_rows: as for `Actor`.
        streamed_to: keep the weights in host memory and read them a layer at a time on this device;
            None leaves them where they are.

    Attributes:
        streamed: what reads them so; None if they stay where they are.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        vocab_size: int | None = None,
        chunk_rows: int | None = None,
        streamed_to: torch.device | None = None,
    ) -> None:
        super().__init__(module, vocab_size=vocab_size, chunk_rows=chunk_rows)
        self.streamed, self._weights = _weights_of(module, streamed_to)

    def _prepare(self, module: nn.Module) -> None:
        super()._prepare(module)
        freeze(module)

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
        with self._weights():
            return super().logprobs(
                sequences, targets, temperature=temperature, with_entropy=with_entropy
            )

    @torch.no_grad()
    def head_rows(self, sequences: PackedSequences) -> HeadRows | None:
        """As `Actor.head_rows`, never with a graph; streamed, the head's copy lives with them."""
        with self._weights():
            rows = super().head_rows(sequences)
            if rows is None:
                return None
            bias = rows.head.bias
            head = replace(
                rows.head,
                weight=rows.head.weight.detach(),
                bias=None if bias is None else bias.detach(),
            )
            return HeadRows(rows.hidden, head)


class Critic:
    """The value function: a sequence classifier read at every position.

    Args:
        module: sequence classifier with one label; its dropout is switched off. A calibration in
            its config is applied, so a critic copied from a reward model starts on its scale.
    """

    def __init__(self, module: nn.Module) -> None:
        scalar_head(module)
        disable_dropout(module)
        self.module = module

    def values(self, sequences: PackedSequences) -> Tensor:
        """[N] float32: the value of the state after reading each position; gradients flow."""
        return scalar_outputs(self.module, packed_hidden(self.module, sequences))


class TrunkCritic:
    """The value function as a scalar head on the actor's last hidden states.

    One forward of the trunk serves the log-probs and the values, and the value loss trains the
    trunk as well.

    Args:
        actor: causal LM whose trunk it reads; its dropout is off already.

    Attributes:
        module, head: the head alone.
    """

    def __init__(self, actor: nn.Module) -> None:
        trunk: Any = actor
        self.trunk = actor
        self.head = ValueHead(trunk.get_output_embeddings().weight.shape[1], device_of(actor))
        self.module: nn.Module = self.head

    def values(self, sequences: PackedSequences) -> Tensor:
        """[N] float32 by a forward of the trunk; gradients flow."""
        return self.values_from(packed_hidden(self.trunk, sequences))

    def values_from(self, hidden: Tensor) -> Tensor:
        """[N] float32 of hidden states [N, H] that the actor's forward made; gradients flow."""
        values: Tensor = self.head(hidden)
        return values


class RewardModel:
    """The frozen judge: one calibrated score per sequence, read at its last token.

    The last token is known from the segment's length, never from pad ids, so pad == eos does not
    matter. Plain transformers on the same directory gives the raw score: without `gain * raw +
    bias`.

    Args:
        module: sequence classifier with one label; it is frozen and set to eval.
        streamed_to: as for `Reference`.
    """

    def __init__(self, module: nn.Module, *, streamed_to: torch.device | None = None) -> None:
        scalar_head(module)
        disable_dropout(module)
        freeze(module)
        self.module = module
        self.streamed, self._weights = _weights_of(module, streamed_to)

    @torch.no_grad()
    def score_sequences(
        self, sequences: PackedSequences, *, token_budget: int = DEFAULT_TOKEN_BUDGET
    ) -> Tensor:
        """Score K sequences.

        Args:
            sequences: K segments of at least one token.
            token_budget: tokens per forward; a longer single sequence is run by itself.

        Returns:
            [K] float32 on the module's device, in the order of the segments.

        Raises:
            RewardError: a segment has no token.
        """
        lengths = sequences.lengths.tolist()
        require_tokens(lengths, range(len(lengths)))
        scores = torch.zeros(len(sequences), device=device_of(self.module))
        for chosen in microbatches(lengths, token_budget):
            part = sequences.select(chosen)
            index = sent(torch.tensor(chosen), scores.device)
            with self._weights():
                scores[index] = scalar_outputs(self.module, self._last_hidden(part))
        return scores

    def _last_hidden(self, sequences: PackedSequences) -> Tensor:
        return last_token_hidden(self.module, sequences)


def require_tokens(lengths: Sequence[int], names: Sequence[int]) -> None:
    """Refuse a sequence without any token.

    Raises:
        RewardError: RF5001 with the first one's name.
    """
    if 0 in lengths:
        raise RewardError(
            "RF5001",
            "a sequence to score is empty",
            where=f"sequence {names[lengths.index(0)]}",
            expected="at least one token",
        )


def _weights_of(
    module: nn.Module, streamed_to: torch.device | None
) -> tuple[StreamedModule | None, Callable[[], AbstractContextManager[None]]]:
    """The module in host memory, if it goes there, and what to enter around a forward."""
    if streamed_to is None:
        return None, nullcontext
    streamed = StreamedModule(module, streamed_to)
    return streamed, streamed.reading


def last_token_hidden(module: nn.Module, sequences: PackedSequences) -> Tensor:
    """[K, H] hidden state of the last token of each segment; gradients flow."""
    hidden = packed_hidden(module, sequences)
    last = sent(sequences.cu_seqlens[1:].to(torch.int64), hidden.device) - 1
    return hidden.index_select(0, last)


def microbatches(lengths: list[int], token_budget: int) -> list[list[int]]:
    """Indices of sequences in groups of at most `token_budget` tokens, neighbours in length.

    Sorting by length keeps padding small where an architecture needs it.
    """
    groups: list[list[int]] = []
    used = 0
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if not groups or used + lengths[i] > token_budget:
            groups.append([])
            used = 0
        groups[-1].append(i)
        used += lengths[i]
    return groups


def freeze(module: nn.Module) -> None:
    """Eval mode, and no parameter asks for a gradient."""
    module.eval()
    module.requires_grad_(False)
