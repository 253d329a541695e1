"""One PPO step, as data: PromptBatch -> Rollout -> ScoredRollout -> Experience -> Microbatch.

Shapes: B prompts, G samples per prompt, S = B*G sequences, R response columns, N packed tokens,
K packed segments. Sample s answers prompt s // G.

Column t of every [S, R] tensor is about response token t: its log-prob, and the value of the state
before it; both are read at position P-1+t of the sequence, P being that prompt's own length. The
score lands on the last true column of the mask. Each stage contains the one before it, so a Rollout
cannot pretend to have advantages. One field is optional: the exact KL, which few runs ask for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

import rlhf_fast_kernels
from rlhf_fast.head_ops import HeadOps, HeadShards
from rlhf_fast.transfer import sent

IGNORE_INDEX = -100


def _require(tensor: Tensor, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if tuple(tensor.shape) != shape or tensor.dtype != dtype:
        raise ValueError(
            f"{name}: got {list(tensor.shape)} {tensor.dtype}, expected {list(shape)} {dtype}"
        )


@dataclass(frozen=True)
class PackedSequences:
    """K ragged sequences back to back: what every model forward reads.

    Args:
        ids: [N] int64 token ids.
        positions: [N] int64, 0 at the start of each segment.
        cu_seqlens: [K+1] int32, segment k is ids[cu_seqlens[k]:cu_seqlens[k+1]].
    """

    ids: Tensor
    positions: Tensor
    cu_seqlens: Tensor

    def __post_init__(self) -> None:
        n = self.ids.numel()
        _require(self.ids, "ids", (n,), torch.int64)
        _require(self.positions, "positions", (n,), torch.int64)
        _require(self.cu_seqlens, "cu_seqlens", (self.cu_seqlens.numel(),), torch.int32)

    @classmethod
    def from_lists(cls, sequences: list[list[int]] | list[Tensor]) -> PackedSequences:
        """Pack ragged sequences of token ids, in order."""
        parts = [torch.as_tensor(s, dtype=torch.int64) for s in sequences]
        return cls.from_flat(
            torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64),
            torch.tensor([p.numel() for p in parts], dtype=torch.int64),
        )

    @classmethod
    def from_flat(cls, ids: Tensor, lengths: Tensor) -> PackedSequences:
        """Pack from ids [N] that already lie back to back and lengths [K]."""
        cu = torch.zeros(lengths.numel() + 1, dtype=torch.int64, device=ids.device)
        torch.cumsum(lengths.to(ids.device), 0, out=cu[1:])
        starts = torch.repeat_interleave(cu[:-1], lengths.to(ids.device))
        positions = torch.arange(ids.numel(), device=ids.device) - starts
        return cls(ids, positions, cu.to(torch.int32))

    def __len__(self) -> int:
        return self.cu_seqlens.numel() - 1

    @property
    def lengths(self) -> Tensor:
        """[K] int64 tokens of each segment."""
        return self.cu_seqlens.diff().to(torch.int64)

    def select(self, indices: list[int]) -> PackedSequences:
        """The named segments, in the order given."""
        bounds = self.cu_seqlens.tolist()
        parts = [self.ids[bounds[i] : bounds[i + 1]] for i in indices]
        ids = torch.cat(parts) if parts else self.ids[:0]
        lengths = torch.tensor([p.numel() for p in parts], dtype=torch.int64)
        return PackedSequences.from_flat(ids, lengths)

    def to(self, device: torch.device) -> PackedSequences:
        """The same sequences on another device."""
        return PackedSequences(
            sent(self.ids, device), sent(self.positions, device), sent(self.cu_seqlens, device)
        )


@dataclass(frozen=True)
class PromptBatch:
    """B prompts, ragged.

    Args:
        sequences: the B prompts, packed.
        uid: B stable integers; with the run's seed they key every random draw of a sample.
        rows: B mappings of the data row's other columns, handed to reward functions.
        texts: B prompt texts as the reward function should see them.
    """

    sequences: PackedSequences
    uid: tuple[int, ...]
    rows: tuple[Mapping[str, Any], ...]
    texts: tuple[str, ...]

    def __post_init__(self) -> None:
        sizes = {len(self.sequences), len(self.uid), len(self.rows), len(self.texts)}
        if len(sizes) != 1:
            raise ValueError(f"PromptBatch: sequences, uid, rows, texts differ in length: {sizes}")

    def __len__(self) -> int:
        return len(self.sequences)

    def select(self, indices: Sequence[int]) -> PromptBatch:
        """The named prompts, in the order given, as often as they are named."""
        return PromptBatch(
            self.sequences.select(list(indices)),
            tuple(self.uid[b] for b in indices),
            tuple(self.rows[b] for b in indices),
            tuple(self.texts[b] for b in indices),
        )

    def to(self, device: torch.device) -> PromptBatch:
        """The same prompts on another device."""
        return replace(self, sequences=self.sequences.to(device))


@dataclass(frozen=True)
class SamplingParams:
    """How responses are drawn; temperature 0 is greedy, top_k 0, top_p 1 and min_p 0 are off."""

    max_new_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    stop_token_ids: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()

    @property
    def warps(self) -> bool:
        """True if the drawn distribution is not softmax(logits / temperature)."""
        return self.top_k > 0 or self.top_p < 1.0 or self.min_p > 0.0 or self.temperature == 0.0


@dataclass(frozen=True)
class Rollout:
    """S sampled responses.

    Args:
        prompts: the B prompts.
        samples_per_prompt: G.
        responses: [S, R] int64; columns at and after a row's length are 0 and never read.
        response_mask: [S, R] bool, true for every token the policy chose, EOS included. Interior
            false columns (tool turns) are allowed.
        lengths: [S] int64 response tokens, EOS included.
        ended: [S] bool, true if a stop token or stop string ended the row; false if truncated.
        rollout_logprobs: [S, R] float32 log-probs under the generator, 0 outside the mask.
        sampling: the parameters used.
        weight_version: version of the weights that generated it.
    """

    prompts: PromptBatch
    samples_per_prompt: int
    responses: Tensor
    response_mask: Tensor
    lengths: Tensor
    ended: Tensor
    rollout_logprobs: Tensor
    sampling: SamplingParams
    weight_version: int

    def __post_init__(self) -> None:
        s = len(self.prompts) * self.samples_per_prompt
        r = self.responses.shape[1]
        _require(self.responses, "responses", (s, r), torch.int64)
        _require(self.response_mask, "response_mask", (s, r), torch.bool)
        _require(self.lengths, "lengths", (s,), torch.int64)
        _require(self.ended, "ended", (s,), torch.bool)
        _require(self.rollout_logprobs, "rollout_logprobs", (s, r), torch.float32)

    def __len__(self) -> int:
        return self.responses.shape[0]

    def to(self, device: torch.device) -> Rollout:
        """The same rollout on another device, its prompts too."""
        names = ("responses", "response_mask", "lengths", "ended", "rollout_logprobs")
        tensors = {name: getattr(self, name).to(device) for name in names}
        return replace(self, prompts=self.prompts.to(device), **tensors)

    def select(self, samples: Sequence[int]) -> Rollout:
        """The named samples, each with its prompt to itself (G = 1)."""
        index = torch.as_tensor(samples, dtype=torch.int64, device=self.responses.device)
        names = ("responses", "response_mask", "lengths", "ended", "rollout_logprobs")
        return replace(
            self,
            prompts=self.prompts.select([s // self.samples_per_prompt for s in samples]),
            samples_per_prompt=1,
            **{name: getattr(self, name)[index] for name in names},
        )

    @property
    def prompt_lengths(self) -> Tensor:
        """[S] int64 prompt tokens of each sample."""
        return self.prompts.sequences.lengths.repeat_interleave(self.samples_per_prompt)

    def response_ids(self) -> list[list[int]]:
        """S ragged lists of response token ids."""
        return [
            row[:n] for row, n in zip(self.responses.tolist(), self.lengths.tolist(), strict=True)
        ]

    def sequences(self) -> PackedSequences:
        """Prompt and response of each sample, packed."""
        bounds = self.prompts.sequences.cu_seqlens.tolist()
        ids, parts = self.prompts.sequences.ids, []
        for s, n in enumerate(self.lengths.tolist()):
            b = s // self.samples_per_prompt
            parts += [ids[bounds[b] : bounds[b + 1]], self.responses[s, :n].to(ids.device)]
        flat = torch.cat(parts) if parts else ids[:0]
        return PackedSequences.from_flat(flat, self.prompt_lengths.cpu() + self.lengths.cpu())


@dataclass(frozen=True)
class LogprobGap:
    """How far the trainer's log-probs of sampled tokens are from the generator's.

    Args:
        samples: responses that were compared.
        absolute: mean of |trainer - generator|, nats a token.
        k3: mean of exp(d) - 1 - d with d = trainer - generator, nats a token: never negative, and
            an estimate of KL(generator || trainer) if sampling was plain (Schulman 2020).
    """

    samples: int
    absolute: float
    k3: float


@dataclass(frozen=True)
class ScoredRollout:
    """A rollout and what the four roles say of it.

    Args:
        rollout: the sampled responses.
        scores: [S] or [S, R] float32, reward-model output before the KL term; 0 where not scored.
        scored: [S] bool, false where the reward abstained; such rows take no part in the losses.
        old_logprobs: [S, R] float32, the anchor of the PPO ratio: recomputed by the actor, or the
            generator's own.
        ref_logprobs: [S, R] float32 under the reference.
        values: [S, R] float32 by the critic; all 0 in critic-free estimators.
        exact_kl: [S, R] float32 KL(actor || reference) over the whole vocabulary, in the state
            before each token; None unless it belongs in the reward.
        anchor_gap: what recomputing some of them showed, if `old_logprobs` are the generator's
            own; None: they were recomputed.
    """

    rollout: Rollout
    scores: Tensor
    scored: Tensor
    old_logprobs: Tensor
    ref_logprobs: Tensor
    values: Tensor
    exact_kl: Tensor | None = None
    anchor_gap: LogprobGap | None = None

    def __post_init__(self) -> None:
        s, r = self.rollout.responses.shape
        _require(self.scored, "scored", (s,), torch.bool)
        if self.scores.dim() == 1:
            _require(self.scores, "scores", (s,), torch.float32)
        else:
            _require(self.scores, "scores", (s, r), torch.float32)
        for name in ("old_logprobs", "ref_logprobs", "values"):
            _require(getattr(self, name), name, (s, r), torch.float32)
        if self.exact_kl is not None:
            _require(self.exact_kl, "exact_kl", (s, r), torch.float32)

    @property
    def loss_mask(self) -> Tensor:
        """[S, R] bool: the tokens that take part in the losses."""
        return self.rollout.response_mask & self.scored[:, None]


@dataclass(frozen=True)
class Experience:
    """Everything an update reads: rewards, kl, advantages, returns [S, R] float32.

    All four are exactly 0 where `scored.loss_mask` is false.
    """

    scored: ScoredRollout
    rewards: Tensor
    kl: Tensor
    advantages: Tensor
    returns: Tensor

    def __post_init__(self) -> None:
        s, r = self.scored.rollout.responses.shape
        for name in ("rewards", "kl", "advantages", "returns"):
            _require(getattr(self, name), name, (s, r), torch.float32)


@dataclass(frozen=True)
class Microbatch:
    """One forward and backward: packed sequences and per-token targets, all [N].

    Index n is position n of the packed input; `targets[n]` is the token that follows it, or
    IGNORE_INDEX where `loss_mask` is false. `num_loss_tokens` is the GLOBAL loss-token count of the
    optimizer step: every loss is a sum divided by it. `ratio_cap` bounds the ratio new/old of
    tokens with a negative advantage, beside `dual_clip`; 0 is no bound.
    """

    sequences: PackedSequences
    targets: Tensor
    loss_mask: Tensor
    old_logprobs: Tensor
    ref_logprobs: Tensor
    old_values: Tensor
    advantages: Tensor
    returns: Tensor
    weights: Tensor
    num_loss_tokens: int
    ratio_cap: float = 0.0

    def __post_init__(self) -> None:
        n = self.sequences.ids.numel()
        _require(self.targets, "targets", (n,), torch.int64)
        _require(self.loss_mask, "loss_mask", (n,), torch.bool)
        for name in (
            "old_logprobs",
            "ref_logprobs",
            "old_values",
            "advantages",
            "returns",
            "weights",
        ):
            _require(getattr(self, name), name, (n,), torch.float32)


@dataclass(frozen=True)
class VocabularyHead:
    """A head that is one linear map: logits = cap(hidden @ weight.T + bias) / scale.

    Ops that know these numbers make the logits of a few rows at a time; others have to ask the
    model.

    Args:
        weight: [V, H], the model's own parameter: gradients flow to it. With `shards`, this rank's
            rows of it.
        bias: [V] or None; with `shards`, as weight.
        softcap: c of cap(x) = c * tanh(x / c); None: cap(x) = x.
        scale: divides the logits, beside the temperature.
        vocab_size: rows of the weight from there on belong to no token; None: all are real.
        compute_dtype: type the operands of products are rounded to; None: that of the hidden
            states.
        chunk_rows: rows whose logits exist at once; None: what suits the device.
        shards: the ranks that hold the rows between them; None: they are all here.
    """

    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None
    scale: float = 1.0
    vocab_size: int | None = None
    compute_dtype: torch.dtype | None = None
    chunk_rows: int | None = None
    shards: HeadShards | None = None

    @property
    def rows(self) -> int:
        """Rows of the whole weight."""
        return self.weight.shape[0] if self.shards is None else self.shards.vocab

    @property
    def ops(self) -> HeadOps:
        """What reads this head: on shards, collective ops over the ranks that hold them."""
        return rlhf_fast_kernels if self.shards is None else self.shards

    def settings(self, temperature: float) -> dict[str, Any]:
        """What `linear_logprobs`, `linear_ppo_loss` and `linear_kl` call these numbers."""
        return {
            "bias": self.bias,
            "temperature": temperature * self.scale,
            "softcap": self.softcap,
            "vocab_size": self.vocab_size,
            "compute_dtype": self.compute_dtype,
            "chunk_rows": self.chunk_rows,
        }


@dataclass(frozen=True)
class HeadRows:
    """Hidden states [N, H] of packed tokens, with graph if one is kept, and what reads them."""

    hidden: Tensor
    head: VocabularyHead


@dataclass(frozen=True)
class LossOutput:
    """loss [] with graph; metrics: sums over tokens; extrema: to be combined by maximum."""

    loss: Tensor
    metrics: Mapping[str, Tensor] = field(default_factory=dict)
    extrema: Mapping[str, Tensor] = field(default_factory=dict)
