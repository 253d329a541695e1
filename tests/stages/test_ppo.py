"""PPOTrainer and run_ppo on tiny models: rewards of every kind, export, resume, samples."""

import dataclasses
import json
import math
import os
import signal

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from rlhf_fast import PPOTrainer, run_ppo
from rlhf_fast.config import (
    AlgorithmConfig,
    DataConfig,
    KLConfig,
    OptimConfig,
    PPOConfig,
    RewardConfig,
    RolloutConfig,
    RunConfig,
    SamplingConfig,
)
from rlhf_fast.errors import ConfigError, Interrupted, ModelError, RewardError
from rlhf_fast.metrics import read_metrics
from rlhf_fast.models.export import export_model
from rlhf_fast.models.forward import packed_hidden
from rlhf_fast.models.loading import load_sequence_classifier
from rlhf_fast.ppo.statistics import UpdateStatistics
from rlhf_fast.stages.check import check_stage
from rlhf_fast.tasks.reviews import prompt_split
from rlhf_fast.tasks.tiny import build_tokenizer
from tests.ppo.synthetic import tiny_config
from tests.stages.tiny_runs import metric_lines

PROMPTS = [{"prompt": p, "tag": i} for i, p in enumerate(prompt_split()[0][:16])]


def policy(tokenizer, seed=0):
    config = tiny_config()
    config.vocab_size = len(tokenizer)
    config.eos_token_id = tokenizer.eos_token_id
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config)


def judge(tokenizer, folder, seed=1):
    """A reward model in memory: a scalar head on a random trunk."""
    export_model(policy(tokenizer, seed), tokenizer, folder)
    return load_sequence_classifier(folder, init_head=True, dtype="float32")


def settings(folder, **changes):
    config = PPOConfig(
        run=RunConfig(output_dir=str(folder), save_every=1, device="cpu"),
        data=DataConfig(max_prompt_length=16, max_length=32),
        rollout=RolloutConfig(prompts=8),
        sampling=SamplingConfig(max_new_tokens=6),
        reward=RewardConfig(missing_eos="none"),
        kl=KLConfig(coef=0.05),
        algorithm=AlgorithmConfig(ppo_epochs=2, minibatches=2),
        actor_optim=OptimConfig(lr=1e-3),
        critic_optim=OptimConfig(lr=1e-3),
        total_steps=3,
        sample_every=2,
        microbatch_tokens=512,
    )
    return dataclasses.replace(config, **changes)


def short_is_good(completions, **columns):
    return [-float(len(text.split())) for text in completions]


@pytest.fixture
def tokenizer():
    return build_tokenizer()


def trainer(folder, tokenizer, config=None, **more):
    given = {"reward_function": short_is_good, "model": policy(tokenizer), **more}
    return PPOTrainer(
        config or settings(folder),
        tokenizer=tokenizer,
        train_dataset=PROMPTS,
        quiet=True,
        **given,
    )


def test_a_few_lines_train_and_export_a_policy(tmp_path, tokenizer):
    ppo = trainer(tmp_path, tokenizer)
    result = ppo.train()
    assert result.steps == 3
    loaded = AutoModelForCausalLM.from_pretrained(result.model_dir)
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        expected = ppo.roles.actor.module(input_ids=ids).logits
        # The loaded weights sit at another alignment; copies of them give the same bits.
        loaded.load_state_dict({k: v.clone() for k, v in loaded.state_dict().items()}, assign=True)
        loaded.tie_weights()
        assert torch.equal(loaded(input_ids=ids).logits, expected)
    assert AutoTokenizer.from_pretrained(result.model_dir).pad_token_id is not None
    critic = AutoModelForSequenceClassification.from_pretrained(tmp_path / "critic")
    assert critic.config.num_labels == 1
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert {"time/generate", "time/score", "time/prepare", "time/update"} <= set(rows[0])
    samples = [json.loads(line) for line in (tmp_path / "samples.jsonl").open(encoding="utf-8")]
    assert {row["step"] for row in samples} == {2, 3}


