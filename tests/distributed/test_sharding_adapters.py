"""Roles on one sharded trunk: they train as on a trunk in one process, and the trunk stays."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_fast.config_lora import ALL_LINEAR
from rlhf_fast.distributed.gradients import RankGradients
from rlhf_fast.distributed.sharding import shard_module
from rlhf_fast.distributed.world import World
from rlhf_fast.models.adapter_roles import AdapterActor, AdapterCritic, AdapterReference
from rlhf_fast.models.adapters import SharedTrunk
from rlhf_fast.models.forward import set_compute_dtype
from rlhf_fast.optim import GuardedOptimizer
from tests.distributed.ranks import on_ranks
from tests.distributed.sharded_training import OPTIM, TOLERANCE
from tests.models.tiny import build, next_token_targets, random_sequences

ROLES = {"actor": 0, "critic": 1, "reference": 2}


class _Roles:
    """Actor and critic with an optimizer each, and the reference."""

    def __init__(
        self,
        world: World,
        model_type: str,
        dtype: Any,
        *,
        sharded: bool,
        gradient_checkpointing: bool = True,
    ) -> None:
        module = build(model_type, seed=world.rank if sharded else 0)
        set_compute_dtype(module, dtype)
        self.trunk = SharedTrunk(module)
        shape = self.trunk.shape(3, 6.0, [ALL_LINEAR])
        for seed, name in enumerate(("actor", "critic")):
            self.trunk.add(name, shape, seed=seed, trainable=True)
        if dtype == "bfloat16":
            self.trunk.hold_in(torch.bfloat16)
        ranks = None
        if sharded:
            self.handle = shard_module(module, world, dtype=dtype)
            ranks = RankGradients.of(world)
        self.trunk.prepare(world.device, gradient_checkpointing=gradient_checkpointing)
        self.actor, self.critic = AdapterActor(self.trunk), AdapterCritic(self.trunk)
        self.reference = AdapterReference(self.trunk, None)
        self.optimizers = [
            GuardedOptimizer(role.module, OPTIM, 10, ranks=ranks)
            for role in (self.actor, self.critic)
        ]

    def losses(self, rank: int) -> list[Tensor]:
        """Of actor and critic on the tokens of one rank, and of the reference."""
        sequences = random_sequences([6, 3 + rank, 1], seed=rank)
        targets = next_token_targets(sequences)
        return [
            -self.actor.logprobs(sequences, targets)[0].sum() / 20,
            (self.critic.values(sequences) - 1).square().sum() / 20,
            self.reference.logprobs(sequences, targets)[0].sum(),
        ]

    def adapters(self) -> dict[str, Tensor]:
        """All numbers that are trained."""
        return {
            f"{role.name}.{name}": p.detach()
            for role in (self.actor.adapted, self.critic.adapted)
            for name, p in role.named_parameters()
        }


def _train(world: World, model_type: str, dtype: str) -> list[str]:
    ours = _Roles(world, model_type, dtype, sharded=True)
    theirs = _Roles(world, model_type, dtype, sharded=False)
    base = {n: ours.handle.local(n).clone() for n in ours.handle.cuts if ".lora_" not in n}
    faults = []
    for step in range(2):
        losses = ours.losses(world.rank)
        (losses[0] + losses[1]).backward()
        expected = [theirs.losses(rank) for rank in range(world.size)]
        torch.stack([e[0] + e[1] for e in expected]).sum().backward()
        for role, loss in zip(("actor", "critic", "reference"), losses, strict=True):
            total = world.sum(loss.detach().clone())
            wanted = torch.stack([e[ROLES[role]] for e in expected]).sum()
            if not torch.allclose(total, wanted.detach(), **TOLERANCE):
                faults.append(f"step {step}, loss of the {role}: {total} instead of {wanted}")
        norms = [optimizer.step().grad_norm for optimizer in ours.optimizers]
        wanted_norms = [optimizer.step().grad_norm for optimizer in theirs.optimizers]
        if norms != pytest.approx(wanted_norms, rel=2e-5):
            faults.append(f"step {step}, norms {norms} instead of {wanted_norms}")
    twins = theirs.adapters()
    for name, value in ours.adapters().items():
        if not torch.allclose(value, twins[name], rtol=1e-4, atol=1e-4):
            faults.append(f"{name}: {(value - twins[name]).abs().max():.2e}")
    faults += [n for n, value in base.items() if not torch.equal(ours.handle.local(n), value)]
    return faults


def _run(world: World, cases: list[tuple[str, str]]) -> dict[str, list[str]]:
    return {model_type: _train(world, model_type, dtype) for model_type, dtype in cases}


@pytest.mark.parametrize(
    ("ranks", "replicas", "cases"),
    [(2, 1, [("llama", "float32"), ("gpt2", "float32")]), (4, 2, [("qwen2", "bfloat16")])],
)
def test_adapters_on_a_sharded_trunk(
    ranks: int, replicas: int, cases: list[tuple[str, str]]
) -> None:
    for found in on_ranks(ranks, _run, cases, replicas=replicas):
        assert found == {model_type: [] for model_type, _ in cases}


def _recomputed(world: World, dtype: str) -> list[str]:
    """Gradients of two microbatches, with activations kept and with them computed again."""
    found, forwards = [], []
    for checkpointing in (False, True):
        roles = _Roles(world, "llama", dtype, sharded=True, gradient_checkpointing=checkpointing)
        calls: list[int] = []
        trunk: Any = roles.trunk.model
        block = trunk.base_model.layers[0].self_attn  # not the last part, which is cut short
        block.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        for microbatch in range(2):
            actor, critic, _ = roles.losses(world.rank + microbatch)
            actor.backward()
            critic.backward()
        forwards.append(len(calls))
        for optimizer in roles.optimizers:
            ranks, shards = optimizer._ranks, list(optimizer.parameters)
            assert ranks is not None
            ranks.gather(optimizer._whole, [*shards])
        found.append(
            {
                f"{optimizer.name} {name}": p.grad
                for optimizer in roles.optimizers
                for name, p in optimizer.named_parameters
            }
        )
    kept, recomputed = found
    faults = [] if forwards == [6, 10] else [f"{forwards} forwards of a block"]
    assert kept.keys() == recomputed.keys()
    assert any(grad is not None and grad.any() for grad in kept.values())
    for name, grad in kept.items():
        other = recomputed[name]
        assert grad is not None
        assert other is not None
        if not torch.equal(grad, other):
            faults.append(f"{name}: {(grad - other).abs().max():.2e}")
    return faults


@pytest.mark.parametrize(("ranks", "replicas", "dtype"), [(2, 1, "float32"), (4, 2, "bfloat16")])
def test_activations_computed_again_give_the_same_gradients(
    ranks: int, replicas: int, dtype: str
) -> None:
    assert on_ranks(ranks, _recomputed, dtype, replicas=replicas) == [[]] * ranks
