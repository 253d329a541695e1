"""Rules that turn a step's metrics into a hint with its likely causes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from rlhf_fast.config import PPOConfig


class Hint(NamedTuple):
    """name: stable, so that each hint is shown once a run; text: what is seen and why it may be."""

    name: str
    text: str


def hints(metrics: Mapping[str, float], config: PPOConfig) -> list[Hint]:
    """What in these metrics a practitioner would stop at."""
    if metrics["rollout/scored_fraction"] == 0:  # the others would read means over nothing
        text = "no response of a batch has a score: what scores them failed (reward.on_error)"
        return [Hint("nothing-scored", text)]
    found = _rollout_hints(metrics, config) + _update_hints(metrics)
    if config.sampling.top_p < 1 or config.sampling.top_k > 0 or config.sampling.min_p > 0:
        found.append(
            Hint(
                "warped-sampling",
                "top_p, top_k or min_p change the sampled distribution: KL estimates and ratios "
                "are biased and KL may turn negative; PPO usually samples with temperature alone",
            )
        )
    return found


def _rollout_hints(metrics: Mapping[str, float], config: PPOConfig) -> list[Hint]:
    found = []
    ended = metrics["rollout/ended_fraction"]
    if ended == 0:
        found.append(
            Hint(
                "no-eos",
                "no response ended by itself: raise sampling.max_new_tokens, check that SFT data "
                "ends in EOS, or use reward.missing_eos",
            )
        )
    elif metrics["rollout/length"] > 0.98 * config.sampling.max_new_tokens:
        found.append(
            Hint(
                "length-pinned",
                "responses are as long as allowed: the reward may favour length "
                "(see rollout/score_length_correlation)",
            )
        )
    if metrics["objective/scores_std"] == 0:
        found.append(
            Hint(
                "constant-scores",
                "every response of a batch got the same score: there is nothing to learn from",
            )
        )
    if metrics["objective/kl"] < -1.0 and not config.sampling.top_p < 1:
        found.append(
            Hint(
                "negative-kl",
                "the KL estimate is below -1 nat: actor and reference may differ in dropout, "
                "temperature or tokenizer",
            )
        )
    return found


def _update_hints(metrics: Mapping[str, float]) -> list[Hint]:
    found = []
    if metrics["policy/clipfrac_avg"] > 0.5:
        found.append(
            Hint(
                "clip-fraction",
                f"{metrics['policy/clipfrac_avg']:.0%} of tokens were clipped: lower the actor's "
                "learning rate or algorithm.ppo_epochs",
            )
        )
    if metrics["policy/entropy_avg"] < 0.01:
        found.append(
            Hint(
                "entropy-collapse",
                "policy entropy is near 0: raise kl.coef, lower the learning rate, or add "
                "algorithm.entropy_coef",
            )
        )
    if metrics.get("val/explained_variance", 0.0) < -1.0:
        found.append(
            Hint(
                "value-function",
                "the critic predicts returns worse than their mean: lower critic_optim.lr, keep "
                "reward.normalize on, or start the critic from the reward model",
            )
        )
    return found