def test_reward_function_sees_texts_and_columns_and_scores_rise(tmp_path, tokenizer):
    seen = []

    def reward(prompts, completions, tag):
        seen.append((prompts, completions, tag))
        return short_is_good(completions)

    config = settings(
        tmp_path,
        total_steps=25,
        actor_optim=OptimConfig(lr=1e-2, schedule="constant"),
        kl=KLConfig(coef=0.0),
        sampling=SamplingConfig(max_new_tokens=8),
        rollout=RolloutConfig(prompts=16, samples_per_prompt=2),
        run=RunConfig(output_dir=str(tmp_path), save_every=100, device="cpu"),
    )
    trainer(tmp_path, tokenizer, config, reward_function=reward).train()
    prompts, completions, tags = seen[0]
    assert len(prompts) == len(completions) == len(tags) == 32
    assert all(PROMPTS[t]["prompt"] == p for p, t in zip(prompts, tags, strict=True))
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert rows[-1]["objective/scores"] > rows[0]["objective/scores"] + 2


def test_reward_model_and_function_add_up(tmp_path, tokenizer):
    model = judge(tokenizer, tmp_path / "judge")
    config = settings(tmp_path / "both", reward=RewardConfig(function_weight=0.5))
    both = trainer(tmp_path, tokenizer, config, reward_model=model)
    alone = trainer(
        tmp_path, tokenizer, settings(tmp_path / "model"), reward_model=model, reward_function=None
    )
    prompts = [both.data[i] for i in range(8)]
    from rlhf_fast.data import collate_prompts

    rollout = both.learner.generate(collate_prompts(prompts))
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in rollout.response_ids()]
    expected = alone.roles.reward.score(rollout).scores + 0.5 * torch.tensor(short_is_good(texts))
    torch.testing.assert_close(both.roles.reward.score(rollout).scores, expected)


