"""Odd but legal input: it works, and what is odd about it is counted or said."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from rlhf_fast.metrics import read_metrics
from tests.models.tiny import EOS, build, tokenizer
from tests.robustness.workshop import Outcome, Workshop, require_refused


def one_token_policy(w: Workshop, token: int | None, scale: float = 50.0) -> None:
    """A policy whose logits are constant: `scale` for `token`, or -`scale` for EOS, 0 elsewhere."""
    module = build("gpt2", tie_word_embeddings=False)
    with torch.no_grad():
        module.transformer.ln_f.weight.zero_()
        module.transformer.ln_f.bias.zero_()
        module.transformer.ln_f.bias[0] = 1.0
        module.lm_head.weight.zero_()
        module.lm_head.weight[EOS if token is None else token, 0] = (
            -scale if token is None else scale
        )
    module.save_pretrained(w.path / "policy")


def rewarded(w: Workshop, expression: str, *changes: str) -> Outcome:
    """PPO on a reward function alone that returns `expression`."""
    file = w.write("reward.py", f"def score(completions, **_):\n    return {expression}\n")
    function = f"reward.function={file}:score"
    return w.run("ppo", "reward.model=", function, *changes)


def metrics(w: Workshop) -> list[dict[str, Any]]:
    return read_metrics(w.out / "metrics.jsonl")


def require_finite_weights(w: Workshop) -> None:
    module = AutoModelForCausalLM.from_pretrained(w.out / "model")
    assert all(bool(p.isfinite().all()) for p in module.parameters())


def test_empty_responses(workshop: Workshop) -> None:
    one_token_policy(workshop, EOS)
    outcome = workshop.run("ppo")
    assert outcome.code == 0, outcome.err
    assert {row["rollout/length"] for row in metrics(workshop)} == {1.0}
    assert {row["rollout/ended_fraction"] for row in metrics(workshop)} == {1.0}
    samples = (workshop.out / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    assert {json.loads(line)["response"] for line in samples} == {""}
    require_finite_weights(workshop)


def test_responses_that_never_end(workshop: Workshop) -> None:
    one_token_policy(workshop, None)
    outcome = workshop.run("ppo")
    assert outcome.code == 0, outcome.err
    assert outcome.out.count("hint: no response ended by itself") == 1
    assert "SFT data ends in EOS" in outcome.out
    assert {row["rollout/length"] for row in metrics(workshop)} == {5.0}
    assert {row["rollout/ended_fraction"] for row in metrics(workshop)} == {0.0}
    require_finite_weights(workshop)


def test_logits_that_overflow_abort_the_rollout(workshop: Workshop) -> None:
    one_token_policy(workshop, 5, scale=3e38)
    weights = "transformer.ln_f.bias"
    workshop.edit_weights("policy", lambda x: x[weights].fill_(3e38))
    outcome = workshop.run("ppo")
    require_refused(outcome, "RF4010", 4, "response token 0", "all parameters are finite")
    assert not (workshop.out / "model").exists()


def test_pad_equal_to_eos_through_all_stages(workshop: Workshop) -> None:
    words = tokenizer()
    words.pad_token = words.eos_token
    for name in ("policy", "judge"):
        words.save_pretrained(workshop.path / name)
        workshop.edit_json(f"{name}/config.json", pad_token_id=EOS)
    out = workshop.path
    assert workshop.run("sft", f"run.output_dir={out}/1").code == 0
    assert workshop.run("rm", f"run.output_dir={out}/2", f"model={out}/1/model").code == 0
    outcome = workshop.run("ppo", f"actor={out}/1/model", f"reward.model={out}/2/model")
    assert outcome.code == 0, outcome.err
    rows = metrics(workshop)
    assert all(row["val/first_ratio_gap"] < 1e-3 for row in rows)
    assert workshop.run("eval", f"model={out}/out/model", f"run.output_dir={out}/4").code == 0


def test_rows_that_abstain_take_no_part(workshop: Workshop) -> None:
    outcome = rewarded(workshop, "[None, 1.0, 0.0, None]")
    assert outcome.code == 0, outcome.err
    assert {row["rollout/scored_fraction"] for row in metrics(workshop)} == {0.5}
    samples = (workshop.out / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["score"] is None for line in samples] == [True, False, False, True] * 2


@pytest.mark.parametrize("estimator", ["gae", "rloo", "grpo"])
def test_rows_that_all_abstain_change_no_weight(estimator: str, workshop: Workshop) -> None:
    changes = [f"algorithm.estimator={estimator}", "rollout.samples_per_prompt=2"]
    outcome = rewarded(workshop, "[None] * len(completions)", *changes)
    assert outcome.code == 0, outcome.err
    assert {row["rollout/scored_fraction"] for row in metrics(workshop)} == {0.0}
    after = AutoModelForCausalLM.from_pretrained(workshop.out / "model").state_dict()
    before = AutoModelForCausalLM.from_pretrained(workshop.path / "policy").state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("estimator", ["gae", "rloo", "grpo"])
def test_constant_rewards_are_said_and_harmless(estimator: str, workshop: Workshop) -> None:
    changes = [f"algorithm.estimator={estimator}", "rollout.samples_per_prompt=2"]
    outcome = rewarded(workshop, "[3.0] * len(completions)", *changes, "reward.missing_eos=none")
    assert outcome.code == 0, outcome.err
    assert "every response of a batch got the same score" in outcome.out
    require_finite_weights(workshop)


@pytest.mark.parametrize("normalize", ["true", "false"])
def test_huge_rewards_are_clipped(normalize: str, workshop: Workshop) -> None:
    outcome = rewarded(workshop, "[1e30, -1e30, 0.0, 1e30]", f"reward.normalize={normalize}")
    assert outcome.code == 0, outcome.err
    assert all(abs(row["objective/shaped_scores"]) <= 11 for row in metrics(workshop))
    require_finite_weights(workshop)


def test_an_exception_may_abstain(workshop: Workshop) -> None:
    outcome = rewarded(workshop, "1 / 0", "reward.on_error=abstain")
    assert outcome.code == 0, outcome.err
    assert "warning: all 4 rows abstain: RF5004" in outcome.err
    assert {row["rollout/scored_fraction"] for row in metrics(workshop)} == {0.0}


@pytest.mark.parametrize(("policy", "kept"), [("filter", 11), ("truncate-left", 12)])
def test_overlong_prompts_are_counted(policy: str, kept: int, workshop: Workshop) -> None:
    rows = [json.loads(line) for line in (workshop.path / "prompts.jsonl").open(encoding="utf-8")]
    rows[3]["prompt"] = "w5 " * 40
    workshop.rows("prompts.jsonl", rows)
    outcome = workshop.run("ppo", f"data.overlong={policy}")
    assert outcome.code == 0, outcome.err
    assert f"{kept} of 12 rows kept" in outcome.out
    what = "truncated prompt: 1" if policy == "truncate-left" else "left out, overlong: 1"
    assert what in outcome.out


def test_bad_rows_may_be_skipped_and_are_named(workshop: Workshop) -> None:
    file = workshop.path / "prompts.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines()
    workshop.write("prompts.jsonl", "\n".join([*lines[:2], "{oops", *lines[2:], '{"prompt": ""}']))
    outcome = workshop.run("ppo", "data.on_bad_row=skip")
    assert outcome.code == 0, outcome.err
    assert "12 of 14 rows kept" in outcome.out
    assert "prompts.jsonl:3" in outcome.out


def test_identical_pairs_are_left_out_and_counted(workshop: Workshop) -> None:
    rows = [json.loads(line) for line in (workshop.path / "ranked.jsonl").open(encoding="utf-8")]
    workshop.rows("ranked.jsonl", [*rows, {"prompt": "w4", "chosen": " w5", "rejected": " w5"}])
    outcome = workshop.run("rm")
    assert outcome.code == 0, outcome.err
    assert "identical completions: 1" in outcome.out


def test_control_tokens_in_text_are_text(workshop: Workshop) -> None:
    workshop.rows("prompts.jsonl", [{"prompt": f"w{i + 4} <eos> w9"} for i in range(4)])
    outcome = workshop.run("ppo")
    assert outcome.code == 0, outcome.err
    assert all(math.isfinite(row["objective/kl"]) for row in metrics(workshop))


def test_paths_with_spaces_and_other_scripts(workshop: Workshop) -> None:
    out = workshop.path / "мой прогон 日本 'x'"
    outcome = workshop.run("sft", f"run.output_dir='{workshop.path}/мой прогон 日本'")
    assert outcome.code == 0, outcome.err
    assert (out.parent / "мой прогон 日本" / "complete.json").exists()
