"""What SFT and the reward model share: one module, trained by epochs over labelled rows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import nn

from rlhf_fast.config import RewardModelConfig, SFTConfig
from rlhf_fast.data import EpochSampler
from rlhf_fast.data.packing import Share, share_of
from rlhf_fast.distributed import Checkpoint
from rlhf_fast.distributed.gradients import RankGradients
from rlhf_fast.distributed.sharding import start_anew as start_anew_of
from rlhf_fast.distributed.work import WorldSplit
from rlhf_fast.distributed.world import World
from rlhf_fast.metrics import MetricLogger
from rlhf_fast.optim import GuardedOptimizer
from rlhf_fast.ppo.out_of_memory import TokenBudget
from rlhf_fast.stages.adapted import trunk_digest
from rlhf_fast.stages.found_to_fit import remembering
from rlhf_fast.stages.ranks import require_same_data
from rlhf_fast.stages.run import Run
from rlhf_fast.stages.saved_state import load_part, refusing
from rlhf_fast.stages.training import (
    TrainingState,
    load_stage_tokenizer,
    load_training_state,
    steps_of,
    train,
)

Config = TypeVar("Config", bound=SFTConfig | RewardModelConfig)


class SupervisedStage(ABC, Generic[Config]):
    """A subclass loads rows and module, calls `begin`, and says what a step is.

    On several ranks all of them hold all rows; forwards are dealt, sums and gradients added up.

    Attributes:
        budget: tokens of a forward of training.
        role: name of the module in checkpoints and messages.
        description: of the progress bar.
        shown: label beside the bar -> metric.
    """

    role: ClassVar[str]
    description: ClassVar[str]
    shown: ClassVar[Mapping[str, str]]

    def __init__(self, config: Config, run: Run, device: torch.device) -> None:
        self.config, self.run, self.device = config, run, device
        self.world = run.world if run.world.size > 1 else World(device)
        self.work = WorldSplit(self.world)
        self.budget = TokenBudget(config.microbatch_tokens)
        self.tokenizer = load_stage_tokenizer(config.model, config.data)

    def begin(
        self,
        module: nn.Module,
        metrics: MetricLogger,
        *,
        rows: int,
        fingerprints: Mapping[str, str],
    ) -> None:
        """Make sampler and optimizer, and put all to the run's checkpoint, if it has one.

        Args:
            module: what is trained, on its device.
            metrics: log of the run.
            rows: training rows.
            fingerprints: of all data by name; those of the `training` data make the run.

        Raises:
            DataError: RF2064, ranks read different data; RF2062, they changed since the checkpoint.
        """
        config, world = self.config, self.world
        require_same_data(world, **fingerprints)
        self.module = module
        self.sampler = EpochSampler(
            rows,
            config.batch_size,
            config.run.seed,
            drop_last=False,
            fingerprint=fingerprints["training"],
            setting="batch_size",
        )
        self.total_steps = steps_of(config.epochs, config.max_steps, self.sampler)
        self.optimizer = GuardedOptimizer(
            module,
            config.optim,
            self.total_steps,
            max_bad_steps=config.run.max_bad_steps,
            name=self.role,
            ranks=RankGradients.of(world),
        )
        self.state = TrainingState(
            {self.role: module},
            {self.role: self.optimizer},
            {"train": self.sampler},
            metrics,
            frozen=trunk_digest(module),
        )
        load_training_state(
            self.run.checkpoint,
            self.state,
            allow_data_change=config.run.allow_data_change,
            world=self.world,
        )
        if self.run.checkpoint is not None:
            self._load_extra(self.run.checkpoint, self.state.extra)

    def _load_extra(self, checkpoint: Checkpoint, extra: Mapping[str, Any]) -> None:
        """Check what the summary at the end reads, and load what the stage saved of its own."""
        with refusing(checkpoint, "losses"):
            if self.state.step > 0:
                float(extra["train_loss"])
            for value in extra.get("eval", {}).values():
                float(value)
        if "token_budget" in extra:  # not in those of before there was one
            load_part(checkpoint, self.budget, extra["token_budget"], "token_budget")

    def in_halves(self, accumulate: Callable[[], None], longest: int) -> None:
        """Accumulate gradients; with half the tokens in a forward if memory runs out on a rank.

        Args:
            accumulate: packs by `self.budget` and adds up gradients; no sums over ranks in it.
            longest: tokens of the longest of what is packed.
        """

        def start_anew() -> None:
            start_anew_of(self.module)
            self.optimizer.zero_grad()

        self.budget.in_halves(accumulate, self.work, longest=longest, start_anew=start_anew)
        self.state.extra["token_budget"] = self.budget.state_dict()

    def dealt(self, bins: Sequence[Sequence[int]], lengths: Sequence[int]) -> list[Share]:
        """This rank's forwards of all `bins`."""
        return share_of(bins, lengths, self.work.rank, self.work.ranks)

    @abstractmethod
    def step(self) -> dict[str, float]:
        """One optimizer step; returns its metrics."""

    @abstractmethod
    def evaluate(self, examples: Sequence[Any]) -> dict[str, float]:
        """Figures on held-out rows."""

    def held_out(self, examples: Sequence[Any], done: int) -> dict[str, float]:
        """Figures on held-out rows, kept for the summary as those after `done` steps."""
        with self.run.phase("evaluate"):
            figures = self.evaluate(examples)
        self.state.extra |= {"eval": figures, "eval_step": done}
        return figures

    def require_held_out(self, examples: Sequence[Any]) -> None:
        """Evaluate the weights as they are, unless the last step did: a run may end without one.

        It does so where its steps were done already: it was made shorter, or went back to its end.
        """
        if self.state.extra.get("eval_step") != self.state.step:
            self.held_out(examples, self.state.step)

    def train(self) -> None:
        """All steps that are left."""
        with remembering(self.run, self.budget):
            train(
                self.run,
                self.state,
                self.step,
                total_steps=self.total_steps,
                save_every=self.config.run.save_every,
                description=self.description,
                shown=self.shown,
            )

    def update(self) -> dict[str, float]:
        """Apply the accumulated gradients; returns the metrics of that."""
        with self.run.phase("optimizer"):
            lr = self.optimizer.lr
            result = self.optimizer.step()
        return {
            "lr": lr,
            "grad_norm": result.grad_norm,
            "skipped_steps": float(not result.applied),
        }
