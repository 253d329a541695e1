"""Sharded models train as single-process models do, and their shards are what they say."""

from __future__ import annotations

from typing import Any

import pytest

from rlhf_fast.distributed.sharding import shard_module
from rlhf_fast.distributed.world import World
from rlhf_fast.models.dropout import disable_dropout
from tests.distributed.ranks import on_ranks
from tests.distributed.sharded_training import (
    Twins,
    addresses,
    check_layout,
    policy_loss,
    value_loss,
)
from tests.models.tiny import build, build_classifier

_FOUR = {"num_key_value_heads": 4}
# name -> (architecture, what differs from the tiny one)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {**_FOUR, "attention_bias": True}),
    "few key/value heads": ("llama", {"num_hidden_layers": 1}),
    "tied, biases": ("qwen2", {**_FOUR, "tie_word_embeddings": True}),
    "norms of q and k": ("qwen3", _FOUR),
    "window": ("mistral", {**_FOUR, "sliding_window": 3}),
    "positions": ("gpt2", {}),
    "fused and uneven": ("gpt_neox", {"hidden_size": 20, "intermediate_size": 27}),
    "padded": ("opt", {}),
    "scaled embedding": ("gemma3_text", {"head_dim": 8, "query_pre_attn_scalar": 8}),
    "experts": ("qwen2_moe", {}),
}
UNSLICED = {"positions", "fused and uneven", "padded", "scaled embedding", "experts"}


def _train(world: World, names: list[str]) -> dict[str, Any]:
    found = {}
    for name in [*names, "classifier"]:
        model_type, changes = MODELS.get(name, ("llama", _FOUR))
        maker = build_classifier if name == "classifier" else build
        loss = value_loss if name == "classifier" else policy_loss
        # Rank 0's numbers are everybody's.
        sharded = maker(model_type, seed=world.rank, **changes)
        single = maker(model_type, seed=0, **changes)
        for module in (sharded, single):
            disable_dropout(module)
        handle = shard_module(sharded, world, dtype="float32")
        twins = Twins(world, handle, single, loss)
        twins.faults += check_layout(handle, single)
        before = addresses(sharded)
        twins.backward()
        twins.compare_gradients()
        for _ in range(3):
            twins.backward()
            twins.step()
        twins.compare_weights()
        if addresses(sharded) != before:
            twins.faults.append("a shard has moved")
        found[name] = (
            twins.faults,
            handle.why_not_tensor_parallel,
            handle.why_not_vocabulary_parallel,
        )
    return found


@pytest.mark.parametrize(
    ("ranks", "replicas", "names"),
    [
        (2, 2, ["tied, biases"]),
        (2, 1, ["llama", "window", "norms of q and k", "padded", "fused and uneven"]),
        (4, 1, ["few key/value heads", "tied, biases", "scaled embedding"]),
        (4, 2, ["tied, biases", "positions", "experts", "fused and uneven"]),
    ],
)
def test_training_follows_the_single_process(ranks: int, replicas: int, names: list[str]) -> None:
    shards = ranks // replicas
    for found in on_ranks(ranks, _train, names, replicas=replicas):
        for name, (faults, unsliced, unparallel) in found.items():
            assert faults == [], name
            few = name == "few key/value heads" and shards == 4
            assert (unsliced is not None) == (few or name in UNSLICED), (name, unsliced)
            assert not few or unsliced == "2 key/value heads cannot be dealt to 4 ranks"
            assert (unparallel is not None) == (name == "scaled embedding"), name
