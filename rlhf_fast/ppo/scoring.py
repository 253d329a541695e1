"""What the four roles say of finished sequences: after generation, or of some while it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from rlhf_fast.config import PPOConfig
from rlhf_fast.data.packing import Share
from rlhf_fast.ppo.anchors import checked_samples, logprob_gap
from rlhf_fast.ppo.exact_kl import read_both
from rlhf_fast.ppo.layout import ResponseSlots, longest_sample, response_slots, token_packs
from rlhf_fast.ppo.out_of_memory import TokenBudget
from rlhf_fast.ppo.roles import Roles
from rlhf_fast.ppo.side_by_side import SideBySide
from rlhf_fast.ppo.trunk import row_logprobs
from rlhf_fast.protocols import RewardOutput, SampleReward, TrunkValueModel, WorkSplit
from rlhf_fast.types import LogprobGap, PackedSequences, Rollout, ScoredRollout

Read = Callable[[PackedSequences, Tensor], dict[str, Tensor]]


@dataclass(frozen=True)
class _Pack:
    """Some samples of a rollout and what the roles said of their tokens.

    Args:
        slots: where the samples lie.
        targets: [N] int64, the token after each position, IGNORE_INDEX outside the responses.
        found: [N] float32 by the names of `ScoredRollout`.
    """

    slots: ResponseSlots
    targets: Tensor
    found: dict[str, Tensor]


class Scoring:
    """Log-probs of actor and reference, values and scores of a rollout.

    Args:
        config: the PPO stage's config.
        roles: the four models.
        side_by_side: runs the roles' forwards.
        budget: tokens of one forward; None: as configured.

    On several ranks the forwards are dealt, what they found is summed, and every rank returns all
    of it. Nothing is then scored early: which samples are finished is a matter of a rank's own.

    Attributes:
        early_fraction: part of the samples of the last rollout that was read during generation.
    """

    def __init__(
        self,
        config: PPOConfig,
        roles: Roles,
        side_by_side: SideBySide,
        budget: TokenBudget | None = None,
    ) -> None:
        self.config = config
        self.roles = roles
        self.budget = TokenBudget(config.microbatch_tokens) if budget is None else budget
        self._side_by_side = side_by_side
        self.early_fraction = 0.0
        self._early: EarlyScores | None = None
        self._exact = config.kl.estimator == "exact" and config.kl.placement == "reward"
        self._anchored = config.algorithm.old_logprobs == "rollout"
        self._temperature = config.sampling.temperature

    @property
    def _device(self) -> torch.device:
        return next(self.roles.actor.module.parameters()).device

    def begin(self) -> EarlyScores | None:
        """What takes samples while the next rollout is generated; None if all are scored after."""
        wish = "off" if self.roles.split.ranks > 1 else self.config.engine.overlap_scoring
        overlaps = wish == "on" or (wish == "auto" and self._device.type == "cuda")
        self._early = EarlyScores(self) if overlaps else None
        return self._early

    def forget(self) -> None:
        """The rollout that was begun has failed: what was read of it belongs to no other."""
        self._early = None

    @torch.no_grad()
    def score(self, rollout: Rollout, *, step: int = 0) -> ScoredRollout:
        """All roles on a rollout; what was read early is taken over.

        Args:
            rollout: S samples, anywhere.
            step: draws which responses are checked against the generator.
        """
        early, self._early = self._early or EarlyScores(self), None
        # Everything up to the update happens where the actor is, wherever the generator worked.
        rollout = rollout.to(self._device)
        rest = sorted(set(range(len(rollout))) - set(early.samples))
        self.early_fraction = len(early.samples) / max(len(rollout), 1)
        packs: list[_Pack] = []
        rewards: list[RewardOutput] = []

        def reward() -> None:
            if not rewards:  # whatever becomes of the other models
                rewards.append(self._reward(rollout, rest, early))

        def read_rest() -> None:
            packs[:] = [self._pack(rollout, pack) for pack in self._packs(rollout, rest)]
            # A model reads one pack after another: while it does, its attention is switched.
            calls = [partial(_read_all, read, packs) for read in self._reads()]
            self._side_by_side.run([reward, *calls] if splits else calls, self._device)

        splits = isinstance(self.roles.reward, SampleReward) and self.roles.reward.splits
        if not splits:  # a function of the user's, which may do anything
            reward()
        self._in_halves(read_rest, rollout)
        scores, scored = rewards[0]
        found = _padded(early.packs + packs, rollout, self.roles.split)
        old, gap = self._anchors(rollout, step) if self._anchored else (found["old_logprobs"], None)
        return ScoredRollout(
            *(rollout, scores.to(self._device), scored.to(self._device)),
            old_logprobs=old,
            ref_logprobs=found["ref_logprobs"],
            values=found["values"],
            exact_kl=found.get("exact_kl"),
            anchor_gap=gap,
        )

    def _in_halves(self, forwards: Callable[[], None], rollout: Rollout) -> None:
        """Make forwards; with half the tokens in each, on all ranks, if memory runs out on one."""
        self.budget.in_halves(
            forwards,
            self.roles.split,
            longest=longest_sample(rollout),
            start_anew=self.roles.start_anew,
        )

    def read(self, rollout: Rollout, samples: Sequence[int]) -> _Pack:
        """One forward of each model over some samples."""
        pack = self._pack(rollout, Share(list(samples)))
        for read in self._reads():
            _read_all(read, [pack])
        return pack

    def _packs(self, rollout: Rollout, samples: Sequence[int]) -> Iterator[Share]:
        return token_packs(rollout, samples, self.budget.tokens, self.roles.split)

    def _pack(self, rollout: Rollout, pack: Share) -> _Pack:
        slots = response_slots(rollout, pack.rows, idle=pack.idle)
        return _Pack(slots, slots.targets(rollout.response_mask), {})

    def _reads(self) -> list[Read]:
        """Forwards that share no model; together they find all that `ScoredRollout` holds.

        Anchors of the rollout are not read here.
        """
        critic = self.roles.critic
        on_trunk = isinstance(critic, TrunkValueModel)
        if self._exact:
            reads: list[Read] = [self._both]
        elif on_trunk:
            reads = [self._trunk, self._reference]
        else:
            reads = [self._reference] if self._anchored else [self._actor, self._reference]
        return reads if on_trunk or critic is None else [*reads, self._values]

    def _both(self, sequences: PackedSequences, targets: Tensor) -> dict[str, Tensor]:
        """Actor and reference at once, for the KL over the whole vocabulary."""
        rows = self.roles.actor.head_rows(sequences)
        reference = self.roles.reference.head_rows(sequences)
        read = read_both(rows, reference, targets, temperature=self._temperature)
        names = ("old_logprobs", "ref_logprobs", "exact_kl")
        found = dict(zip(names, read, strict=True))
        critic = self.roles.critic
        if isinstance(critic, TrunkValueModel) and rows is not None:
            found["values"] = critic.values_from(rows.hidden)
        return found

    def _trunk(self, sequences: PackedSequences, targets: Tensor) -> dict[str, Tensor]:
        """Actor and critic by one forward of the trunk."""
        rows, critic = self.roles.actor.head_rows(sequences), self.roles.critic
        assert isinstance(critic, TrunkValueModel)
        assert rows is not None  # the trainer requires a head of one map
        return {
            "old_logprobs": row_logprobs(rows, targets, temperature=self._temperature),
            "values": critic.values_from(rows.hidden),
        }

    def _actor(self, sequences: PackedSequences, targets: Tensor) -> dict[str, Tensor]:
        return {"old_logprobs": self._actor_logprobs(sequences, targets)}

    def _reference(self, sequences: PackedSequences, targets: Tensor) -> dict[str, Tensor]:
        found, _ = self.roles.reference.logprobs(sequences, targets, temperature=self._temperature)
        return {"ref_logprobs": found}

    def _values(self, sequences: PackedSequences, _targets: Tensor) -> dict[str, Tensor]:
        assert self.roles.critic is not None
        return {"values": self.roles.critic.values(sequences)}

    def _actor_logprobs(self, sequences: PackedSequences, targets: Tensor) -> Tensor:
        return self.roles.actor.logprobs(sequences, targets, temperature=self._temperature)[0]

    def _reward(self, rollout: Rollout, rest: Sequence[int], early: EarlyScores) -> RewardOutput:
        """Scores of all samples: one call, unless some were scored early."""
        reward = self.roles.reward
        if not early.rewards:
            return reward.score(rollout)
        assert isinstance(reward, SampleReward)
        scores = torch.zeros(len(rollout), device=rollout.responses.device)
        scored = torch.zeros(len(rollout), dtype=torch.bool, device=scores.device)
        last = [(rest, reward.prepare(rollout.select(rest), rest)())] if rest else []
        for samples, finish in [*early.rewards, *last]:
            output, index = finish(), torch.as_tensor(samples, device=scores.device)
            scores[index] = output.scores.to(scores.device)
            scored[index] = output.scored.to(scores.device)
        return RewardOutput(scores, scored)

    def _anchors(self, rollout: Rollout, step: int) -> tuple[Tensor, LogprobGap | None]:
        """The generator's log-probs and the gap measured, or all recomputed if it is too wide."""
        samples, mask = len(rollout), rollout.response_mask
        checked = checked_samples(samples, self.config.run.seed, step, -2)
        recomputed = self._recomputed(rollout, checked)
        generators = torch.where(mask, rollout.rollout_logprobs, 0.0)
        gap = logprob_gap(recomputed[checked], generators[checked], mask[checked])
        if gap.k3 <= self.config.algorithm.max_rollout_kl:  # false for NaN
            return generators, gap
        rest = sorted(set(range(samples)) - set(checked))
        return recomputed + self._recomputed(rollout, rest), None

    def _recomputed(self, rollout: Rollout, samples: Sequence[int]) -> Tensor:
        """[S, R] log-probs by the actor of some samples, 0 elsewhere."""
        out = torch.zeros(rollout.responses.shape, device=rollout.responses.device)

        def recompute() -> None:
            out.zero_()  # smaller packs are dealt anew: what was read before may be another rank's
            for pack in self._packs(rollout, samples):
                slots = response_slots(rollout, pack.rows, idle=pack.idle)
                targets = slots.targets(rollout.response_mask)
                slots.to_padded(self._actor_logprobs(slots.sequences, targets), out)

        self._in_halves(recompute, rollout)
        return self.roles.split.sum(out)


