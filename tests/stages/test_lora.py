"""PPO in LoRA mode: four roles on one trunk."""

import copy
import dataclasses
import json
import os
import signal

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from rlhf_fast import PPOTrainer
from rlhf_fast.config import (
    AlgorithmConfig,
    KLConfig,
    LoraConfig,
    OptimConfig,
    RewardConfig,
    RolloutConfig,
    RunConfig,
    SamplingConfig,
)
from rlhf_fast.config_rules import violations
from rlhf_fast.errors import CheckpointError, ConfigError, Interrupted, ModelError
from rlhf_fast.metrics import read_metrics
from rlhf_fast.models.adapter_files import export_adapter
from rlhf_fast.models.adapter_roles import AdapterActor, AdapterCritic, AdapterReference
from rlhf_fast.models.adapters import SharedTrunk, weights_digest
from rlhf_fast.models.export import export_model
from rlhf_fast.models.heads import set_calibration
from rlhf_fast.models.loading import critic_from, load_causal_lm
from rlhf_fast.models.roles import Reference
from rlhf_fast.stages.check import check_stage
from rlhf_fast.tasks.tiny import build_tokenizer
from rlhf_fast.types import PackedSequences
from tests.stages.test_ppo import PROMPTS, policy, settings, short_is_good, without_times
from tests.stages.tiny_runs import checkpoint_contents, write_rows

LORA = LoraConfig(rank=4, alpha=8.0)


@pytest.fixture
def tokenizer():
    return build_tokenizer()


def trainer(folder, tokenizer, config=None, **more):
    given = {"reward_function": short_is_good, "model": policy(tokenizer), **more}
    return PPOTrainer(
        config or settings(folder, lora=LORA),
        tokenizer=tokenizer,
        train_dataset=PROMPTS,
        quiet=True,
        **given,
    )


@pytest.mark.parametrize("estimator", ["gae", "rloo"])
def test_scores_rise_and_the_trunk_never_changes(tmp_path, tokenizer, estimator):
    config = settings(
        tmp_path,
        total_steps=15,
        lora=LORA,
        actor_optim=OptimConfig(lr=2e-2, schedule="constant"),
        algorithm=AlgorithmConfig(estimator=estimator, ppo_epochs=2, minibatches=2),
        kl=KLConfig(coef=0.0),
        sampling=SamplingConfig(max_new_tokens=8),
        rollout=RolloutConfig(prompts=16, samples_per_prompt=2),
        run=RunConfig(output_dir=str(tmp_path), save_every=100, device="cpu"),
    )
    ppo = trainer(tmp_path, tokenizer, config)
    trunk = ppo.roles.actor.trunk
    digest = weights_digest(trunk.model)
    ppo.train()
    assert weights_digest(trunk.model) == digest == weights_digest(policy(tokenizer))
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert rows[0]["val/first_ratio_gap"] < 1e-5
    assert rows[-1]["objective/scores"] > rows[0]["objective/scores"] + 2


def test_an_interrupted_run_resumes_to_the_same_bits(tmp_path, tokenizer):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    changes = {"lora": LORA, "total_steps": 4, "sample_every": 1}
    trainer(whole, tokenizer, settings(whole, **changes)).train()

    def interrupt(step, output):
        if step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted):
        trainer(parts, tokenizer, settings(parts, **changes), on_step=interrupt).train()
    trainer(parts, tokenizer, settings(parts, **changes)).train()
    assert without_times(parts) == without_times(whole)
    for name in ("model", "critic"):
        first = (whole / name / "adapter_model.safetensors").read_bytes()
        assert (parts / name / "adapter_model.safetensors").read_bytes() == first


def judged(folder, tokenizer, path, **lora):
    """Settings of a run whose policy and adapters come from directories."""
    config = LoraConfig(rank=4, alpha=8.0, **lora)
    return settings(folder, actor=str(path), lora=config)


@pytest.fixture
def base(tmp_path, tokenizer):
    return export_model(policy(tokenizer), tokenizer, tmp_path / "base")