def test_the_critic_starts_as_a_copy_of_the_reward_model(tmp_path, tokenizer):
    model = judge(tokenizer, tmp_path / "judge")
    ppo = trainer(tmp_path / "run", tokenizer, settings(tmp_path / "run"), reward_model=model)
    critic = ppo.roles.critic.module
    for ours, theirs in zip(critic.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
        assert ours.requires_grad
        assert not theirs.requires_grad
        assert ours.data_ptr() != theirs.data_ptr()


def test_per_token_rewards_train(tmp_path, tokenizer):
    def per_token(completion_ids):
        return [[0.1 * (i % 3) for i in ids] for ids in completion_ids]

    trainer(tmp_path, tokenizer, reward_function=per_token).train()
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert all(row["objective/scores_std"] > 0 for row in rows)


def test_per_token_rewards_must_cover_eos(tmp_path, tokenizer):
    def one_short(completion_ids):
        return [[0.1] * (len(ids) - 1) for ids in completion_ids]

    with pytest.raises(RewardError, match="RF5006"):
        trainer(tmp_path, tokenizer, reward_function=one_short).train()


@pytest.mark.parametrize("estimator", ["rloo", "grpo"])
def test_critic_free_estimators_run_and_export_no_critic(tmp_path, tokenizer, estimator):
    config = settings(
        tmp_path,
        algorithm=AlgorithmConfig(estimator=estimator, ppo_epochs=1),
        rollout=RolloutConfig(prompts=4, samples_per_prompt=4),
    )
    trainer(tmp_path, tokenizer, config).train()
    assert not (tmp_path / "critic").exists()


def test_a_step_without_an_update_logs_the_present_learning_rates(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(UpdateStatistics, "minibatch_kl", lambda self: 1.0)
    config = settings(
        tmp_path,
        total_steps=1,
        algorithm=AlgorithmConfig(target_kl=0.1),
        actor_optim=OptimConfig(lr=1e-3, warmup_steps=4),
        critic_optim=OptimConfig(lr=2e-3, warmup_steps=4),
    )
    trainer(tmp_path, tokenizer, config).train()
    row = read_metrics(tmp_path / "metrics.jsonl")[0]
    assert row["policy/optimizer_steps"] == 0
    assert (row["lr"], row["lr_value"]) == (pytest.approx(2.5e-4), pytest.approx(5e-4))
    assert row["policy/grad_norm"] == row["value/grad_norm"] == 0


def without_times(path):
    return metric_lines(path)


@pytest.mark.parametrize(
    "kl",
    [
        KLConfig(coef=0.05, adaptive=True, target=0.01, horizon=50),
        KLConfig(coef=0.05, adaptive=True, target=0.01, horizon=50, estimator="exact"),
        KLConfig(coef=0.05, estimator="exact", placement="loss"),
    ],
)
def test_an_interrupted_run_resumes_to_the_same_bits(tmp_path, tokenizer, kl):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    changes = {"kl": kl, "total_steps": 5, "sample_every": 1}
    trainer(whole, tokenizer, settings(whole, **changes)).train()

    def interrupt(step, output):
        if step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted):
        trainer(parts, tokenizer, settings(parts, **changes), on_step=interrupt).train()
    assert len(read_metrics(parts / "metrics.jsonl")) == 2
    trainer(parts, tokenizer, settings(parts, **changes)).train()
    assert without_times(parts) == without_times(whole)
    for name in ("model", "critic"):
        first = (whole / name / "model.safetensors").read_bytes()
        assert (parts / name / "model.safetensors").read_bytes() == first
    assert (parts / "samples.jsonl").read_text() == (whole / "samples.jsonl").read_text()


def test_a_run_made_longer_follows_the_schedule_of_its_new_length(tmp_path, tokenizer):
    def rates(config):
        ppo = trainer(tmp_path, tokenizer, config)
        used, guarded = [], ppo.roles.actor_optimizer
        step = guarded.step
        guarded.step = lambda: (used.append(guarded.lr), step())[1]
        ppo.train()
        return used

    assert rates(settings(tmp_path, total_steps=2))[-1] == pytest.approx(1e-3 / 8)
    # Four optimizer steps a PPO step: steps 8 to 15 of 16.
    expected = [1e-3 * (16 - done) / 16 for done in range(8, 16)]
    assert rates(settings(tmp_path, total_steps=4)) == pytest.approx(expected)


def test_a_finished_run_says_so_and_trains_no_more(tmp_path, tokenizer):
    first = trainer(tmp_path, tokenizer).train()
    calls = []
    again = trainer(tmp_path, tokenizer, on_step=lambda *a: calls.append(a)).train()
    assert again.metrics == first.metrics
    assert calls == []


def test_a_lost_line_of_the_log_does_not_keep_a_run_from_its_end(tmp_path, tokenizer):
    trainer(tmp_path, tokenizer).train()
    (tmp_path / "complete.json").unlink()
    log = tmp_path / "metrics.jsonl"
    for kept in (2, 0):
        log.write_text("".join(log.read_text().splitlines(keepends=True)[:kept]))
        result = trainer(tmp_path, tokenizer).train()
        assert result.steps == 3
        assert all(math.isnan(value) for value in result.metrics.values())
        (tmp_path / "complete.json").unlink()


@pytest.mark.parametrize("line", [0, -1])
def test_a_damaged_line_of_the_log_does_not_keep_a_run_from_its_end(tmp_path, tokenizer, line):
    first = trainer(tmp_path, tokenizer).train()
    (tmp_path / "complete.json").unlink()
    log = tmp_path / "metrics.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    lines[line] = b"\xff" + lines[line][1:]
    log.write_bytes(b"".join(lines))
    again = trainer(tmp_path, tokenizer).train()
    assert again.steps == 3
    if line == 0:
        assert again.metrics == first.metrics
    else:
        assert all(math.isnan(value) for value in again.metrics.values())


def test_a_finished_run_made_shorter_says_how_many_steps_it_did(tmp_path, tokenizer):
    trainer(tmp_path, tokenizer).train()
    shorter = settings(tmp_path, total_steps=2)
    assert [trainer(tmp_path, tokenizer, shorter).train().steps for _ in range(2)] == [3, 3]


def test_run_ppo_works_from_directories(tmp_path, tokenizer):
    export_model(policy(tokenizer), tokenizer, tmp_path / "sft")
    export_model(judge(tokenizer, tmp_path / "trunk"), tokenizer, tmp_path / "rm")
    rows = tmp_path / "prompts.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in PROMPTS), encoding="utf-8")
    base = settings(tmp_path / "out")
    config = dataclasses.replace(
        base,
        actor=str(tmp_path / "sft"),
        reward=RewardConfig(model=str(tmp_path / "rm")),
        data=dataclasses.replace(base.data, train=str(rows)),
    )
    assert "PPO: 3 steps" in run_ppo(config).summary()


def test_half_precision_models_from_elsewhere_train_on_fp32_masters(tmp_path, tokenizer):
    module = policy(tokenizer).to(torch.bfloat16)
    ppo = PPOTrainer(
        settings(tmp_path),
        model=module,
        tokenizer=tokenizer,
        train_dataset=PROMPTS,
        reward_function=short_is_good,
        quiet=True,
    )
    roles = ppo.roles
    assert roles.actor.module is module
    for role in (roles.actor, roles.reference, roles.critic):
        assert {p.dtype for p in role.module.parameters()} == {torch.float32}
    assert module.get_input_embeddings().padding_idx is None


def test_a_trained_role_shares_no_weights(tmp_path, tokenizer):
    module, model = policy(tokenizer), judge(tokenizer, tmp_path / "judge")
    given = {"tokenizer": tokenizer, "train_dataset": PROMPTS, "reward_model": model}
    config = settings(tmp_path / "run")
    with pytest.raises(ConfigError, match="RF1041"):
        PPOTrainer(config, model=module, reference=module, **given)
    with pytest.raises(ConfigError, match="RF1041"):
        PPOTrainer(config, model=module, critic=model, **given)


def test_adapters_of_peft_are_refused_in_what_is_trained(tmp_path, tokenizer):
    """They would be exported as layers that no model has, beside none that one has."""
    lora = peft.LoraConfig(r=2, target_modules="all-linear")
    within = policy(tokenizer)
    peft.inject_adapter_in_model(lora, within)
    around = peft.get_peft_model(policy(tokenizer), lora)
    config = settings(tmp_path / "run")
    for module in (within, around):
        with pytest.raises(ModelError, match="RF3065"):
            trainer(tmp_path, tokenizer, config, model=module)
    with pytest.raises(ModelError, match="RF3065"):
        trainer(tmp_path, tokenizer, config, reference=around)
    assert trainer(tmp_path, tokenizer, config, reference=within).train().steps == 3


def test_gradient_checkpointing_recomputes_and_changes_no_bit(tmp_path, tokenizer):
    export_model(policy(tokenizer), tokenizer, tmp_path / "sft")
    calls = []

    def run(folder, checkpointing):
        config = settings(folder, actor=str(tmp_path / "sft"), gradient_checkpointing=checkpointing)
        ppo = PPOTrainer(config, train_dataset=PROMPTS, reward_function=short_is_good, quiet=True)
        for role in (ppo.roles.actor, ppo.roles.critic):
            layer = role.module.model.layers[0]
            layer.mlp.register_forward_pre_hook(lambda *_: calls.append(torch.is_grad_enabled()))
        ppo.train()
        return (folder / "model" / "model.safetensors").read_bytes(), calls.count(True)

    plain, forwards = run(tmp_path / "plain", False)
    calls.clear()
    recomputed, more = run(tmp_path / "recomputed", True)
    assert recomputed == plain
    assert more == 2 * forwards


def test_models_side_by_side_come_to_the_same_bits(tmp_path, tokenizer, monkeypatch):
    """Each on one thread, they make the products that one after another makes on one."""
    before = torch.get_num_threads()
    running, most = [], []

    def watched(*arguments):
        running.append(1)
        most.append(len(running))
        try:
            return packed_hidden(*arguments)
        finally:
            running.pop()

    monkeypatch.setattr("rlhf_fast.models.roles.packed_hidden", watched)
    weights = []
    try:
        for models in (1, 2):
            folder = tmp_path / str(models)
            config = settings(folder, side_by_side=models, microbatch_tokens=64)
            config = dataclasses.replace(config, run=dataclasses.replace(config.run, threads=1))
            judged = judge(tokenizer, tmp_path / "judge")
            more = trainer(folder, tokenizer, config, reward_model=judged, reward_function=None)
            assert more.roles.independent
            more.train()
            weights.append([p.clone() for p in more.roles.actor.module.parameters()])
            weights[-1] += [p.clone() for p in more.roles.critic.module.parameters()]
            assert (max(most) > 1) == (models > 1)
    finally:
        torch.set_num_threads(before)
    for one, other in zip(*weights, strict=True):
        assert torch.equal(one, other)


def test_models_that_share_a_config_take_turns(tmp_path, tokenizer):
    """A forward switches the attention that its config names."""
    actor, reference = policy(tokenizer), policy(tokenizer)
    assert trainer(tmp_path / "own", tokenizer, model=actor, reference=reference).roles.independent
    sharing = policy(tokenizer)
    sharing.config = sharing.model.config = actor.config
    shared = trainer(tmp_path / "shared", tokenizer, model=actor, reference=sharing)
    assert not shared.roles.independent


def test_missing_parts_are_named(tmp_path, tokenizer):
    with pytest.raises(ConfigError, match="RF1040"):
        trainer(tmp_path, tokenizer, reward_function=None)
    with pytest.raises(ConfigError, match="actor"):
        PPOTrainer(settings(tmp_path), train_dataset=PROMPTS, reward_function=short_is_good)
    with pytest.raises(ConfigError, match=r"run\.output_dir"):
        trainer("", tokenizer, settings(""))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"algorithm": AlgorithmConfig(estimator="grop")}, "one of gae, rloo, grpo"),
        ({"algorithm": AlgorithmConfig(minibatches=3)}, "does not divide"),
        ({"algorithm": AlgorithmConfig(estimator="rloo")}, "samples_per_prompt"),
        ({"sampling": SamplingConfig(max_new_tokens=6, temperature=0.0)}, "temperature"),
        ({"actor_optim": OptimConfig(lr=float("nan"))}, "finite"),
        ({"total_steps": "3"}, "expected int, got str"),
        ({"kl": KLConfig(adaptive="yes")}, "expected bool, got str"),
    ],
)
def test_a_config_built_in_python_is_held_to_the_same_rules(tmp_path, tokenizer, changes, named):
    with pytest.raises(ConfigError, match="RF1005") as caught:
        trainer(tmp_path, tokenizer, settings(tmp_path, **changes))
    assert named in str(caught.value)