class EarlyScores:
    """`FinishedScorer` of one rollout: keeps what the roles said until the rest is there.

    On an accelerator nothing here waits for it: what was read stays there, where it will be used.
    """

    def __init__(self, scoring: Scoring) -> None:
        self._scoring = scoring
        self.samples: list[int] = []
        self.packs: list[_Pack] = []
        self.rewards: list[tuple[Sequence[int], Callable[[], RewardOutput]]] = []

    @property
    def pack_tokens(self) -> int:
        """Tokens of one forward."""
        return self._scoring.budget.tokens

    @torch.no_grad()
    def score(self, samples: Sequence[int], rollout: Rollout) -> None:
        """Read K finished samples; see `FinishedScorer`."""
        pack = self._scoring.read(rollout, range(len(rollout)))
        index = torch.as_tensor(samples, dtype=torch.int64, device=pack.slots.rows.device)
        slots = replace(pack.slots, rows=index[pack.slots.rows])
        reward = self._scoring.roles.reward
        if isinstance(reward, SampleReward) and reward.splits:
            self.rewards.append((samples, reward.prepare(rollout, samples)()))
        self.packs.append(replace(pack, slots=slots))
        self.samples += samples


def _read_all(read: Read, packs: Sequence[_Pack]) -> None:
    for pack in packs:
        pack.found.update(read(pack.slots.sequences, pack.targets))


def _padded(packs: Sequence[_Pack], rollout: Rollout, split: WorkSplit) -> dict[str, Tensor]:
    """[S, R] of everything that was read on any rank, by name, 0 outside the responses."""
    shape, device = rollout.responses.shape, rollout.responses.device
    names = {name for pack in packs for name in pack.found} | {"old_logprobs", "ref_logprobs"}
    out = {name: torch.zeros(shape, device=device) for name in names | {"values"}}
    for pack in packs:
        for name, packed in pack.found.items():
            pack.slots.to_padded(packed, out[name])
    return {name: split.sum(out[name]) for name in sorted(out)}
