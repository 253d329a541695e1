"""SFT, reward model and PPO, each with adapters on the same base model."""

import dataclasses
import json

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rlhf_fast.config import (
    AdapterConfig,
    DataConfig,
    LoraConfig,
    OptimConfig,
    PPOConfig,
    RewardConfig,
    RewardModelConfig,
    RolloutConfig,
    RunConfig,
    SamplingConfig,
    SFTConfig,
)
from rlhf_fast.config_rules import violations
from rlhf_fast.errors import CheckpointError, ModelError, Preempted
from rlhf_fast.metrics import read_metrics
from rlhf_fast.models.directory import sha256
from rlhf_fast.models.loading import load_sequence_classifier
from rlhf_fast.models.roles import RewardModel
from rlhf_fast.stages.check import check_stage
from rlhf_fast.stages.ppo import PPOTrainer
from rlhf_fast.stages.reward_model import run_reward_model
from rlhf_fast.stages.sft import run_sft
from rlhf_fast.types import PackedSequences
from tests.stages.tiny_runs import (
    as_pairs,
    checkpoint_contents,
    demonstrations,
    metric_lines,
    model_directory,
    ranked,
    stop_after,
    write_rows,
)

LORA = AdapterConfig(rank=4, alpha=16.0)


@pytest.fixture
def base(tmp_path):
    return model_directory(tmp_path / "base")


def common(tmp_path, name, rows):
    return {
        "run": RunConfig(output_dir=str(tmp_path / name), device="cpu", save_every=2),
        "data": DataConfig(train=str(rows), max_prompt_length=24, max_length=48),
        "batch_size": 8,
        "microbatch_tokens": 512,
        "optim": OptimConfig(lr=1e-2),
    }


def sft(tmp_path, base, name="sft", **changes):
    rows = write_rows(tmp_path / "demonstrations.jsonl", demonstrations(48))
    given = {**common(tmp_path, name, rows), "lora": LORA, "max_steps": 12, **changes}
    return SFTConfig(model=str(base), **given)


def judge(tmp_path, base, name="rm", **changes):
    rows = write_rows(tmp_path / "pairs.jsonl", as_pairs(ranked(48, 2)))
    given = {**common(tmp_path, name, rows), "lora": LORA, "max_steps": 12, **changes}
    return RewardModelConfig(model=str(base), **given)


def test_the_three_stages_train_adapters_on_one_base(tmp_path, base):
    digest = sha256(base / "model.safetensors")
    policy = run_sft(sft(tmp_path, base), quiet=True)
    losses = [row["loss/train"] for row in read_metrics(tmp_path / "sft" / "metrics.jsonl")]
    assert losses[-1] < losses[0] - 0.3
    model = run_reward_model(judge(tmp_path, base), quiet=True)
    assert model.accuracy is not None
    assert model.accuracy > 0.7
    prompts = write_rows(
        tmp_path / "prompts.jsonl", [{"prompt": row["prompt"]} for row in demonstrations(16)]
    )
    config = PPOConfig(
        actor=str(base),
        run=RunConfig(output_dir=str(tmp_path / "ppo"), device="cpu"),
        data=DataConfig(train=str(prompts), max_prompt_length=24, max_length=48),
        rollout=RolloutConfig(prompts=8),
        sampling=SamplingConfig(max_new_tokens=6),
        reward=RewardConfig(missing_eos="none"),
        lora=LoraConfig(rank=4, actor_adapter=policy.model_dir, reward_adapter=model.model_dir),
        total_steps=2,
        microbatch_tokens=512,
    )
    ppo = PPOTrainer(config, quiet=True)
    sequences = PackedSequences.from_lists([[5, 6, 7], [9, 4, 4, 4, 2]])
    scores = ppo.roles.reward.reward_model.score_sequences(sequences)
    torch.testing.assert_close(ppo.roles.critic.values(sequences)[[2, 7]].detach(), scores)
    assert scores.std() > 0
    ppo.train()
    assert sha256(base / "model.safetensors") == digest


