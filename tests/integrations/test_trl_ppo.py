"""The PPO trainer with TRL's constructor; where TRL 1.12 is installed, beside TRL's own."""

from __future__ import annotations

import importlib.metadata
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorWithPadding,
    HfArgumentParser,
    set_seed,
)

from rlhf_fast.errors import ConfigError
from rlhf_fast.integrations.trl_ppo import PPOConfig, PPOTrainer
from tests.integrations.trl_cases import LIMIT, ppo_models, ppo_settings


def count_even(models: dict[str, Any]) -> None:
    """Make the reward model say +1 after a token of an even id and -1 after an odd one."""
    judge = models["reward_model"]
    with torch.no_grad():
        for layer in judge.model.layers:  # nothing is added to the embedding of the last token
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        judge.model.norm.weight.fill_(1.0)
        embedding = judge.model.embed_tokens.weight
        embedding.zero_()
        embedding[0::2, 0], embedding[1::2, 0] = 1.0, -1.0
        judge.score.weight.zero_()
        judge.score.weight[0, 0] = embedding.shape[1] ** -0.5


def trained(folder: Path, models: dict[str, Any], **options: Any) -> PPOTrainer:
    trainer = PPOTrainer(args=PPOConfig(**ppo_settings(folder, **options)), **models)
    trainer.train()
    return trainer


def series(trainer: PPOTrainer, name: str) -> list[float]:
    return [log[name] for log in trainer.state.log_history]


# ---- a script of TRL's --------------------------------------------------------------------------


def test_the_reward_goes_up_and_the_policy_is_saved(tmp_path: Path) -> None:
    models = ppo_models()
    count_even(models)
    trainer = trained(
        tmp_path,
        models,
        total_episodes=16 * 24,
        num_ppo_epochs=4,
        learning_rate=3e-3,
        missing_eos_penalty=None,
        stop_token=None,
        response_length=4,
        kl_coef=0.0,
    )
    scores = series(trainer, "objective/scores")
    assert len(scores) == trainer.state.global_step == 24
    assert sum(scores[-6:]) / 6 > sum(scores[:6]) / 6 + 0.5
    trainer.save_model(str(tmp_path))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert len(AutoTokenizer.from_pretrained(tmp_path)) == len(trainer.processing_class)
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, models["model"].cpu().eval()(ids).logits)
    assert (tmp_path / "run" / "metrics.jsonl").is_file()


def test_sizes_are_written_into_the_config_as_trl_does(tmp_path: Path) -> None:
    args = PPOConfig(**ppo_settings(tmp_path, total_episodes=None, num_train_epochs=2))
    PPOTrainer(args=args, data_collator=DataCollatorWithPadding(None), **ppo_models())
    assert (args.total_episodes, args.num_total_batches) == (128, 8)
    assert (args.batch_size, args.micro_batch_size, args.mini_batch_size) == (16, 8, 16)


def test_the_command_line_of_a_script_is_read(tmp_path: Path) -> None:
    line = (
        f"--output_dir {tmp_path} --stop_token eos --num_ppo_epochs 2 --total_episodes 100 --bf16 0"
    )
    (args,) = HfArgumentParser(PPOConfig).parse_args_into_dataclasses(line.split())
    assert (args.stop_token, args.num_ppo_epochs, args.total_episodes) == ("eos", 2, 100)
    assert args.faults() == []
    args.fill_sizes(64)
    settings = args.settings(longest_prompt=10)
    assert (settings.run.dtype, settings.total_steps, settings.gradient_checkpointing) == (
        *("float32", 13),
        True,
    )


def test_completions_of_the_evaluation_prompts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models = ppo_models()
    count_even(models)
    pad = models["processing_class"].pad_token_id  # on the left, as a collator leaves them
    rows = [{"input_ids": [pad] * i + models["train_dataset"][i]["input_ids"]} for i in range(6)]
    args = PPOConfig(**ppo_settings(tmp_path, per_device_eval_batch_size=4, stop_token=None))
    trainer = PPOTrainer(args=args, eval_dataset=rows, **models)
    table = trainer.generate_completions()
    assert len(table) == 6
    assert len(trainer.generate_completions(sampling=True)) == 4
    for row in table:
        assert row["query"].startswith("review of the")  # and not with padding
        assert abs(row["score"]) == pytest.approx(1.0, abs=1e-3)
    assert table[0]["model response"] in capsys.readouterr().out


def test_a_second_run_in_the_same_folder_starts_anew_unless_told_to_resume(tmp_path: Path) -> None:
    first = trained(tmp_path, ppo_models(), save_strategy="steps", save_steps=1)
    again = trained(tmp_path, ppo_models())
    assert series(again, "objective/scores") == series(first, "objective/scores")
    resumed = trained(tmp_path, ppo_models(), resume_from_checkpoint="yes")
    assert resumed.state.log_history == []


# ---- stop tokens and the penalty ----------------------------------------------------------------


