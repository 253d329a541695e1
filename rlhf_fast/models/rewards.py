"""Rewards made of models, and sums of rewards."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rlhf_fast.errors import RewardError
from rlhf_fast.models.checks import check_same_tokenizer, max_positions
from rlhf_fast.models.roles import DEFAULT_TOKEN_BUDGET, RewardModel
from rlhf_fast.protocols import Reward, RewardOutput
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
            RewardError: a sample is longer than the reward model's positions, or its score is not
                finite; the row is named.
        """
        sequences = self._retokenized(rollout) if self.retokenize else rollout.sequences()
        self._require_fitting(sequences)
        scores = self.reward_model.score_sequences(sequences, token_budget=self.token_budget)
        bad = torch.nonzero(~torch.isfinite(scores)).flatten().tolist()
        if bad:
            raise RewardError(
                "RF5011",
                f"the reward model scored {len(bad)} of {len(scores)} samples NaN or Inf",
                where=f"sample {bad[0]}: {float(scores[bad[0]])}",
                remedy="check its weights and calibration; try dtype=float32",
            )
        device = rollout.responses.device
        scored = torch.ones(len(rollout), dtype=torch.bool, device=device)
        return RewardOutput(scores.to(device), scored)

    def _require_fitting(self, sequences: PackedSequences) -> None:
        limit = max_positions(self.reward_model.module)
        lengths = sequences.lengths.tolist()
        long = [s for s, n in enumerate(lengths) if limit is not None and n > limit]
        if long:
            raise RewardError(
                "RF5012",
                f"{len(long)} of {len(lengths)} samples are too long for the reward model",
                where=f"sample {long[0]} has {lengths[long[0]]} tokens",
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
        outputs = [(weight, reward.score(rollout)) for weight, reward in self.parts]
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
