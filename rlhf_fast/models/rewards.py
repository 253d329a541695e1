"""Rewards made of models, and sums of rewards."""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

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
        render: for `retokenize`, the text to encode from prompt and response text; the default is
            one after the other. Rows that ended get the reward model's EOS.
        token_budget: tokens of one forward.

    Raises:
        ModelError: tokenizers differ and `retokenize` is off.
    """

    splits = True

    def __init__(
        self,
        reward_model: RewardModel,
        tokenizer_policy: Any,
        tokenizer_rm: Any,
        *,
        retokenize: bool = False,
        render: Render = operator.add,
        token_budget: int = DEFAULT_TOKEN_BUDGET,
    ) -> None:
        if not retokenize:
            check_same_tokenizer(tokenizer_policy, tokenizer_rm)
        self.reward_model = reward_model
        self.tokenizer_policy = tokenizer_policy
        self.tokenizer_rm = tokenizer_rm
        self.retokenize = retokenize
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
        sequences = self._retokenized(rollout) if self.retokenize else rollout.sequences()
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

    def _retokenized(self, rollout: Rollout) -> PackedSequences:
        bounds = rollout.prompts.sequences.cu_seqlens.tolist()
        prompt_ids = rollout.prompts.sequences.ids.tolist()
        texts = [self._decode(prompt_ids[a:b]) for a, b in itertools.pairwise(bounds)]
        eos = self.tokenizer_rm.eos_token_id
        rows = []
        for s, (response, ended) in enumerate(
            zip(rollout.response_ids(), rollout.ended.tolist(), strict=True)
        ):
            text = self.render(texts[s // rollout.samples_per_prompt], self._decode(response))
            ids = list(self.tokenizer_rm(text)["input_ids"])
            closes = ended and eos is not None and ids[-1:] != [eos]
            rows.append([*ids, eos] if closes else ids)
        return PackedSequences.from_lists(rows)

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
