"""Every family with a fused forward, cut as training cuts it: the tokens of one process."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from rlhf_fast.config import OptimConfig
from rlhf_fast.distributed.gradients import RankGradients
from rlhf_fast.distributed.sharding import shard_module
from rlhf_fast.distributed.world import World
from rlhf_fast.engine.twin import twin_of
from rlhf_fast.engine.view_choice import choose_view
from rlhf_fast.optim import GuardedOptimizer
from tests.distributed.ranks import on_ranks
from tests.engine.architectures import tiny
from tests.engine.test_sharded_views import _engine, assert_same, drawn_by, engine_over

FAMILIES = ("qwen2", "qwen3", "mistral")


def _trained_and_generated(
    world: World, family: str, tied: bool, wish: str, kv_heads: int
) -> tuple[str, str]:
    """One step of training in shards, then tokens from them; returns the view and its reason."""
    module: Any = tiny(family, num_key_value_heads=kv_heads, tie_word_embeddings=tied)
    head, embedding = module.get_output_embeddings(), module.get_input_embeddings()
    assert (head.weight is embedding.weight) == tied
    whole: nn.Module = copy.deepcopy(module)
    before = drawn_by(_engine(whole))
    twin = twin_of(module)
    handle = shard_module(module, world, dtype="float32")
    view = choose_view(module, twin, world, wish)
    engine = engine_over(view)
    assert_same(drawn_by(engine), before)
    optimizer = GuardedOptimizer(
        *(module, OptimConfig(lr=1e-2, schedule="constant"), 9), ranks=RankGradients.of(world)
    )
    logits = module(input_ids=torch.arange(3, 8)[None] + world.rank).logits
    logits.float().logsumexp(-1).sum().backward()
    optimizer.step()
    with torch.no_grad():
        for name, parameter in whole.named_parameters():
            parameter.copy_(handle.gather_full(name))
    after = drawn_by(_engine(whole))
    # Of every sampler, greedy among them.
    assert not torch.equal(after.raw_logprobs, before.raw_logprobs)
    assert_same(drawn_by(engine), after)
    return view.name, view.reason


def _families(world: World) -> dict[str, tuple[str, str]]:
    cases = [(f, tied, wish, 4) for f in FAMILIES for tied in (False, True) for wish in VIEWS]
    cases.append(("qwen2", False, "auto", 1))
    return {str(case): _trained_and_generated(world, *case) for case in cases}


VIEWS = ("tp", "gather")


def test_shards_of_training_generate_the_tokens_of_one_process_in_every_family() -> None:
    for facts in on_ranks(2, _families):
        assert len(facts) == 13
        *named, (_, fallback) = facts.items()
        for case, (view, _) in named:
            assert f"'{view}'" in case
        view, reason = fallback
        assert view == "gather"
        assert reason.endswith("1 key/value heads do not divide into 2 shards")
