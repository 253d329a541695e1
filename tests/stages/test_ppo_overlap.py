"""PPO runs that score during generation, or take the generator's log-probs as anchors."""

import dataclasses
import os
import signal

import pytest

from rlhf_fast.config import AlgorithmConfig, EngineConfig, LoraConfig, MemoryConfig, RolloutConfig
from rlhf_fast.errors import Interrupted
from rlhf_fast.metrics import read_metrics
from rlhf_fast.ppo.scoring import EarlyScores
from tests.stages.test_ppo import judge, settings, tokenizer, trainer, without_times

__all__ = ["tokenizer"]

# Waves of 3, 3 and 1 samples: 6 are finished while the last one is drawn.
WAVES = RolloutConfig(prompts=7, max_batch=3)


def waves(folder, overlap, **changes):
    config = settings(
        folder,
        rollout=WAVES,
        engine=EngineConfig(overlap_scoring=overlap),
        algorithm=AlgorithmConfig(ppo_epochs=2),
        microbatch_tokens=40,
        total_steps=2,
    )
    run = dataclasses.replace(config.run, dtype=changes.pop("dtype", "float32"))
    return dataclasses.replace(config, run=run, **changes)


MODES = {
    "full": {},
    "lora": {"lora": LoraConfig(rank=4, alpha=8.0)},
    "offloaded": {
        "memory": MemoryConfig(
            reference="offload", reward_model="offload", optimizer_state="offload"
        )
    },
    "bfloat16": {"dtype": "bfloat16"},
    "checkpointing": {"gradient_checkpointing": True},
    "lora, checkpointing": {
        "lora": LoraConfig(rank=4, alpha=8.0),
        "gradient_checkpointing": True,
    },
}


@pytest.mark.parametrize("mode", MODES)
def test_runs_with_and_without_overlap_agree(tmp_path, tokenizer, monkeypatch, mode):
    packs = []
    score = EarlyScores.score

    def counted(self, samples, rollout):
        packs.append(samples)
        score(self, samples, rollout)

    monkeypatch.setattr(EarlyScores, "score", counted)
    for overlap in ("off", "on"):
        folder = tmp_path / overlap
        more = {}
        if mode == "offloaded":
            more = {"reward_model": judge(tokenizer, tmp_path / "judge"), "reward_function": None}
        trainer(folder, tokenizer, waves(folder, overlap, **MODES[mode]), **more).train()
        assert bool(packs) == (overlap == "on")
    off, on = (without_times(tmp_path / overlap) for overlap in ("off", "on"))
    loose = mode == "bfloat16"
    for one, other in zip(off, on, strict=True):
        for name in ("objective/scores", "objective/kl", "rollout/length", "loss/value_avg"):
            assert other[name] == pytest.approx(
                one[name], rel=5e-2 if loose else 1e-3, abs=5e-2 if loose else 1e-5
            )


def test_anchors_of_the_generator_train_and_are_measured(tmp_path, tokenizer):
    algorithm = AlgorithmConfig(ppo_epochs=2, old_logprobs="rollout", rollout_correction=2.0)
    rollout = RolloutConfig(prompts=16)
    ppo = trainer(tmp_path, tokenizer, settings(tmp_path, algorithm=algorithm, rollout=rollout))
    ppo.train()
    for row in read_metrics(tmp_path / "metrics.jsonl"):
        assert row["rollout/recomputed_fraction"] == 0.5
        assert row["rollout/logprob_k3"] < 1e-9
        assert 0 < row["rollout/logprob_gap"] < 1e-4
        assert row["val/first_ratio_gap"] < 1e-3


def test_an_interrupted_run_resumes_to_the_same_bits(tmp_path, tokenizer):
    rules = AlgorithmConfig(ppo_epochs=2, old_logprobs="rollout", rollout_correction=2.0)

    def config(folder):
        return dataclasses.replace(waves(folder, "on"), algorithm=rules, total_steps=3)

    def interrupt(step, output):
        if step == 1:
            os.kill(os.getpid(), signal.SIGINT)

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    trainer(whole, tokenizer, config(whole)).train()
    with pytest.raises(Interrupted):
        trainer(parts, tokenizer, config(parts), on_step=interrupt).train()
    trainer(parts, tokenizer, config(parts)).train()
    assert without_times(parts) == without_times(whole)
    assert (parts / "model" / "model.safetensors").read_bytes() == (
        whole / "model" / "model.safetensors"
    ).read_bytes()
    assert all(row["rollout/early_scored_fraction"] > 0 for row in without_times(whole))