def test_exact_kl_with_a_head_of_its_own_making_is_refused_by_check_and_trainer(
    tmp_path, tokenizer
):
    kl = KLConfig(coef=0.1, estimator="exact")
    model, other = policy(tokenizer), policy(tokenizer, seed=3)
    model.lm_head.register_forward_hook(lambda *a: a[2] + 1.0)
    with pytest.raises(ModelError, match="RF3026"):
        PPOTrainer(
            settings(tmp_path, kl=kl),
            model=model,
            tokenizer=tokenizer,
            train_dataset=PROMPTS,
            reward_function=short_is_good,
        )
    other.resize_token_embeddings(len(tokenizer) + 3)
    for name, module in (("actor", policy(tokenizer)), ("reference", other)):
        export_model(module, tokenizer, tmp_path / name)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in PROMPTS), encoding="utf-8")
    (tmp_path / "judge.py").write_text("def judge(completions):\n    return [0.0] * 8\n")
    config = settings(
        tmp_path / "run",
        actor=str(tmp_path / "actor"),
        reference=str(tmp_path / "reference"),
        data=DataConfig(train=str(prompts), max_prompt_length=16, max_length=32),
        reward=RewardConfig(function=f"{tmp_path / 'judge.py'}:judge"),
    )
    assert "check passed" in check_stage(config)
    exact = dataclasses.replace(config, kl=kl)
    assert "check passed" in check_stage(dataclasses.replace(exact, reference=""))
    for attempt in (check_stage, run_ppo):
        with pytest.raises(ModelError, match="RF3027"):
            attempt(exact)
