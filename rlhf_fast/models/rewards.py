"""Rewards made of models, and sums of rewards."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rlhf_fast.data.encoding import TextEncoder
from rlhf_fast.errors import RewardError
from rlhf_fast.models.checks import check_same_tokenizer, max_positions
from rlhf_fast.models.roles import DEFAULT_TOKEN_BUDGET, RewardModel, require_tokens
from rlhf_fast.protocols import Reward, RewardOutput, SampleReward, Start
from rlhf_fast.transfer import release_cached
from rlhf_fast.types import PackedSequences, Rollout

Render = Callable[[str, str], str]


class ModelReward:
    """Scores prompt and response with a reward model.

    Args:
        reward_model: the judge.
        tokenizer_policy: tokenizer of the rollout's ids.
        tokenizer_rm: tokenizer the reward model was trained with.
        retokenize: decode each sample and encode it again with `tokenizer_rm`. Without it the two
            tokenizers must be the same, because ids are handed over as they are.
        render: for `retokenize`, the text to encode from prompt and response text, with whatever
            control tokens of the reward model belong there; None is the sample as it reads, without
            control tokens. What prompt or response spell of those stays text. Rows get the reward
            model's BOS, if its tokenizer adds one, and its EOS if they ended.
        token_budget: tokens of one forward.

    Raises:
        ModelError: tokenizers differ and `retokenize` is off (RF3023), or it is on and
            `tokenizer_rm` has no EOS token (RF3040).
    """

    splits = True

    def __init__(
        self,
        reward_model: RewardModel,
        tokenizer_policy: Any,
        tokenizer_rm: Any,
        *,
        retokenize: bool = False,
        render: Render | None = None,
        token_budget: int = DEFAULT_TOKEN_BUDGET,
    ) -> None:
        if not retokenize:
            check_same_tokenizer(tokenizer_policy, tokenizer_rm)
        self.reward_model = reward_model
        self.tokenizer_policy = tokenizer_policy
        self.tokenizer_rm = tokenizer_rm
        self.retokenize = retokenize
        self._encoder = TextEncoder(tokenizer_rm) if retokenize else None
        self.render = render
        self.token_budget = token_budget

    def score(self, rollout: Rollout) -> RewardOutput:
        """Scores [S] float32 on the rollout's device; every row is scored.

        Raises:
            RewardError: a sample is empty or longer than the reward model's positions, or its score
                is not finite; the row is named.
        """
        start = self.prepare(rollout, range(len(rollout)))
        while True:
            try:
                return start()()
            except torch.OutOfMemoryError:
                if self.token_budget <= 1:
                    raise
            self.token_budget //= 2
            release_cached()

    def prepare(self, rollout: Rollout, samples: Sequence[int], *, at_once: bool = False) -> Start:
        """As `score`, of a rollout whose rows are called `samples`; see `SampleReward.prepare`."""
        encoder = self._encoder
        sequences = rollout.sequences() if encoder is None else self._encoded(rollout, encoder)
        self._require_fitting(sequences, samples)
        tokens = max(1, sequences.ids.numel())

        def start() -> Callable[[], RewardOutput]:
            budget = tokens if at_once else self.token_budget
            scores = self.reward_model.score_sequences(sequences, token_budget=budget)
            return functools.partial(_finite, scores, samples, rollout.responses.device)

        return start

    def _require_fitting(self, sequences: PackedSequences, samples: Sequence[int]) -> None:
        limit = max_positions(self.reward_model.module)
        lengths = sequences.lengths.tolist()
        require_tokens(lengths, samples)
        long = [s for s, n in enumerate(lengths) if limit is not None and n > limit]
        if long:
            raise RewardError(
                "RF5012",
                f"{len(long)} of {len(lengths)} samples are too long for the reward model",
                where=f"sample {samples[long[0]]} has {lengths[long[0]]} tokens",
                expected=f"at most {limit}, its positions",
                remedy="shorten prompts or responses, or use a reward model with more positions",
            )

    def _encoded(self, rollout: Rollout, encoder: TextEncoder) -> PackedSequences:
        """The samples in the reward model's tokens."""
        bounds = rollout.prompts.sequences.cu_seqlens.tolist()
        ids = rollout.prompts.sequences.ids.tolist()
        prompts = [ids[a:b] for a, b in itertools.pairwise(bounds)]
        rows = []
        for s, (response, ended) in enumerate(
            zip(rollout.response_ids(), rollout.ended.tolist(), strict=True)
        ):
            row = self._read(prompts[s // rollout.samples_per_prompt], response, encoder)
            closes = ended and row[-1:] != [encoder.eos_id]
            rows.append([*row, encoder.eos_id] if closes else row)
        return PackedSequences.from_lists(rows)

    def _read(self, prompt: list[int], response: list[int], encoder: TextEncoder) -> list[int]:
        bos = encoder.bos_ids
        if self.render is None:
            # Decoded as one: a response by itself may lose the space that parts it from the prompt.
            return [*bos, *encoder.encode_text(self._decode(prompt + response))]
        texts = self._decode(prompt), self._decode(response)
        marks = encoder.marks(texts)
        text = self.render(*(encoder.mark(text, marks) for text in texts))
        ids = encoder.encode_marked(text, marks)
        return ids if ids[: len(bos)] == bos else [*bos, *ids]

    def _decode(self, ids: list[int]) -> str:
        text: str = self.tokenizer_policy.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text


def _finite(scores: Tensor, samples: Sequence[int], device: torch.device) -> RewardOutput:
    """Scores of a model, all of them finite, on `device`."""
    bad = torch.nonzero(~torch.isfinite(scores)).flatten().tolist()
    if bad:
        raise RewardError(
            "RF5011",
            f"the reward model scored {len(bad)} of {len(scores)} samples NaN or Inf",
            where=f"sample {samples[bad[0]]}: {float(scores[bad[0]])}",
            remedy="check its weights and calibration; try dtype=float32",
        )
    return RewardOutput(scores.to(device), torch.ones(len(scores), dtype=torch.bool, device=device))


class SumReward:
    """The weighted sum of several rewards.

    A part that abstains from a row adds nothing to it; a row is scored if any part scored it. So a
    function for one kind of prompt can stand beside a function for another.

    Args:
        parts: (weight, reward) pairs, at least one.
    """

    def __init__(self, parts: Sequence[tuple[float, Reward]]) -> None:
        if not parts:
            raise RewardError(
                "RF5013", "a sum of rewards without any", remedy="name a model or a function"
            )
        self.parts = tuple(parts)

    def score(self, rollout: Rollout) -> RewardOutput:
        """Scores [S], or [S, R] if any part is per token; then the others' scores land on the last
        response token."""
        return self._sum([reward.score(rollout) for _, reward in self.parts], rollout)

    @property
    def splits(self) -> bool:
        """Whether every part may be asked for some samples before others."""
        return all(isinstance(part, SampleReward) and part.splits for _, part in self.parts)

    def prepare(self, rollout: Rollout, samples: Sequence[int], *, at_once: bool = False) -> Start:
        """As `score`, if `splits`; see `SampleReward.prepare`."""
        parts = [part for _, part in self.parts if isinstance(part, SampleReward)]
        assert len(parts) == len(self.parts), "a part of the sum cannot be split"
        prepared = [part.prepare(rollout, samples, at_once=at_once) for part in parts]

        def start() -> Callable[[], RewardOutput]:
            started = [begin() for begin in prepared]
            return lambda: self._sum([finish() for finish in started], rollout)

        return start

    def _sum(self, found: Sequence[RewardOutput], rollout: Rollout) -> RewardOutput:
        outputs = [(weight, out) for (weight, _), out in zip(self.parts, found, strict=True)]
        per_token = any(out.scores.dim() == 2 for _, out in outputs)
        total = torch.zeros(
            rollout.responses.shape if per_token else rollout.responses.shape[:1],
            device=rollout.responses.device,
        )
        scored = torch.zeros(len(rollout), dtype=torch.bool, device=total.device)
        for weight, out in outputs:
            scores = out.scores
            if per_token and scores.dim() == 1:
                scores = spread_to_tokens(scores, rollout.response_mask)
            present = out.scored[:, None] if per_token else out.scored
            total = total + torch.where(present, weight * scores, 0.0)
            scored = scored | out.scored
        return RewardOutput(total, scored)


def spread_to_tokens(scores: Tensor, response_mask: Tensor) -> Tensor:
    """[S] scores on the last true column of [S, R] `response_mask`, 0 elsewhere: [S, R].

    A row without any true column is 0 throughout.
    """
    columns = torch.arange(response_mask.shape[1], device=response_mask.device)
    last = torch.where(response_mask, columns, -1).amax(dim=1, keepdim=True)
    return torch.where(columns == last, scores[:, None], 0.0)


def judges_of(reward: Reward) -> list[RewardModel]:
    """The reward models in a reward, in order; functions have none.

    What shares a reward over ranks has it as its `reward`.
    """
    parts = [part for _, part in reward.parts] if isinstance(reward, SumReward) else [reward]
    parts = [getattr(part, "reward", part) for part in parts]
    return [part.reward_model for part in parts if isinstance(part, ModelReward)]
