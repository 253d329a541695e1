"""The PPO step as named phases: generate, score, prepare, update, control."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rlhf_fast.config import PPOConfig, SamplingConfig
from rlhf_fast.errors import NumericalError
from rlhf_fast.ppo.advantages import estimate, importance_weights, whitened
from rlhf_fast.ppo.anchors import ratio_cap
from rlhf_fast.ppo.exact_kl import require_exact_kl
from rlhf_fast.ppo.kl_control import KLController
from rlhf_fast.ppo.layout import build_microbatch, longest_sample, response_slots, token_packs
from rlhf_fast.ppo.losses import linear_policy_loss, policy_loss, value_loss
from rlhf_fast.ppo.out_of_memory import TokenBudget, in_halves, require_smaller_rollout
from rlhf_fast.ppo.rewards import RunningMoments, shape_scores
from rlhf_fast.ppo.roles import Roles
from rlhf_fast.ppo.scoring import Scoring
from rlhf_fast.ppo.side_by_side import SideBySide
from rlhf_fast.ppo.statistics import UpdateStatistics, rollout_metrics
from rlhf_fast.ppo.trunk import require_trunk_head
from rlhf_fast.ppo.warnings import anchor_warnings, first_ratio_warnings
from rlhf_fast.protocols import TrunkValueModel
from rlhf_fast.seeds import derive_seed
from rlhf_fast.types import (
    Experience,
    HeadRows,
    LossOutput,
    Microbatch,
    PackedSequences,
    PromptBatch,
    Rollout,
    SamplingParams,
    ScoredRollout,
)

LOGPROB_GAP_WARNING = 0.05


@dataclass(frozen=True)
class StepOutput:
    """What one PPO step leaves: metrics by name, and the experience for samples on disk."""

    metrics: dict[str, float]
    experience: Experience
    warnings: list[str]


def sampling_params(config: SamplingConfig) -> SamplingParams:
    """The sampling section as the generator takes it."""
    return SamplingParams(
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        min_p=config.min_p,
        stop_strings=tuple(config.stop),
    )


class PPOLearner:
    """Turns prompts into an improved actor and critic, one rollout batch at a time.

    On several ranks (`roles.split`) all of them hold the whole batch and share the forwards: what
    is computed from whole batches is computed everywhere, and so are the decisions.

    Args:
        config: the PPO stage's config.
        roles: models and optimizers; `roles.on_update` runs after every optimizer step of the
            actor (it bumps the weight version); `roles.scoring` surrounds scoring (the engine
            forbids steps in it).
        phase: `with phase("generate"): ...` times a phase.

    Raises:
        ModelError: the exact KL is asked for, and the heads do not allow it (RF3026, RF3027);
            or the critic is on the actor's trunk, and the actor's head is no linear map (RF3071).
    """

    def __init__(
        self,
        config: PPOConfig,
        roles: Roles,
        phase: Callable[[str], AbstractContextManager[Any]] = lambda name: nullcontext(),
    ) -> None:
        if config.kl.estimator == "exact":
            require_exact_kl(roles.actor.vocabulary_head(), roles.reference.vocabulary_head())
        critic = roles.critic
        self.trunk_critic = critic if isinstance(critic, TrunkValueModel) else None
        if self.trunk_critic is not None:
            require_trunk_head(roles.actor.vocabulary_head())
        self.config = config
        self.roles = roles
        self.phase = phase
        # Ranks run the same forwards in the same order; two at a time would have none.
        together = roles.independent and roles.split.ranks == 1
        self.side_by_side = SideBySide(together, config.side_by_side)
        self.budget = TokenBudget(config.microbatch_tokens)
        self.scoring = Scoring(config, roles, self.side_by_side, self.budget)
        self.kl_controller = KLController(config.kl)
        self.score_moments = RunningMoments()
        self.steps = 0
        self.episodes = 0
        self.sampling = sampling_params(config.sampling)
        self._rollouts_redone = 0
        self.rollout_halvings = 0

    def step(self, prompts: PromptBatch) -> StepOutput:
        """One rollout batch: sample, score, estimate advantages, update both models."""
        with self.roles.between_updates():
            with self.phase("generate"):
                rollout = self.generate(prompts)
            with self.phase("score"), self.roles.scoring():
                scored = self.score(rollout)
        with self.phase("prepare"):
            experience, shaped = self.prepare(scored)
        metrics = rollout_metrics(experience, shaped, kl_coef=self.kl_controller.coef)
        warnings = self._check_logprob_gap(metrics)
        warnings += anchor_warnings(self.config.algorithm, metrics, scored)
        with self.phase("update"):
            update = self.update(experience)
        if scored.anchor_gap is None:  # a ratio to the generator says how far the two are apart
            warnings += first_ratio_warnings(self.config.run.dtype, update)
        # Rows that abstained are in no mean: without any, there is no KL to steer by.
        kl = metrics.get("objective/kl_exact", metrics["objective/kl"])
        self.kl_controller.update(kl, int(scored.scored.sum()))
        self.steps += 1
        self.episodes += len(rollout)
        metrics |= update | {
            "episode": float(self.episodes),
            "kl_coef": self.kl_controller.coef,
            "rollout/early_scored_fraction": self.scoring.early_fraction,
            "rollout/redone": float(self._rollouts_redone),
        }
        return StepOutput(metrics, experience, warnings)

    def generate(self, prompts: PromptBatch) -> Rollout:
        """Sample G responses per prompt, each keyed by (seed, step, prompt, sample).

        What runs out of memory is drawn again, half as many samples at a time: the same samples.
        """
        drawn: list[Rollout] = []
        self._rollouts_redone = in_halves(
            lambda: drawn.append(self._drawn(prompts)),
            self.roles.split,
            halve=self._halve_rollout,
        )
        return drawn[-1]

    def _halve_rollout(self) -> None:
        require_smaller_rollout(self.roles.halve_rollout)
        self.rollout_halvings += 1

    def _drawn(self, prompts: PromptBatch) -> Rollout:
        group = self.config.rollout.samples_per_prompt
        seeds = [
            derive_seed(self.config.run.seed, self.steps, uid, g)
            for uid in prompts.uid
            for g in range(group)
        ]
        scorer = self.scoring.begin()
        more: dict[str, Any] = {} if scorer is None else {"scorer": scorer}
        try:
            return self.roles.generator.generate(
                prompts, self.sampling, samples_per_prompt=group, seeds=seeds, **more
            )
        except BaseException:
            self.scoring.forget()
            raise

    def score(self, rollout: Rollout) -> ScoredRollout:
        """The four roles read the finished sequences, those not read while others were drawn."""
        return self.scoring.score(rollout, step=self.steps)

    def prepare(self, scored: ScoredRollout) -> tuple[Experience, Tensor]:
        """Shape scores, place them, subtract KL, estimate advantages; also the shaped scores."""
        config, rollout = self.config, scored.rollout
        shaped = shape_scores(
            scored.scores,
            scored.scored,
            rollout.response_mask,
            rollout.ended,
            self.score_moments,
            config.reward,
        )
        experience = estimate(
            scored,
            shaped,
            kl_coef=self.kl_controller.coef,
            bootstrap=self._bootstrap(rollout),
            algorithm=config.algorithm,
            kl=config.kl,
            reward=config.reward,
        )
        return experience, shaped

    def update(self, experience: Experience) -> dict[str, float]:
        """Several PPO epochs of minibatches; returns the means over all their loss tokens."""
        algorithm = self.config.algorithm
        mask = experience.scored.loss_mask
        advantages = experience.advantages
        if self._whitens("batch"):
            advantages = whitened(advantages, mask, unbiased=algorithm.whiten_unbiased)
        weights = importance_weights(experience.scored, algorithm.rollout_correction)
        statistics = UpdateStatistics()
        for epoch in range(algorithm.ppo_epochs):
            for minibatch in self._minibatches(len(mask), epoch):
                if not self._update_minibatch(
                    experience, minibatch, advantages, weights, statistics
                ):
                    return statistics.finalize(early_stop=True)
        return statistics.finalize(early_stop=False)

    def _update_minibatch(
        self,
        experience: Experience,
        minibatch: Sequence[int],
        advantages: Tensor,
        weights: Tensor,
        statistics: UpdateStatistics,
    ) -> bool:
        """One optimizer step of actor and critic; false if target_kl ended the epochs first."""
        algorithm, roles = self.config.algorithm, self.roles
        rows = torch.as_tensor(minibatch, device=advantages.device)
        mask = experience.scored.loss_mask[rows]
        if self._whitens("minibatch"):
            advantages = advantages.clone()
            advantages[rows] = whitened(advantages[rows], mask, unbiased=algorithm.whiten_unbiased)
        tokens = int(mask.sum())
        ptx, texts = self.config.ptx, None
        pretraining_loss: list[float] = []
        if roles.pretraining is not None:
            texts = roles.pretraining.next_batch()

        def accumulate() -> None:
            budget = self.budget.tokens
            if self.config.memory.step_in_backward:  # one microbatch, whatever scoring found to fit
                budget = self.budget.configured
            if tokens:  # of none the gradient is 0, with which AdamW follows its momentum
                build = partial(
                    build_microbatch,
                    experience,
                    advantages=advantages,
                    weights=weights,
                    num_loss_tokens=tokens,
                    ratio_cap=ratio_cap(experience.scored, algorithm),
                )
                packs = token_packs(experience.scored.rollout, minibatch, budget, roles.split)
                self._backward([build(pack.rows, idle=pack.idle) for pack in packs], statistics)
            if texts is not None:
                part = texts.backward(roles.actor, budget=budget, coef=ptx.coef)
                pretraining_loss[:] = [part]

        def start_anew() -> None:
            roles.start_anew()
            self._drop_gradients()
            statistics.redo_minibatch()

        statistics.begin_minibatch()
        if self.config.memory.step_in_backward:  # has stepped by the time memory runs out
            accumulate()
        else:
            longest = longest_sample(experience.scored.rollout)
            self.budget.in_halves(accumulate, roles.split, longest=longest, start_anew=start_anew)
        statistics.agree(roles.split)
        if algorithm.target_kl > 0 and statistics.minibatch_kl() > algorithm.target_kl:
            self._drop_gradients()
            return False
        for part in pretraining_loss:
            statistics.add_pretraining(roles.split.sum_numbers([part])[0])
        rates = roles.rates
        optimizers = [o for o in (roles.actor_optimizer, roles.critic_optimizer) if o is not None]
        stepped = self.side_by_side.run([o.step for o in optimizers], advantages.device)
        statistics.add_step("policy", rates["lr"], stepped[0])
        roles.on_update()
        if roles.critic is not None:
            statistics.add_step("value", rates["lr_value"], stepped[-1])
        return True

    def _drop_gradients(self) -> None:
        self.roles.actor_optimizer.zero_grad()
        if self.roles.critic_optimizer is not None:
            self.roles.critic_optimizer.zero_grad()

    def _backward(self, microbatches: Sequence[Microbatch], statistics: UpdateStatistics) -> None:
        """Forward and backward of both models over microbatches; gradients accumulate.

        Side by side each model goes at its own pace: none waits after every microbatch.
        """
        passes = [self._policy_backward]
        if self.roles.critic is not None and self.trunk_critic is None:
            passes.append(self._value_backward)

        def over_all(backward: Callable[[Microbatch], list[LossOutput]]) -> list[LossOutput]:
            return [output for microbatch in microbatches for output in backward(microbatch)]

        calls = [partial(over_all, backward) for backward in passes]
        for outputs in self.side_by_side.run(calls, microbatches[0].targets.device):
            for output in outputs:
                statistics.add(output)

    def _policy_backward(self, microbatch: Microbatch) -> list[LossOutput]:
        # First, so that the reference's layers do not run beside the actor's activations.
        reference = self._reference_rows(microbatch.sequences)
        rows = self.roles.actor.head_rows(microbatch.sequences)
        policy = self._policy_loss(microbatch, rows, reference)
        if self.trunk_critic is None or rows is None:
            policy.loss.backward()
            return _without_graph(policy)
        value = self._value_loss(microbatch, self.trunk_critic.values_from(rows.hidden))
        (policy.loss + self.config.memory.value_coef * value.loss).backward()
        return _without_graph(policy, value)

    def _value_backward(self, microbatch: Microbatch) -> list[LossOutput]:
        assert self.roles.critic is not None
        value = self._value_loss(microbatch, self.roles.critic.values(microbatch.sequences))
        value.loss.backward()
        return _without_graph(value)

    def _value_loss(self, microbatch: Microbatch, values: Tensor) -> LossOutput:
        return value_loss(microbatch, values, algorithm=self.config.algorithm)

    def _policy_loss(
        self, microbatch: Microbatch, rows: HeadRows | None, reference: HeadRows | None
    ) -> LossOutput:
        """From hidden states where the head is one linear map, else from log-probs."""
        actor, config, temperature = self.roles.actor, self.config, self.sampling.temperature
        coef = self.kl_controller.coef
        if rows is not None:
            return linear_policy_loss(
                *(microbatch, rows, reference),
                temperature=temperature,
                algorithm=config.algorithm,
                kl=config.kl,
                kl_coef=coef,
            )
        logprobs, entropy = actor.logprobs(
            microbatch.sequences, microbatch.targets, temperature=temperature, with_entropy=True
        )
        if entropy is not None and config.algorithm.entropy_coef == 0:
            entropy = entropy.detach()  # reported only: its gradient would cost a pass of its own
        return policy_loss(
            *(microbatch, logprobs, entropy),
            algorithm=config.algorithm,
            kl=config.kl,
            kl_coef=coef,
        )

    def _reference_rows(self, sequences: PackedSequences) -> HeadRows | None:
        """What the exact KL in the loss reads of the reference; None if it is not there."""
        if not self._exact_kl_in("loss"):
            return None
        # Once more: adapters may have been put on a head since.
        actor, reference = self.roles.actor, self.roles.reference
        require_exact_kl(actor.vocabulary_head(), reference.vocabulary_head())
        return reference.head_rows(sequences)

    def _exact_kl_in(self, placement: str) -> bool:
        kl = self.config.kl
        return kl.estimator == "exact" and kl.placement == placement

    @torch.no_grad()
    def _bootstrap(self, rollout: Rollout) -> Tensor | None:
        """[S] value of the state after the last token of truncated rows, 0 for ended ones."""
        critic = self.roles.critic
        if critic is None or not self.config.algorithm.bootstrap_truncated:
            return None
        out = torch.zeros(len(rollout), device=rollout.responses.device)
        truncated = torch.nonzero(~rollout.ended).flatten().tolist()

        def read() -> None:
            out.zero_()  # smaller packs are dealt anew: what was read before may be another rank's
            for pack in token_packs(rollout, truncated, self.budget.tokens, self.roles.split):
                slots = response_slots(rollout, pack.rows)
                values = critic.values(slots.sequences)[slots.last]
                if not pack.idle:
                    out[torch.as_tensor(pack.rows, device=out.device)] = values

        self.budget.in_halves(
            read,
            self.roles.split,
            longest=longest_sample(rollout),
            start_anew=self.roles.start_anew,
        )
        return self.roles.split.sum(out)

    def _whitens(self, scope: str) -> bool:
        """Whether GAE's advantages are whitened over this scope; the others have baselines."""
        algorithm = self.config.algorithm
        return algorithm.whiten and algorithm.whiten_scope == scope and algorithm.estimator == "gae"

    def _minibatches(self, samples: int, epoch: int) -> Iterator[list[int]]:
        """Samples of each optimizer step: a new permutation each epoch, from counters alone."""
        generator = torch.Generator().manual_seed(
            derive_seed(self.config.run.seed, self.steps, epoch, -1)
        )
        order = torch.randperm(samples, generator=generator).tolist()
        size = samples // self.config.algorithm.minibatches
        for start in range(0, samples, size):
            yield order[start : start + size]

    def _check_logprob_gap(self, metrics: Mapping[str, float]) -> list[str]:
        """The generator must sample from the policy that is trained; measured in every step."""
        gap = metrics["rollout/logprob_gap"]
        limit = self.config.algorithm.max_logprob_gap
        if not gap <= limit:
            raise NumericalError(
                "RF6002",
                f"generator and trainer disagree: mean |log-prob gap| is {gap:.3g} nats",
                where=f"step {self.steps + 1}",
                expected=f"at most algorithm.max_logprob_gap={limit}",
                remedy="check that dropout is off and that both sides use the same weights, "
                "dtype and temperature",
            )
        if gap > LOGPROB_GAP_WARNING:
            return [f"mean |trainer - generator| log-prob gap is {gap:.3g} nats"]
        return []

    def state_dict(self) -> dict[str, Any]:
        """Everything of the learner, beside models and optimizers, that a checkpoint must hold."""
        return {
            "steps": self.steps,
            "episodes": self.episodes,
            "kl_controller": self.kl_controller.state_dict(),
            "score_moments": self.score_moments.state_dict(),
            "token_budget": self.budget.state_dict(),
            **{name: part.state_dict() for name, part in self.roles.checkpointed.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a checkpoint."""
        self.steps = int(state["steps"])
        self.episodes = int(state["episodes"])
        self.kl_controller.load_state_dict(state["kl_controller"])
        self.score_moments.load_state_dict(state["score_moments"])
        if "token_budget" in state:  # not in checkpoints of before there was one
            self.budget.load_state_dict(state["token_budget"])
        for name, part in self.roles.checkpointed.items():
            part.load_state_dict(state[name])


def _without_graph(*outputs: LossOutput) -> list[LossOutput]:
    return [replace(output, loss=output.loss.detach()) for output in outputs]