@pytest.fixture
def adapters(base, tokenizer, tmp_path):
    """A policy's adapter and a reward model's, both with numbers in them, on the base."""
    trunk = SharedTrunk(load_causal_lm(base, dtype="float32"))
    shape = trunk.shape(2, 3.0, ["q_proj", "down_proj"])
    for seed, name in enumerate(("actor", "critic")):
        trunk.add(name, shape, seed=seed, trainable=True)
        for tensor in trunk.tensors(name).values():
            tensor.copy_(
                0.2 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(7))
            )
    critic = AdapterCritic(trunk)
    torch.nn.init.normal_(critic.module.score.weight, generator=torch.Generator().manual_seed(8))
    set_calibration(critic.module, 2.0, 0.5)
    return (
        export_adapter(AdapterActor(trunk).adapted, tokenizer, tmp_path / "sft"),
        export_adapter(critic.adapted, tokenizer, tmp_path / "judge"),
    )


def test_roles_start_from_adapters(tmp_path, tokenizer, base, adapters):
    sft, judge = map(str, adapters)
    config = judged(tmp_path / "run", tokenizer, base, actor_adapter=sft, reward_adapter=judge)
    ppo = trainer(tmp_path / "run", tokenizer, config, model=None, reward_function=None)
    roles = ppo.roles
    trunk = roles.actor.trunk
    assert sorted(trunk.shapes) == ["actor", "critic", "reference", "reward"]
    ids, targets = PackedSequences.from_lists([[5, 6, 7, 8]]), torch.tensor([6, 7, 8, -100])
    with torch.no_grad():
        actor, reference = (p.logprobs(ids, targets)[0] for p in (roles.actor, roles.reference))
        bare = AdapterReference(trunk, None).logprobs(ids, targets)[0]
    assert torch.equal(actor, reference)
    assert not torch.equal(actor, bare)
    score = roles.reward.reward_model.score_sequences(ids)
    torch.testing.assert_close(roles.critic.values(ids)[-1:].detach(), score)
    before = {name: copy.deepcopy(trunk.tensors(name)) for name in trunk.shapes}
    result = ppo.train()
    for name, tensors in trunk.tensors("actor").items():
        assert not torch.equal(tensors, before["actor"][name])
    for frozen in ("reference", "reward"):
        for name, tensors in trunk.tensors(frozen).items():
            assert torch.equal(tensors, before[frozen][name])
    assert weights_digest(trunk.model) == trunk.digest
    config_of = json.loads((result.model_dir / "adapter_config.json").read_text())
    assert (config_of["r"], config_of["target_modules"]) == (2, ["down_proj", "q_proj"])


def test_the_policy_reloads_with_equal_logprobs(tmp_path, tokenizer, base):
    config = judged(tmp_path / "run", tokenizer, base, merge_on_export=True)
    ppo = trainer(tmp_path / "run", tokenizer, config, model=None)
    result = ppo.train()
    stock = AutoModelForCausalLM.from_pretrained(base)
    by_peft = peft.PeftModel.from_pretrained(stock, tmp_path / "run" / "adapter")
    merged = AutoModelForCausalLM.from_pretrained(result.model_dir)
    ids = torch.tensor([[5, 6, 7, 8]])
    targets = torch.tensor([6, 7, 8, -100])
    with torch.no_grad():
        expected = ppo.roles.actor.logprobs(PackedSequences.from_lists(ids.tolist()), targets)[0]
        for model in (by_peft.eval(), merged.eval()):
            found = model(input_ids=ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])
            torch.testing.assert_close(found[:, 0], expected[:-1], rtol=1e-5, atol=1e-5)
    assert (tmp_path / "run" / "critic" / "adapter_config.json").is_file()


def test_checkpoints_hold_adapters_only_and_refuse_another_trunk(tmp_path, tokenizer, base):
    run = tmp_path / "run"
    config = judged(run, tokenizer, base)
    trainer(run, tokenizer, dataclasses.replace(config, total_steps=1), model=None).train()
    tensors, state = checkpoint_contents(run)
    assert all("lora_" in name for name in tensors["actor"])
    assert {n for n in tensors["critic"] if "lora_" not in n} == {"score.weight"}
    assert set(state["frozen"]) == {"trunk"}
    export_model(policy(tokenizer, seed=5), tokenizer, base)
    with pytest.raises(CheckpointError, match="RF8008: the trunk"):
        trainer(run, tokenizer, dataclasses.replace(config, total_steps=2), model=None).train()


