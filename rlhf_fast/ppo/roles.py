"""What the trainer is given: the four models, their optimizers and what surrounds its phases."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

from rlhf_fast.optim import GuardedOptimizer
from rlhf_fast.ppo.pretraining import PretrainingSource
from rlhf_fast.protocols import Alone, Generator, PolicyModel, Reward, ValueModel, WorkSplit


class Checkpointed(Protocol):
    """Something whose plain values belong in a checkpoint."""

    def state_dict(self) -> dict[str, Any]:
        """Plain values."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from them."""
        ...


@dataclass
class Roles:
    """The four models and what moves them. `critic` and its optimizer are None without a critic.

    The head of a critic on the actor's trunk is the last group of the actor's optimizer instead.
    `between_updates` is entered for sampling and scoring: what only the update needs may rest.
    `checkpointed` is what else a resumed run needs, by name. `independent`: no two roles share a
    module, a weight or a config, so that they may compute at the same time.

    `split`: the ranks that share forwards; `reward` and `generator` then give all of them the same.
    `halve_rollout`: after the generator ran out of memory, it shall hold half as many samples at a
    time; false if it cannot. `start_anew`: after a forward or backward that ran out of memory, on
    all ranks; gradients are gone then.
    """

    actor: PolicyModel
    reference: PolicyModel
    critic: ValueModel | None
    reward: Reward
    generator: Generator
    actor_optimizer: GuardedOptimizer
    critic_optimizer: GuardedOptimizer | None
    pretraining: PretrainingSource | None = None
    on_update: Callable[[], object] = field(default=lambda: None)
    scoring: Callable[[], AbstractContextManager[Any]] = nullcontext
    between_updates: Callable[[], AbstractContextManager[Any]] = nullcontext
    checkpointed: Mapping[str, Checkpointed] = field(default_factory=dict)
    independent: bool = False
    split: WorkSplit = field(default_factory=Alone)
    halve_rollout: Callable[[], bool] = field(default=lambda: False)
    start_anew: Callable[[], object] = field(default=lambda: None)

    @property
    def rates(self) -> dict[str, float]:
        """Learning rates of the next step, by metric."""
        rates = {"lr": self.actor_optimizer.lr}
        if self.critic_optimizer is not None:
            rates["lr_value"] = self.critic_optimizer.lr
        elif self.critic is not None:
            rates["lr_value"] = self.actor_optimizer.rates[-1]
        return rates