def test_an_sft_adapter_is_the_policy_that_was_evaluated(tmp_path, base):
    rows = demonstrations(8, seed=3)
    data = dataclasses.replace(
        sft(tmp_path, base).data, eval=str(write_rows(tmp_path / "eval.jsonl", rows))
    )
    result = run_sft(sft(tmp_path, base, data=data), quiet=True)
    loaded = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base), result.model_dir
    ).eval()
    bare = AutoModelForCausalLM.from_pretrained(base).eval()
    losses = []
    for model in (loaded, bare):
        total, count = 0.0, 0
        for row in rows:
            prompt = [int(word[1:]) for word in row["prompt"].split()]
            ids = [*prompt, *(int(word[1:]) for word in row["completion"].split()), 2]
            with torch.no_grad():
                logprobs = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
            for i in range(len(prompt), len(ids)):
                total -= float(logprobs[i - 1, ids[i]])
                count += 1
        losses.append(total / count)
    assert result.eval_loss == pytest.approx(losses[0], rel=1e-4)
    assert losses[0] < losses[1]


def test_a_merged_reward_model_scores_as_its_adapter_does(tmp_path, base):
    lora = dataclasses.replace(LORA, merge_on_export=True)
    result = run_reward_model(judge(tmp_path, base, lora=lora), quiet=True)
    merged = load_sequence_classifier(result.model_dir, init_head=False, dtype="float32")
    ids = [5, 9, 4, 4, 8]
    score = RewardModel(merged).score_sequences(PackedSequences.from_lists([ids]))
    stock = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    by_peft = peft.PeftModel.from_pretrained(stock, tmp_path / "rm" / "adapter").eval()
    with torch.no_grad():
        raw = by_peft(input_ids=torch.tensor([ids])).logits[0]
    torch.testing.assert_close(score, result.gain * raw + result.bias, rtol=1e-4, atol=1e-4)
    record = json.loads((tmp_path / "rm" / "adapter" / "rlhf_fast_adapter.json").read_text())
    assert record["calibration"] == {"gain": result.gain, "bias": result.bias}


@pytest.mark.parametrize(("stage", "make"), [(run_sft, sft), (run_reward_model, judge)])
def test_a_stopped_stage_resumes_to_the_same_bits_on_the_same_base(
    tmp_path, base, monkeypatch, stage, make
):
    whole = make(tmp_path, base, name="whole", max_steps=4)
    stage(whole, quiet=True)
    parts = make(tmp_path, base, name="parts", max_steps=4)
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        with pytest.raises(Preempted):
            stage(parts, quiet=True)
    tensors, _ = checkpoint_contents(tmp_path / "parts")
    assert sum(t.numel() for t in next(iter(tensors.values())).values()) < 3000
    kept = (base / "model.safetensors").read_bytes()
    model_directory(base, seed=4)
    with pytest.raises(CheckpointError, match="RF8008"):
        stage(parts, quiet=True)
    (base / "model.safetensors").write_bytes(kept)
    stage(parts, quiet=True)
    assert metric_lines(tmp_path / "parts") == metric_lines(tmp_path / "whole")
    first, second = (
        (tmp_path / name / "model" / "adapter_model.safetensors").read_bytes()
        for name in ("whole", "parts")
    )
    assert first == second


def test_checks_and_faults_of_the_section(tmp_path, base):
    assert "adapter: rank 4 on 14 layers" in check_stage(sft(tmp_path, base))
    assert "adapter: rank 4 on 14 layers" in check_stage(judge(tmp_path, base))
    unknown = dataclasses.replace(LORA, targets=["c_attn"])
    for stage in (sft, judge):
        with pytest.raises(ModelError, match="RF3063"):
            check_stage(stage(tmp_path, base, lora=unknown))
        faults = violations(stage(tmp_path, base, lora=AdapterConfig(rank=-1)))
        assert any("lora.rank=-1: expected at least 0" in fault for fault in faults)
        faults = violations(stage(tmp_path, base, lora=AdapterConfig(merge_on_export=True)))
        assert any("lora.merge_on_export is set but lora.rank=0" in fault for fault in faults)