@pytest.mark.parametrize(
    "changes",
    [
        {"gradient_checkpointing": True},
        {"kl": KLConfig(coef=0.05, estimator="exact", placement="loss")},
        {"run": "bfloat16"},
    ],
    ids=str,
)
def test_other_ways_of_computing_train_too(tmp_path, tokenizer, changes):
    if "run" in changes:
        run = RunConfig(output_dir=str(tmp_path), device="cpu", dtype="bfloat16")
        changes = {"run": run}
    config = settings(tmp_path, lora=LORA, total_steps=2, **changes)
    ppo = trainer(tmp_path, tokenizer, config)
    trunk = ppo.roles.actor.trunk
    held = weights_digest(trunk.model)
    ppo.train()
    assert weights_digest(trunk.model) == held
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert rows[0]["val/first_ratio_gap"] < (0.25 if config.run.dtype == "bfloat16" else 1e-5)
    assert rows[-1]["policy/grad_norm"] > 0


def test_recomputing_activations_changes_no_bit(tmp_path, tokenizer):
    weights = []
    for name in ("kept", "again"):
        folder = tmp_path / name
        config = settings(folder, lora=LORA, gradient_checkpointing=name == "again")
        trainer(folder, tokenizer, config).train()
        weights.append((folder / "model" / "adapter_model.safetensors").read_bytes())
    assert weights[0] == weights[1]


def test_whole_models_stand_beside_the_trunk(tmp_path, tokenizer, base):
    """A reward model and a reference of their own; the critic starts from zeros on the trunk."""
    other = export_model(policy(tokenizer, seed=3), tokenizer, tmp_path / "other")
    config = dataclasses.replace(judged(tmp_path / "run", tokenizer, base), reference=str(other))
    ppo = trainer(
        tmp_path / "run",
        tokenizer,
        config,
        model=None,
        reward_model=critic_from(policy(tokenizer, seed=4)),
        reward_function=None,
    )
    assert isinstance(ppo.roles.reference, Reference)
    assert not ppo.roles.critic.module.score.weight.any()
    assert sorted(ppo.roles.actor.trunk.shapes) == ["actor", "critic"]
    ppo.train()


# ---- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "needle"),
    [
        ({"lora": LoraConfig(rank=-1)}, "lora.rank=-1: expected at least 0"),
        ({"lora": LoraConfig(actor_adapter="a")}, "lora.actor_adapter is set but lora.rank=0"),
        ({"lora": LoraConfig(rank=1, alpha=0.0)}, "lora.alpha=0.0: expected more than 0"),
        ({"lora": LoraConfig(rank=1, targets=[])}, "lora.targets is empty"),
        ({"lora": LoraConfig(rank=1, targets=["all-linear", "q_proj"])}, "one or the other"),
        ({"lora": LoraConfig(rank=1), "critic": "c"}, "critic=c with lora.rank=1"),
        (
            {"lora": LoraConfig(rank=1, reward_adapter="a"), "reward": RewardConfig(model="b")},
            "lora.reward_adapter and reward.model are both set",
        ),
    ],
)
def test_settings_that_contradict_each_other_are_listed(changes, needle):
    config = dataclasses.replace(settings("out"), **changes)
    assert any(needle in fault for fault in violations(config, given=["reward"]))


def test_a_reward_adapter_is_a_reward():
    config = settings("out", lora=LoraConfig(rank=1, reward_adapter="a"))
    assert violations(config) == []


def test_unknown_targets_and_models_for_adapters_are_refused(tmp_path, tokenizer, base, adapters):
    unknown = settings(tmp_path / "a", lora=LoraConfig(rank=2, targets=["c_attn"]))
    with pytest.raises(ModelError, match="RF3063"):
        trainer(tmp_path / "a", tokenizer, unknown)
    with pytest.raises(ConfigError, match="RF1042"):
        trainer(tmp_path / "b", tokenizer, critic=critic_from(policy(tokenizer)))
    headless = judged(tmp_path / "c", tokenizer, base, reward_adapter=str(adapters[0]))
    with pytest.raises(ModelError, match="RF3067"):
        trainer(tmp_path / "c", tokenizer, headless, model=None, reward_function=None)


def test_check_reads_the_adapters(tmp_path, tokenizer, base, adapters):
    rows = write_rows(tmp_path / "prompts.jsonl", PROMPTS)
    sft, judge = map(str, adapters)
    config = judged(tmp_path / "run", tokenizer, base, actor_adapter=sft, reward_adapter=judge)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, train=str(rows)))
    text = check_stage(config)
    assert "adapters on 14 layers, rank 4" in text
    assert f"actor: adapter {sft}, rank 2" in text
    assert f"reward model: adapter {judge}, rank 2" in text
    export_model(policy(tokenizer, seed=5), tokenizer, base)
    with pytest.raises(ModelError, match="RF3062"):
        check_stage(config)
