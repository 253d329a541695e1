"""What can be switched on in the training of a sharded model, and what can go wrong in it."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_fast.distributed.gradients import RankGradients
from rlhf_fast.distributed.placement import blocks_to_shard
from rlhf_fast.distributed.sharding import ShardedModule, shard_module
from rlhf_fast.distributed.world import World
from rlhf_fast.engine.memory_held import held_bytes
from rlhf_fast.errors import ConfigError, ModelError, NumericalError
from rlhf_fast.models.forward import enable_gradient_checkpointing, set_compute_dtype
from rlhf_fast.models.meta import meta_model
from rlhf_fast.optim import GuardedOptimizer
from tests.distributed.ranks import on_ranks
from tests.distributed.sharded_training import OPTIM, Twins, addresses, policy_loss
from tests.models.tiny import build, tiny_config

# Shards of the matrices are large enough for 8-bit moments.
_WIDE = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1}


def _twins(world: World, *, dtype: Any = "float32", **settings: Any) -> Twins:
    changes = settings.pop("changes", {})
    sharded, single = build(**changes), build(**changes)
    for module in (sharded, single):
        set_compute_dtype(module, dtype)
    return Twins(world, shard_module(sharded, world, dtype=dtype), single, policy_loss, **settings)


def _steps(twins: Twins, steps: int) -> None:
    for _ in range(steps):
        twins.backward()
        twins.step()
    twins.compare_weights()


def _bf16(world: World) -> list[str]:
    twins = _twins(world, dtype="bfloat16")
    gathered = set()
    layer = twins.handle.module.model.layers[0].mlp.up_proj
    layer.register_forward_hook(lambda part, *_: gathered.add(part.weight.dtype))
    twins.backward()
    twins.compare_gradients()
    assert gathered == {torch.bfloat16}
    _steps(twins, 2)
    masters = [twins.handle.local(name) for name in twins.handle.cuts]
    assert all(master.dtype == torch.float32 for master in masters)
    assert not all(torch.equal(master, master.bfloat16().float()) for master in masters)
    return twins.faults


def _checkpointing(world: World) -> list[str]:
    twins = _twins(world, dtype="bfloat16")
    enable_gradient_checkpointing(twins.handle.module)
    calls = []
    layer = twins.handle.module.model.layers[0].self_attn
    layer.register_forward_hook(lambda *_: calls.append(1))
    twins.backward()
    assert len(calls) == 2
    twins.compare_gradients()
    return twins.faults


def _microbatches(world: World) -> list[str]:
    twins = _twins(world)
    for _ in range(3):
        twins.backward()
    twins.compare_gradients()
    return twins.faults


def _not_finite(world: World) -> list[str]:
    twins = _twins(world)
    before = {name: twins.handle.local(name).clone() for name in twins.handle.cuts}
    for step in range(3):
        loss = policy_loss(twins.handle.module, world.rank)
        (loss * (math.nan if world.rank == 1 else 1.0)).backward()
        if step == 2:
            with pytest.raises(NumericalError, match="RF6001"):
                twins.ours.step()
        else:
            assert not twins.ours.step().applied
    for name, value in before.items():
        assert torch.equal(twins.handle.local(name), value)
    _steps(twins, 1)
    return twins.faults


def _eight_bits(world: World) -> list[str]:
    # A first step reads moments before they are rounded: it is that of 32 bits.
    twins = _twins(world, changes=_WIDE, bits=8)
    _steps(twins, 1)
    codes = [t for _, t, _ in twins.ours.state_tensors() if t.dtype == torch.uint8]
    assert len(codes) > 4
    return twins.faults


def _offloaded(world: World) -> list[str]:
    twins = _twins(world)
    _steps(twins, 1)
    twins.ours.offload_state()
    assert all(away for _, t, away in twins.ours.state_tensors() if t.dim())
    with pytest.raises(RuntimeError, match="offloaded"):
        twins.ours.step()
    twins.ours.restore_state()
    _steps(twins, 2)
    return twins.faults


def _meta(world: World) -> list[str]:
    config = tiny_config("qwen2", tie_word_embeddings=True)
    single = build("qwen2", tie_word_embeddings=True)
    main = build("qwen2", tie_word_embeddings=True)
    other = meta_model(config, dtype="float32")
    handle = shard_module(other if world.rank else main, world, dtype="float32")
    assert not any(t.is_meta for t in [*handle.module.parameters(), *handle.module.buffers()])
    twins = Twins(world, handle, single, policy_loss)
    _steps(twins, 1)
    return twins.faults


def _reset(world: World) -> list[str]:
    twins = _twins(world)
    before = addresses(twins.handle.module)

    def fail(module: Any, inputs: Any, output: Tensor) -> None:
        raise MemoryError

    layer = twins.handle.module.model.layers[1].mlp
    hook = layer.register_forward_hook(fail)
    with pytest.raises(MemoryError):
        policy_loss(twins.handle.module, world.rank)
    hook.remove()
    hook = layer.down_proj.register_full_backward_hook(fail)
    loss = policy_loss(twins.handle.module, world.rank)
    with pytest.raises(MemoryError):
        loss.backward()
    hook.remove()
    del loss
    twins.handle.reset()
    _steps(twins, 1)
    assert addresses(twins.handle.module) == before
    return twins.faults


def _scores(world: World) -> list[str]:
    twins = _twins(world)
    twins.handle.module.requires_grad_(False)
    _compare_losses(twins)
    twins.handle.module.requires_grad_(True)
    twins.backward()
    # What is gathered for scores is not what the next step leaves behind.
    _compare_losses(twins)
    twins.step()
    _compare_losses(twins)
    return twins.faults


def _compare_losses(twins: Twins) -> None:
    with torch.no_grad():
        loss, single = (
            policy_loss(module, twins.world.rank) for module in (twins.handle.module, twins.single)
        )
    twins.compare("loss", loss, single)


def _memory(world: World) -> list[str]:
    twins = _twins(world)
    _steps(twins, 1)
    twins.backward()
    actor: Any = SimpleNamespace(module=twins.handle.module)
    roles: Any = SimpleNamespace(
        actor=actor,
        critic=None,
        reference=None,
        reward=None,
        generator=None,
        actor_optimizer=twins.ours,
        critic_optimizer=None,
    )
    found = {slot.part: n for slot, n in held_bytes(roles).items() if slot.role == "actor"}
    held = sum(twins.handle.local(name).nbytes for name in twins.handle.cuts)
    buffers = sum(b.nbytes for b in twins.handle.module.buffers())
    assert found["weights"] == twins.handle.held_bytes + buffers
    # The rows of the head come out of runs of one length.
    assert held <= found["gradients"] <= held + 4 * 16
    steps = 4 * len(twins.ours.named_parameters)
    assert found["moments"] == 2 * held + steps
    return twins.faults


def _moved(world: World) -> list[str]:
    handle = shard_module(build(), world, dtype="float32")
    before = addresses(handle.module)
    handle.module.to(torch.device("cpu")).train().eval()
    saved = {name: value.clone() for name, value in handle.module.state_dict().items()}
    handle.module.load_state_dict(saved)
    with pytest.raises(ModelError, match="RF3081"):
        shard_module(handle.module, world, dtype="float32")
    with pytest.raises(ConfigError, match="RF1060"):
        GuardedOptimizer(handle.module, OPTIM, 10, in_backward=True, ranks=RankGradients.of(world))
    q, k, v = (f"model.layers.0.self_attn.{name}_proj.weight" for name in "qkv")
    assert (joined := handle.adjacent([q, k, v])) is not None
    assert torch.equal(joined, torch.cat([handle.local(name) for name in (q, k, v)]))
    assert handle.adjacent([q, v]) is None
    return [] if addresses(handle.module) == before else ["moved"]


ALL = [
    _bf16,
    _checkpointing,
    _microbatches,
    _not_finite,
    _eight_bits,
    _offloaded,
    _meta,
    _reset,
    _scores,
    _memory,
    _moved,
]


def _run(world: World, modes: list[Callable[[World], list[str]]]) -> dict[str, list[str]]:
    return {mode.__name__: mode(world) for mode in modes}


@pytest.mark.parametrize(
    ("ranks", "replicas", "modes"), [(2, 1, ALL), (4, 2, [_microbatches, _not_finite, _meta])]
)
def test_modes_of_training(ranks: int, replicas: int, modes: list[Any]) -> None:
    for found in on_ranks(ranks, _run, modes, replicas=replicas):
        assert found == {mode.__name__: [] for mode in modes}


def test_layers_that_share_weights_are_refused() -> None:
    module = build()
    module.model.layers[1] = module.model.layers[0]
    with pytest.raises(ModelError, match=r"RF3080[\s\S]*share weights"):
        blocks_to_shard(module)
    del module.model.layers
    with pytest.raises(ModelError, match=r"RF3080[\s\S]*no list"):
        blocks_to_shard(module)


def test_one_rank_leaves_the_model_as_it_is() -> None:
    module = build()
    before = addresses(module)
    world = World(torch.device("cpu"))
    handle: ShardedModule = shard_module(module, world, dtype="float32")
    assert addresses(handle.module) == before
    assert handle.module is module
    assert RankGradients.of(world) is None
    name = "model.embed_tokens.weight"
    assert handle.local(name).data_ptr() == handle.gather_full(name).data_ptr() == before[name]
    assert (handle.embedding, handle.head, handle.blocks, handle.cuts) == (None, None, (), {})