@pytest.mark.parametrize(
    "stop", [{"stop_token": "eos"}, {"stop_token": None}, {"stop_token_id": 9}]
)
def test_responses_end_at_the_stop_token_and_the_penalty_looks_for_eos(
    stop: dict[str, Any], tmp_path: Path
) -> None:
    options = {"stop_token": None, "num_mini_batches": 2, "missing_eos_penalty": 2.0} | stop
    trainer = PPOTrainer(args=PPOConfig(**ppo_settings(tmp_path, **options)), **ppo_models())
    eos = trainer.processing_class.eos_token_id
    end = eos if stop.get("stop_token") else stop.get("stop_token_id")
    outputs: list[Any] = []
    trainer.trainer.on_step = lambda _, output: outputs.append(output)
    trainer.train()
    for output in outputs:
        scored = output.experience.scored
        rollout = scored.rollout
        for ids, ended in zip(rollout.response_ids(), rollout.ended.tolist(), strict=True):
            assert end not in ids[:-1]
            assert len(ids) == LIMIT or ids[-1] == end
            assert ended == (eos in ids)
    assert any(bool(o.experience.scored.rollout.ended.any()) for o in outputs)
    # Passes times minibatches, each an optimizer step.
    updates = trainer.trainer.roles.actor_optimizer.optimizer.state_dict()["state"][0]["step"]
    assert int(updates) == 3 * 2 * 2


# ---- what it refuses ----------------------------------------------------------------------------


def test_everything_that_cannot_be_followed_is_named_at_once(tmp_path: Path) -> None:
    options = {
        "neftune_noise_alpha": 5.0,
        "lr_scheduler_type": "polynomial",
        "kl_estimator": "k2",
        "push_to_hub": True,
        "stop_token_id": 3,
    }
    args = PPOConfig(**ppo_settings(tmp_path, **options))
    models = ppo_models()
    models["train_dataset"] = [{"prompt": "text"}]
    with pytest.raises(ConfigError) as caught:
        PPOTrainer(args=args, callbacks=[object()], peft_config=object(), **models)
    assert caught.value.code == "RF1080"
    for word in (*options, "callbacks", "peft_config", "input_ids"):
        assert word in caught.value.where


def test_no_minibatch_is_one_message(tmp_path):
    with pytest.raises(ConfigError, match="num_mini_batches"):
        PPOTrainer(args=PPOConfig(**ppo_settings(tmp_path, num_mini_batches=0)), **ppo_models())


# ---- beside TRL's own ---------------------------------------------------------------------------


def replayed(rollouts: list[dict[tuple[int, ...], list[int]]], temperature: float) -> Any:
    """TRL's `batch_generation`, answering each prompt of the n-th call with what was drawn then."""
    calls = iter(rollouts)

    @torch.no_grad()
    def batch_generation(model: Any, queries: torch.Tensor, *_: Any) -> tuple[Any, Any]:
        drawn = next(calls)
        rows = [drawn[tuple(q)] for q in queries.tolist()]
        responses = torch.tensor(rows, device=queries.device)
        ids = torch.cat([queries, responses], 1)
        logits = model(ids).logits[:, queries.shape[1] - 1 : -1]
        return ids, logits / (temperature + 1e-7)

    return batch_generation


COMPARED = (
    *("objective/rlhf_reward", "objective/non_score_reward", "objective/kl", "objective/entropy"),
    *("loss/policy_avg", "loss/value_avg"),
)


@pytest.mark.parametrize("whiten", [False, True])
def test_training_on_equal_responses_has_their_statistics(
    whiten: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three steps. All prompts in one microbatch, of which no response ends early: where a loss is
    averaged, and where a score lands, are no matter then.
    """
    try:
        version = importlib.metadata.version("trl")
    except importlib.metadata.PackageNotFoundError:
        version = ""
    if version != "1.12.0":
        pytest.skip("needs TRL 1.12")
    options = {
        "per_device_train_batch_size": 64,
        "gradient_accumulation_steps": 1,
        "total_episodes": 192,
        "stop_token": None,
        "num_ppo_epochs": 1,
        "whiten_rewards": whiten,
    }
    drawn: list[dict[tuple[int, ...], list[int]]] = []

    def keep(step: int, output: Any) -> None:
        rollout = output.experience.scored.rollout
        prompts = rollout.prompts.sequences
        starts = prompts.cu_seqlens.tolist()
        rows = [tuple(prompts.ids[a:b].tolist()) for a, b in itertools.pairwise(starts)]
        drawn.append(dict(zip(rows, rollout.response_ids(), strict=True)))

    ours = PPOTrainer(args=PPOConfig(**ppo_settings(tmp_path / "ours", **options)), **ppo_models())
    logged = ours.trainer.on_step
    ours.trainer.on_step = lambda step, output: (keep(step, output), logged(step, output))[1]
    ours.train()

    ppo = importlib.import_module("trl.experimental.ppo.ppo_trainer")
    config = importlib.import_module("trl.experimental.ppo").PPOConfig
    args = config(**ppo_settings(tmp_path / "theirs", **options))
    monkeypatch.setattr(ppo, "batch_generation", replayed(drawn, args.temperature))
    models = ppo_models()
    # TRL takes a drawn pad token for padding.
    models["processing_class"].add_special_tokens({"pad_token": "<none>"})
    set_seed(0)
    theirs = ppo.PPOTrainer(args=args, **models)
    theirs.train()
    logs = [log for log in theirs.state.log_history if "objective/scores" in log]
    assert len(logs) == len(ours.state.log_history) == 3
    for name in COMPARED:
        expected, found = torch.tensor([[log[name] for log in logs], series(ours, name)]).double()
        # Whitened rewards are divided by the biased spread here, with Bessel's correction there.
        bessel = 1 / (64 * LIMIT) if whiten else 0.0
        torch.testing.assert_close(found[0], expected[0], rtol=1e-5 + bessel, atol=1e-5)
        # Adam divides small gradients by small gradients: what is rounding becomes a step.
        torch.testing.assert_close(found[1:], expected[1:], rtol=2e-2, atol=2e-3)
