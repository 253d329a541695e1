"""Rewards over several ranks: a model's forwards are dealt, a user's function runs on one rank."""

from __future__ import annotations

from collections.abc import Callable

import torch

from rlhf_fast.data.packing import Share
from rlhf_fast.errors import PeerError, RLHFError
from rlhf_fast.ppo.layout import longest_sample, token_packs
from rlhf_fast.ppo.out_of_memory import TokenBudget
from rlhf_fast.protocols import Reward, RewardOutput, SampleReward, Start, WorkSplit
from rlhf_fast.types import Rollout


class DealtReward:
    """A reward model's samples, dealt over ranks as packs of tokens.

    Args:
        reward: scores samples by themselves; one forward takes `token_budget` tokens.
        split: the ranks.
        token_budget: tokens of one forward, as the rollout counts them.
        start_anew: see `Roles`.
    """

    def __init__(
        self,
        reward: SampleReward,
        split: WorkSplit,
        *,
        token_budget: int,
        start_anew: Callable[[], object] = lambda: None,
    ) -> None:
        self.reward = reward
        self.split = split
        self.budget = TokenBudget(token_budget)
        self.start_anew = start_anew

    def score(self, rollout: Rollout) -> RewardOutput:
        """Scores [S] and which were scored, the same on all ranks.

        What runs out of memory is read again with half the tokens in a forward.

        Raises:
            RLHFError: of `reward`, on the rank that read the sample.
            PeerError: on the others.
        """
        scores = torch.zeros(len(rollout), device=rollout.responses.device)
        scored = torch.zeros(len(rollout), dtype=torch.int64, device=scores.device)
        faults: list[RLHFError] = []

        def read() -> None:
            faults.clear()
            scores.zero_()
            scored.zero_()
            for pack, start in self._prepared(rollout):
                try:
                    output = start()()
                except RLHFError as error:  # of the scores: the forward is done
                    faults.append(error)
                    continue
                if not pack.idle:
                    scores[pack.rows] = output.scores.to(scores.device)
                    scored[pack.rows] = output.scored.to(scores.device, torch.int64)

        self.budget.in_halves(
            read, self.split, longest=longest_sample(rollout), start_anew=self.start_anew
        )
        _raise_together(self.split, next(iter(faults), None))
        return RewardOutput(self.split.sum(scores), self.split.sum(scored) > 0)

    def _prepared(self, rollout: Rollout) -> list[tuple[Share, Start]]:
        """This rank's packs, ready to be read; if a sample is refused, every rank raises.

        That is before any forward: in those of a model that is cut, the others would wait for ever.
        """
        prepared: list[tuple[Share, Start]] = []
        fault: RLHFError | None = None
        for pack in token_packs(rollout, range(len(rollout)), self.budget.tokens, self.split):
            chosen = rollout.select(pack.rows)
            try:
                # A second forward of a pack would be one that the other ranks do not make.
                prepared.append((pack, self.reward.prepare(chosen, pack.rows, at_once=True)))
            except RLHFError as error:
                fault = fault or error
        _raise_together(self.split, fault)
        return prepared


class OneRankReward:
    """A reward that rank 0 computes and the others are told: a function of the user's.

    It is called once for a rollout, as in a run of one process, whatever it reads, writes or draws.

    Args:
        reward: made on every rank, asked on rank 0.
        split: the ranks.
        note: told what this rank does, for whoever waits too long for it.
    """

    def __init__(
        self, reward: Reward, split: WorkSplit, note: Callable[[str], object] = lambda _: None
    ) -> None:
        self.reward = reward
        self.split = split
        self.note = note

    def score(self, rollout: Rollout) -> RewardOutput:
        """As the reward's own, the same on all ranks.

        Raises:
            RLHFError: of `reward`, on rank 0.
            PeerError: on the others.
        """
        device = rollout.responses.device
        output: RewardOutput | None = None
        fault: RLHFError | None = None
        self.note("the reward function" if self.split.rank == 0 else "waiting for rank 0's reward")
        if self.split.rank == 0:
            try:
                output = self.reward.score(rollout)
            except RLHFError as error:
                fault = error
        _raise_together(self.split, fault)
        self.note("score")
        per_token = self.split.any(output is not None and output.scores.dim() == 2)
        shape = rollout.responses.shape if per_token else rollout.responses.shape[:1]
        scores = torch.zeros(shape, device=device)
        scored = torch.zeros(len(rollout), dtype=torch.int64, device=device)
        if output is not None:
            scores, scored = output.scores.to(device), output.scored.to(device, torch.int64)
        return RewardOutput(self.split.sum(scores), self.split.sum(scored) > 0)


def _raise_together(split: WorkSplit, fault: RLHFError | None) -> None:
    """Leave on every rank if one has a fault, with that rank's exit code.

    Two ranks may have one each: the larger code is the more specific.
    """
    codes = [0.0] * split.ranks
    codes[split.rank] = 0.0 if fault is None else float(fault.exit_code)
    code = int(max(split.sum_numbers(codes)))
    if fault is not None:
        raise fault
    if code:
        raise PeerError(code)
