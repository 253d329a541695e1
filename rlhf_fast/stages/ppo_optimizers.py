"""The optimizers of PPO's trained roles, and where their states are between updates."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Literal

from torch import nn

from rlhf_fast.config import PPOConfig
from rlhf_fast.models.forward import enable_gradient_checkpointing
from rlhf_fast.optim import GradientExchange, GuardedOptimizer


def build_optimizer(
    config: PPOConfig,
    module: nn.Module,
    name: Literal["actor", "critic"],
    value_head: nn.Module | None = None,
    *,
    ranks: GradientExchange | None = None,
) -> GuardedOptimizer:
    """Put a module, already on its device, in train mode, and make its optimizer.

    A `value_head` joins it with the learning rate and weight decay of `critic_optim`.
    """
    module.train()  # dropout is off in either mode; activations are recomputed in this one only
    if config.gradient_checkpointing:
        enable_gradient_checkpointing(module)
    return guarded_optimizer(config, module, name, value_head, ranks=ranks)


def guarded_optimizer(
    config: PPOConfig,
    module: nn.Module,
    name: Literal["actor", "critic"],
    value_head: nn.Module | None = None,
    *,
    ranks: GradientExchange | None = None,
) -> GuardedOptimizer:
    """The optimizer of a module's trainable parameters, and of a value head if there is one.

    `ranks` are those that it steps together with; None: it steps alone.
    """
    algorithm = config.algorithm
    return GuardedOptimizer(
        module,
        config.actor_optim if name == "actor" else config.critic_optim,
        config.total_steps * algorithm.ppo_epochs * algorithm.minibatches,
        max_bad_steps=config.run.max_bad_steps,
        name=name,
        bits=8 if config.memory.optimizer == "adamw8bit" else 32,
        in_backward=config.memory.step_in_backward,
        heads={} if value_head is None else {"value_head": (value_head, config.critic_optim)},
        ranks=ranks,
    )


def between_updates(
    config: PPOConfig, optimizers: Sequence[GuardedOptimizer]
) -> Callable[[], AbstractContextManager[None]]:
    """What surrounds generation and scoring, when no optimizer steps."""
    if config.memory.optimizer_state == "resident":
        return nullcontext
    return lambda: states_on_host(optimizers)


@contextmanager
def states_on_host(optimizers: Sequence[GuardedOptimizer]) -> Iterator[None]:
    """Keep the optimizers' states off the device inside."""
    try:
        for optimizer in optimizers:
            optimizer.offload_state()
        yield
    finally:
        for optimizer in optimizers:
            optimizer.restore_state()
