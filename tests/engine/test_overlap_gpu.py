"""Scoring on a stream of its own: same numbers, and the host does not wait while it asks."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from rlhf_fast.models.forward import set_compute_dtype
from rlhf_fast.ppo.scoring import EarlyScores
from rlhf_fast.types import Rollout
from tests.ppo.test_scoring import (
    assert_same,
    config_for,
    learner,
    model_reward,
    prompts,
    scored_by,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def on_device(overlap: str, dtype: str):
    reward = model_reward()
    modules = [reward.reward_model.module]
    ppo = learner(config_for(overlap), reward=reward, device="cuda", dtype=dtype)
    roles = ppo.roles
    modules += [roles.reference.module, roles.critic.module]
    for module in modules:
        set_compute_dtype(module.cuda(), dtype)
    return ppo


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_stream_of_its_own_changes_nothing(dtype: str) -> None:
    after, none = scored_by(on_device("off", dtype))
    inside, early = scored_by(on_device("auto", dtype))
    assert none == []
    assert early
    if dtype == "float32":
        assert_same(inside, after)
    else:
        torch.testing.assert_close(inside.ref_logprobs, after.ref_logprobs, rtol=0.05, atol=0.05)
        torch.testing.assert_close(inside.values, after.values, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_host_does_not_wait_while_a_pack_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    score = EarlyScores.score
    calls = []

    def watched(self: EarlyScores, samples: Sequence[int], rollout: Rollout) -> None:
        torch.cuda.set_sync_debug_mode("error")
        try:
            score(self, samples, rollout)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        calls.append(samples)

    ppo = on_device("auto", dtype)
    ppo.score(ppo.generate(prompts()))  # kernels are chosen, pinned memory is there
    monkeypatch.setattr(EarlyScores, "score", watched)
    ppo.score(ppo.generate(prompts()))
    assert calls
