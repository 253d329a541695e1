"""Which changes of a config make a run fit: the cheapest first, each verified by a new plan."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from rlhf_fast.config import PPOConfig
from rlhf_fast.config_loading import with_values
from rlhf_fast.config_rules import violations
from rlhf_fast.engine.memory_ledger import MemoryPlan

Values = dict[str, Any]
RANK = 64
# Keys whose objects may be passed to a trainer, and so need no name in a config that is planned.
OBJECTS = ("reward", "ptx.data")
# What several processes refuse (RF1045).
_ALONE = frozenset({"memory.step_in_backward"})


@dataclass(frozen=True)
class Advice:
    """Changes that make it fit, or those that come nearest.

    Args:
        changes: config keys and values.
        plan: with them.
        fits: whether they suffice.
    """

    changes: Values
    plan: MemoryPlan
    fits: bool

    def overrides(self) -> str:
        """For a command line."""
        return " ".join(f"{key}={_text(value)}" for key, value in self.changes.items())


def advise(
    config: PPOConfig,
    plan: Callable[[PPOConfig], MemoryPlan],
    fits: Callable[[MemoryPlan], bool],
    *,
    gpus: int = 1,
) -> Advice:
    """Find changes for a config that does not fit.

    Args:
        config: of the run.
        plan: predicts.
        fits: judges a prediction.
        gpus: with more than one, changes that are for one process are left out.
    """

    def steps(config: PPOConfig) -> list[Callable[[PPOConfig], Values]]:
        return [partial(_for_ranks, step) if gpus > 1 else step for step in _steps(config)]

    full = _gather(config, {}, steps(config), plan, fits)
    if full.fits or config.lora.rank > 0:
        return full
    start: Values = {"lora.rank": RANK, "lora.alpha": 2.0 * RANK}
    start |= {"critic": ""} if config.critic else {}
    # A head on the actor's trunk and a reference of its own memory are there without LoRA alone.
    if config.memory.value_head == "actor":
        start["memory.value_head"] = "separate"
    if config.memory.reference == "offload" and not config.reference:
        start["memory.reference"] = "resident"
    if violations(with_values(config, start), given=OBJECTS):
        return full
    adapted = _gather(config, start, steps(with_values(config, start)), plan, fits)
    return adapted if adapted.fits or adapted.plan.least() < full.plan.least() else full


def _gather(
    config: PPOConfig,
    start: Values,
    steps: list[Callable[[PPOConfig], Values]],
    plan: Callable[[PPOConfig], MemoryPlan],
    fits: Callable[[MemoryPlan], bool],
) -> Advice:
    """Take step after step that helps until it fits, then drop those that were not needed."""
    taken: list[Values] = [start]

    def trial(parts: list[Values]) -> tuple[PPOConfig, Values, MemoryPlan]:
        values = {key: value for part in parts for key, value in part.items()}
        changed = with_values(config, values)
        return changed, values, plan(changed)

    now, values, best = trial(taken)
    for step in steps:
        if fits(best):
            break
        change = step(now)
        if not change or violations(with_values(now, change), given=OBJECTS):
            continue
        changed, more, found = trial([*taken, change])
        if found.least() < best.least() or fits(found):
            taken, now, values, best = [*taken, change], changed, more, found
    if fits(best):
        for change in reversed(taken[1:]):
            fewer = [part for part in taken if part is not change]
            changed, more, found = trial(fewer)
            if fits(found) and not violations(changed, given=OBJECTS):
                taken, values, best = fewer, more, found
    return Advice(values, best, fits(best))


def _steps(config: PPOConfig) -> Iterator[Callable[[PPOConfig], Values]]:
    """In the order of what they cost: each says what it would change of a config."""
    yield lambda now: {"engine.keep_memory": False} if now.engine.keep_memory else {}
    yield _score_afterwards
    for key, value in (
        ("memory.reference", "offload"),
        ("memory.reward_model", "offload"),
        ("memory.optimizer_state", "offload"),
        ("memory.value_head", "actor"),
        ("memory.optimizer", "adamw8bit"),
    ):
        yield lambda _, key=key, value=value: {key: value}  # type: ignore[misc]
    yield _step_in_backward
    yield lambda _: {"gradient_checkpointing": True}
    tokens = config.microbatch_tokens // 2
    longest = config.data.max_prompt_length + config.sampling.max_new_tokens
    while tokens >= longest:
        yield lambda now, tokens=tokens: _microbatch(now, tokens)  # type: ignore[misc]
        tokens //= 2
    yield _score_afterwards  # what did not help as long as another phase was the fullest


def _for_ranks(step: Callable[[PPOConfig], Values], config: PPOConfig) -> Values:
    change = step(config)
    return {} if _ALONE & change.keys() else change


def _score_afterwards(config: PPOConfig) -> Values:
    value = "off"
    return {} if config.engine.overlap_scoring == value else {"engine.overlap_scoring": value}


def _step_in_backward(config: PPOConfig) -> Values:
    if config.memory.step_in_backward or config.lora.rank > 0:
        return {}
    values: Values = {"memory.step_in_backward": True}
    values["actor_optim.max_grad_norm"] = values["critic_optim.max_grad_norm"] = 0.0
    return values | _minibatches(config, config.microbatch_tokens)


def _microbatch(config: PPOConfig, tokens: int) -> Values:
    smaller: Values = {"microbatch_tokens": tokens}
    return smaller | (_minibatches(config, tokens) if config.memory.step_in_backward else {})


def _minibatches(config: PPOConfig, tokens: int) -> Values:
    """The fewest optimizer steps a pass of which each is one microbatch."""
    samples = config.rollout.prompts * config.rollout.samples_per_prompt
    longest = config.data.max_prompt_length + config.sampling.max_new_tokens
    most = tokens // longest
    now = config.algorithm.minibatches
    fitting = [n for n in range(now, samples + 1) if samples % n == 0 and samples // n <= most]
    return {"algorithm.minibatches": fitting[0]} if fitting and fitting[0] != now else {}


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)
