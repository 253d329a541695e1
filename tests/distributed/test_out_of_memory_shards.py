"""Memory that runs out on all ranks in the middle of a backward through cut layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor

from rlhf_fast.config import (
    AlgorithmConfig,
    LoraConfig,
    OptimConfig,
    PPOConfig,
    RolloutConfig,
    RunConfig,
    SamplingConfig,
)
from rlhf_fast.config_distributed import DistributedConfig
from rlhf_fast.data import collate_prompts
from rlhf_fast.distributed.world import World
from rlhf_fast.stages.ppo import PPOTrainer
from tests.distributed.ranks import on_ranks
from tests.models.tiny import build, build_classifier, tokenizer
from tests.stages.tiny_runs import demonstrations

BUDGET = 48
STEPS = 2
# name -> ranks, replicas, whose backward it is, LoRA, activations computed again
CASES: dict[str, tuple[int, int, str, bool, bool]] = {
    "actor": (2, 1, "actor", False, False),
    "critic, recomputed": (2, 1, "critic", False, True),
    "adapters": (2, 1, "actor", True, False),
    "mesh of 2 x 2": (4, 2, "actor", False, True),
}


def trainer_of(world: World, folder: str, name: str) -> PPOTrainer:
    ranks, replicas, _, lora, recomputed = CASES[name]
    config = PPOConfig(
        run=RunConfig(output_dir=folder, device="cpu"),
        rollout=RolloutConfig(prompts=8 * ranks, samples_per_prompt=2),
        sampling=SamplingConfig(max_new_tokens=6),
        algorithm=AlgorithmConfig(ppo_epochs=1, minibatches=2),
        actor_optim=OptimConfig(lr=1e-2),
        critic_optim=OptimConfig(lr=1e-2),
        lora=LoraConfig(rank=4 if lora else 0),
        distributed=DistributedConfig(replicas=replicas),
        gradient_checkpointing=recomputed,
        total_steps=STEPS,
        microbatch_tokens=BUDGET,
    )
    models = {"critic": build_classifier(num_key_value_heads=4, seed=1)} if not lora else {}
    return PPOTrainer(
        config,
        model=build(num_key_value_heads=4),
        tokenizer=tokenizer(),
        reward_function=lambda completions, **_: [float(len(text)) for text in completions],
        train_dataset=[{"prompt": row["prompt"]} for row in demonstrations(32)],
        quiet=True,
        world=world,
        **models,
    )


def runs_out(module: Any, calls: list[int]) -> None:
    """Backward of the first block raises once: in the second microbatch of the first minibatch."""

    def fail(*_: Any) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("in the middle of a backward")

    module.base_model.layers[0].mlp.down_proj.register_full_backward_hook(fail)


class _Halving:
    """`with phase("update"):` begins with half the tokens."""

    def __init__(self, trainer: PPOTrainer) -> None:
        self.learner = trainer.learner

    def __call__(self, name: str) -> _Halving:
        if name == "update":
            self.learner.budget.tokens = BUDGET // 2
        return self

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


def _trained(world: World, folder: str, name: str) -> list[str]:
    ends, redone = [], []
    for exhausted in (False, True):
        trainer = trainer_of(world, folder, name)
        roles: Any = trainer.roles
        calls: list[int] = []
        if exhausted:
            role = getattr(roles, CASES[name][2])
            runs_out(role.trunk.model if CASES[name][3] else role.module, calls)
        else:
            trainer.learner.phase = _Halving(trainer)
        for _ in range(STEPS):
            batch = collate_prompts([trainer.data[i] for i in trainer.sampler.next_batch()])
            metrics = trainer.learner.step(batch).metrics
            redone.append(metrics["policy/redone_minibatches"])
            assert trainer.learner.budget.tokens == BUDGET // 2
        assert exhausted == (len(calls) > 2)
        optimizers = [roles.actor_optimizer, roles.critic_optimizer]
        ends.append(
            {
                f"{optimizer.name} {key}": held.detach().clone()
                for optimizer in optimizers
                for key, held in optimizer.named_parameters
            }
        )
        trunk = roles.actor.trunk.model if CASES[name][3] else roles.actor.module
        assert any(isinstance(p, DTensor) for p in trunk.parameters())
    assert redone == [0.0, 0.0, 1.0, 0.0]
    assert ends[0].keys() == ends[1].keys()
    return [key for key, held in ends[0].items() if not torch.equal(held, ends[1][key])]


@pytest.mark.parametrize("name", CASES)
def test_the_step_is_done_again_with_half_the_tokens(tmp_path: Path, name: str) -> None:
    ranks, replicas, *_ = CASES[name]
    found = on_ranks(ranks, _trained, str(tmp_path), name, replicas=replicas)
    assert found == [[]] * ranks
