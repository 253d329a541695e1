"""A user's mistake is one message with code, place and remedy, and it costs nothing.

Every case runs through the command line twice: the stage itself, and `check`, which must say the
same without writing anything.
"""

from __future__ import annotations

import gzip
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.models.tiny import build, build_classifier, tokenizer
from tests.robustness.workshop import Workshop, digest, require_refused

Damage = Callable[[Workshop], list[str]]


@dataclass(frozen=True)
class Case:
    """Damage, and the message it must lead to."""

    damage: Damage
    stage: str
    code: str
    words: tuple[str, ...]
    exit_code: int
    check: bool


CASES: list[Case] = []


def case(
    code: str, *words: str, stage: str = "ppo", exit_code: int = 2, check: bool = True
) -> Callable[[Damage], Damage]:
    """Register damage; `check` says that `rlhf-fast check` can see it too."""

    def register(damage: Damage) -> Damage:
        CASES.append(Case(damage, stage, code, words, exit_code, check))
        return damage

    return register


# --- config and command line -------------------------------------------------------------------


@case("RF1004", "algoritm.gamma", "did you mean algorithm.gamma?")
def unknown_key(w: Workshop) -> list[str]:
    return ["algoritm.gamma=1"]


@case("RF1004", "config.yaml", "kl.coeff", "did you mean kl.coef?")
def unknown_key_in_a_file(w: Workshop) -> list[str]:
    return ["--config", str(w.write("config.yaml", "kl:\n  coeff: 0.1\n"))]


@case("RF1004", "total_steps='many': expected a whole number", "kl.adaptive='maybe'")
def wrong_types_all_at_once(w: Workshop) -> list[str]:
    return ["total_steps=many", "kl.adaptive=maybe"]


@case("RF1005", "kl.coef=-1", "algorithm.gamma=2", "actor_optim.lr=nan", "clip_eps_low=0.0")
def out_of_range_all_at_once(w: Workshop) -> list[str]:
    return [
        *("kl.coef=-1", "algorithm.gamma=2", "actor_optim.lr=nan"),
        "algorithm.clip_eps_low=0",
    ]


@case("RF1005", "critic_optim.lr=inf", "total_steps=0", "sampling.temperature=-1")
def infinite_and_zero(w: Workshop) -> list[str]:
    return ["critic_optim.lr=inf", "total_steps=0", "sampling.temperature=-1"]


@case("RF1005", "sampling.temperature=0", "0.7 to 1.0")
def greedy_rollouts(w: Workshop) -> list[str]:
    return ["sampling.temperature=0"]


@case("RF1005", "algorithm.minibatches=3", "rollout.prompts=4", "take 2 or 4")
def minibatches_that_do_not_divide(w: Workshop) -> list[str]:
    return ["algorithm.minibatches=3"]


@case("RF1005", "run.overwrite", "run.resume=always")
def contradicting_keys(w: Workshop) -> list[str]:
    return ["run.overwrite=true", "run.resume=always"]


@case("RF1005", "data.max_prompt_length=16", "max_new_tokens=40", "data.max_length=48")
def lengths_that_do_not_add_up(w: Workshop) -> list[str]:
    return ["sampling.max_new_tokens=40"]


@case("RF1005", "run.sinks", "'prometheus'", "wandb")
def unknown_sink(w: Workshop) -> list[str]:
    return ["run.sinks=[prometheus]"]


@case("RF1005", "ptx.data")
def pretraining_without_data(w: Workshop) -> list[str]:
    return ["ptx.coef=1"]


@case("RF1002", "config.yaml:3", "spaces")
def yaml_with_a_tab(w: Workshop) -> list[str]:
    return ["--config", str(w.write("config.yaml", "kl:\n  coef: 0.1\n\ttarget: 3\n"))]


@case("RF1002", "config.yaml:2", "duplicate key")
def yaml_with_a_key_twice(w: Workshop) -> list[str]:
    return ["--config", str(w.write("config.yaml", "total_steps: 1\ntotal_steps: 2\n"))]


@case("RF1002", "config.yaml")
def yaml_that_would_run_code(w: Workshop) -> list[str]:
    harm = f"a: !!python/object/apply:pathlib.Path.touch [!!python/object:{w.path}/harm]\n"
    return ["--config", str(w.write("config.yaml", harm))]


@case("RF1002", "aliases")
def yaml_alias_bomb(w: Workshop) -> list[str]:
    levels = [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 20)]
    return ["--config", str(w.write("config.yaml", "\n".join(["a0: &a0 [1]", *levels])))]


@case("RF1002", "UTF-8")
def config_that_is_no_text(w: Workshop) -> list[str]:
    return ["--config", str(w.write("config.yaml", b"total_steps: \xff\xfe\n"))]


@case("RF1001", "nowhere.yaml")
def config_file_missing(w: Workshop) -> list[str]:
    return ["--config", str(w.path / "nowhere.yaml")]


@case("RF1003", "command line", "key=value")
def override_without_a_value(w: Workshop) -> list[str]:
    return ["total_steps"]


@case("RF1031", "model, data.train", stage="sft")
def required_settings_empty(w: Workshop) -> list[str]:
    return ["model=", "data.train="]


@case("RF1030", "run.device")
def unknown_device(w: Workshop) -> list[str]:
    return ["run.device=tpu"]


@case("RF1032", "microbatch_tokens=8", stage="sft", check=False)
def token_budget_below_a_row(w: Workshop) -> list[str]:
    w.rows("demonstrations.jsonl", [{"prompt": "w4 " * 9, "completion": " w5"}])
    return ["microbatch_tokens=8"]


# --- data ----------------------------------------------------------------------------------------


@case("RF2001", "demonstration.jsonl", "did you mean", stage="sft")
def data_file_missing(w: Workshop) -> list[str]:
    return [f"data.train={w.path}/demonstration.jsonl"]


@case("RF2001", "held.jsonl", stage="rm")
def evaluation_file_missing(w: Workshop) -> list[str]:
    return [f"data.eval={w.path}/held.jsonl"]


@case("RF2001", "pretraining.jsonl")
def pretraining_file_missing(w: Workshop) -> list[str]:
    return ["ptx.coef=1", f"ptx.data={w.path}/pretraining.jsonl"]


@case("RF2001", "people.jsonl", stage="rm")
def calibration_file_missing(w: Workshop) -> list[str]:
    return [f"demonstrations={w.path}/people.jsonl"]


@case("RF2002", "prompts.jsonl")
def data_is_a_directory(w: Workshop) -> list[str]:
    return [f"data.train={w.path}"]


@case("RF2003", "empty.jsonl")
def data_file_empty(w: Workshop) -> list[str]:
    return [f"data.train={w.write('empty.jsonl', '')}"]


@case("RF2005", "bad.jsonl:2")
def broken_json(w: Workshop) -> list[str]:
    text = '{"prompt": "w4"}\n{"prompt": "w5",,}\n{"prompt": "w6"}\n'
    return [f"data.train={w.write('bad.jsonl', text)}"]


@case("RF2006", "cut.jsonl:2")
def truncated_last_line(w: Workshop) -> list[str]:
    file = w.write("cut.jsonl", '{"prompt": "w4"}\n{"prompt": "w')
    return [f"data.train={file}"]


@case("RF2020", "ranked.jsonl:1", "chosen", stage="rm")
def missing_column(w: Workshop) -> list[str]:
    w.rows("ranked.jsonl", [{"prompt": "w4", "better": " w5", "worse": " w6"}])
    return []


@case("RF2021", "prompts.jsonl:2", "prompt")
def null_where_text_is_expected(w: Workshop) -> list[str]:
    w.rows("prompts.jsonl", [{"prompt": "w4"}, {"prompt": None}])
    return []


@case("RF2021", "demonstrations.jsonl:1", "completion", stage="sft")
def number_where_text_is_expected(w: Workshop) -> list[str]:
    w.rows("demonstrations.jsonl", [{"prompt": "w4", "completion": 7}])
    return []


@case("RF2008", "raw.jsonl:2")
def invalid_utf8(w: Workshop) -> list[str]:
    file = w.write("raw.jsonl", b'{"prompt": "w4"}\n{"prompt": "\xff"}\n')
    return [f"data.train={file}"]


@case("RF2009", "nul.jsonl:1", "prompt")
def nul_in_text(w: Workshop) -> list[str]:
    file = w.write("nul.jsonl", '{"prompt": "w4\\u0000"}\n')
    return [f"data.train={file}"]


@case("RF2011", "packed.jsonl", "gzip")
def gzip_named_jsonl(w: Workshop) -> list[str]:
    return [f"data.train={w.write('packed.jsonl', gzip.compress(b'{}'))}"]


@case("RF2050", "prompts.jsonl:2", "data.max_prompt_length")
def overlong_prompt_under_error(w: Workshop) -> list[str]:
    w.rows("prompts.jsonl", [{"prompt": "w4"}, {"prompt": "w5 " * 40}])
    return ["data.overlong=error"]


@case("RF2004", "0 of 2 rows", "overlong")
def every_prompt_overlong_under_filter(w: Workshop) -> list[str]:
    w.rows("prompts.jsonl", [{"prompt": "w5 " * 40}, {"prompt": "w6 " * 41}])
    return []


@case("RF2025", "prompts.jsonl:2", "empty")
def empty_prompt(w: Workshop) -> list[str]:
    w.rows("prompts.jsonl", [{"prompt": "w4"}, {"prompt": ""}])
    return []


@case("RF2028", "ranked.jsonl", "chosen and rejected", stage="rm")
def chosen_equals_rejected(w: Workshop) -> list[str]:
    w.rows("ranked.jsonl", [{"prompt": "w4", "chosen": " w5", "rejected": " w5"}] * 3)
    return []


@case("RF2023", "demonstrations.jsonl:1", "narrator", stage="sft")
def unknown_role(w: Workshop) -> list[str]:
    turns = [{"role": "narrator", "content": "w4"}, {"role": "assistant", "content": "w5"}]
    w.rows("demonstrations.jsonl", [{"messages": turns}])
    return []


@case("RF2045", "template.jinja", stage="sft")
def chat_template_missing(w: Workshop) -> list[str]:
    return [f"data.chat_template={w.path}/template.jinja"]


@case("RF2013", "bad.jsonl", "max_bad_rows=1")
def too_many_bad_rows(w: Workshop) -> list[str]:
    file = w.write("bad.jsonl", "x\ny\nz\n")
    return [f"data.train={file}", "data.on_bad_row=skip", "data.max_bad_rows=1"]


@case("RF2061", "12 examples", "rollout.prompts")
def fewer_prompts_than_a_batch(w: Workshop) -> list[str]:
    return ["rollout.prompts=13"]


# --- models and tokenizers -----------------------------------------------------------------------


@case("RF3010", "polcy")
def model_missing(w: Workshop) -> list[str]:
    return [f"actor={w.path}/polcy"]


@case("RF3011", "config.json", stage="sft")
def model_directory_without_config(w: Workshop) -> list[str]:
    (w.path / "policy" / "config.json").unlink()
    return []


@case("RF3012", "config.json", stage="eval")
def config_json_broken(w: Workshop) -> list[str]:
    w.write("policy/config.json", "{")
    return []


@case("RF3019", "policy")
def tokenizer_missing(w: Workshop) -> list[str]:
    (w.path / "policy" / "tokenizer.json").unlink()
    return []


def _without_eos(folder: Path) -> None:
    plain = tokenizer()
    plain.eos_token = None
    plain.save_pretrained(folder)


@case("RF3040", "policy", "eos_token")
def tokenizer_without_eos(w: Workshop) -> list[str]:
    _without_eos(w.path / "policy")
    return []


@case("RF3021", "ids up to 49", "37 embedding rows", "model", stage="sft")
def vocabulary_larger_than_the_embedding(w: Workshop) -> list[str]:
    tokenizer(50).save_pretrained(w.path / "policy")
    return []


@case("RF3021", "36 embedding rows", stage="rm")
def vocabulary_larger_than_the_embedding_of_a_judge(w: Workshop) -> list[str]:
    build_classifier(vocab_size=36).save_pretrained(w.path / "judge")
    return [f"model={w.path}/judge"]


@case("RF3023", "policy, reward model")
def reward_model_with_another_tokenizer(w: Workshop) -> list[str]:
    tokenizer(36).save_pretrained(w.path / "judge")
    return []


def _small_vocabulary(folder: Path, module: Any) -> None:
    module.save_pretrained(folder)
    tokenizer(36).save_pretrained(folder)


@case("RF3023", "actor, reference")
def reference_with_another_tokenizer(w: Workshop) -> list[str]:
    _small_vocabulary(w.path / "other", build(vocab_size=36))
    return [f"reference={w.path}/other"]


@case("RF3023", "actor, critic")
def critic_with_another_tokenizer(w: Workshop) -> list[str]:
    _small_vocabulary(w.path / "other", build_classifier(vocab_size=36))
    return [f"critic={w.path}/other"]


@case("RF3023", "reference", stage="eval")
def evaluation_against_another_tokenizer(w: Workshop) -> list[str]:
    _small_vocabulary(w.path / "other", build(vocab_size=36))
    return [f"reference={w.path}/other"]


@case("RF3017", "1 missing", "model.norm.weight")
def weight_missing(w: Workshop) -> list[str]:
    w.edit_weights("policy", lambda weights: weights.pop("model.norm.weight"))
    return []


@case("RF3017", "1 mis-shaped", "model.norm.weight [15] instead of [16]")
def weight_misshaped(w: Workshop) -> list[str]:
    w.edit_weights("policy", lambda x: x.update({"model.norm.weight": torch.ones(15)}))
    return []


@case("RF3016", "model.safetensors")
def weights_truncated(w: Workshop) -> list[str]:
    file = w.path / "judge" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    return []


@case("RF3020", "model.norm.weight")
def weights_not_a_number(w: Workshop) -> list[str]:
    w.edit_weights("policy", lambda x: x["model.norm.weight"].fill_(torch.nan))
    return []


@case("RF3014", "pytorch_model.bin", "safetensors")
def weights_pickled(w: Workshop) -> list[str]:
    folder = w.path / "policy"
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    return []


@case("RF3015", "policy")
def no_weights(w: Workshop) -> list[str]:
    (w.path / "policy" / "model.safetensors").unlink()
    return []


@case("RF3013", "config.json", "never run")
def model_that_brings_code(w: Workshop) -> list[str]:
    w.edit_json("policy/config.json", model_type="mine", auto_map={"AutoModel": "m.Model"})
    return []


@case("RF3018", "policy", "reward head")
def reward_model_without_a_head(w: Workshop) -> list[str]:
    return [f"reward.model={w.path}/policy"]


@case("RF3018", "policy", "init_head=true", stage="rm")
def no_head_where_none_may_be_made(w: Workshop) -> list[str]:
    return ["init_head=false"]


@case("RF3022", "64 positions")
def response_beyond_the_positions(w: Workshop) -> list[str]:
    return ["sampling.max_new_tokens=64", "data.max_length=80"]


@case("RF3022", "32 positions")
def response_beyond_the_positions_of_the_reference(w: Workshop) -> list[str]:
    build(max_position_embeddings=32).save_pretrained(w.path / "other")
    tokenizer().save_pretrained(w.path / "other")
    return [f"reference={w.path}/other", "sampling.max_new_tokens=32", "data.max_length=48"]


@case("RF3022", "32 positions")
def response_beyond_the_positions_of_the_judge(w: Workshop) -> list[str]:
    build_classifier(max_position_embeddings=32).save_pretrained(w.path / "judge")
    return ["sampling.max_new_tokens=32", "data.max_length=48"]


@case("RF3050", "12 positions", stage="sft")
def row_beyond_the_positions(w: Workshop) -> list[str]:
    build(max_position_embeddings=12).save_pretrained(w.path / "policy")
    w.rows("demonstrations.jsonl", [{"prompt": "w4 " * 20, "completion": " w5"}])
    return []


# --- rewards -------------------------------------------------------------------------------------


@case("RF5008", "rewards.py")
def reward_file_missing(w: Workshop) -> list[str]:
    return [f"reward.function={w.path}/rewards.py:score"]


@case("RF5008", "file.py:name")
def reward_function_without_a_name(w: Workshop) -> list[str]:
    return [f"reward.function={w.path}/reward.py"]


@case("RF5009", "reward.py", "one of score")
def reward_function_missing(w: Workshop) -> list[str]:
    return [f"reward.function={w.path}/reward.py:scores"]


@case("RF5010", "reward.py:1")
def reward_file_broken(w: Workshop) -> list[str]:
    w.write("reward.py", "import a_package_that_is_not_there\n")
    return [f"reward.function={w.path}/reward.py:score"]


def _returning(expression: str) -> Damage:
    def damage(w: Workshop) -> list[str]:
        text = f"def score(completions, **columns):\n    return {expression}\n"
        return [f"reward.function={w.write('reward.py', text)}:score"]

    return damage


for _name, _expression, _code, _words in (
    ("raises", "[1 / 0 for _ in completions]", "RF5004", ("reward.py:2", "ZeroDivisionError")),
    ("nan", "[float('nan')] * len(completions)", "RF5007", ("row 0", "nan")),
    ("infinite", "[0.0, -float('inf'), 0.0, 0.0]", "RF5007", ("row 1", "-inf")),
    ("text", "['good'] * len(completions)", "RF5007", ("row 0", "'good'")),
    ("one_text", "'good'", "RF5005", ("str", "list of 4")),
    ("nothing", "None", "RF5005", ("NoneType", "list of 4")),
    ("wrong_length", "[0.0] * 3", "RF5005", ("3 values", "list of 4")),
    ("wrong_token_count", "[[0.0] * 99] * 4", "RF5006", ("row 0", "99 per-token")),
):
    _damage = _returning(_expression)
    _damage.__name__ = f"reward_function_returns_{_name}"
    case(_code, "reward.py", *_words, check=False)(_damage)


# --- what every case must do ---------------------------------------------------------------------


def _each(check_only: bool = False) -> list[Any]:
    chosen = [c for c in CASES if c.check or not check_only]
    return [pytest.param(c, id=c.damage.__name__) for c in chosen]


def _left_behind(out: Path) -> list[str]:
    """Everything in an output directory but the lock file."""
    return [p.name for p in out.iterdir() if p.name != "run.lock"] if out.exists() else []


@pytest.mark.parametrize("c", _each())
def test_refused_before_any_work(c: Case, workshop: Workshop) -> None:
    changes = c.damage(workshop)
    outcome = workshop.run(c.stage, *changes)
    require_refused(outcome, c.code, c.exit_code, *c.words)
    # Mending the input must be enough: no trace of the attempt stands in the way of the next.
    assert _left_behind(workshop.out) == []
    assert not (workshop.path / "harm").exists()


@pytest.mark.parametrize("c", _each(check_only=True))
def test_check_says_the_same(c: Case, workshop: Workshop) -> None:
    changes = c.damage(workshop)
    before = digest(workshop.path)
    outcome = workshop.call("check", c.stage, *workshop.arguments(c.stage, *changes))
    require_refused(outcome, c.code, c.exit_code, *c.words)
    assert digest(workshop.path) == before
    assert not workshop.out.exists()


@pytest.mark.parametrize("stage", ["sft", "rm", "ppo", "eval"])
def test_check_of_sound_input_passes_and_writes_nothing(stage: str, workshop: Workshop) -> None:
    before = digest(workshop.path)
    outcome = workshop.call("check", stage, *workshop.arguments(stage))
    assert outcome.code == 0, outcome.err
    assert "check passed" in outcome.out
    assert digest(workshop.path) == before
    assert not workshop.out.exists()


@pytest.mark.parametrize("stage", ["sft", "rm", "eval", "ppo"])
def test_an_earlier_run_survives_a_mistake(stage: str, workshop: Workshop) -> None:
    assert workshop.run(stage).code == 0
    before = digest(workshop.out)
    key = "data.eval" if stage == "eval" else "data.train"
    mistake = f"{key}={workshop.path}/nowhere.jsonl"
    refused = workshop.run(stage, mistake)
    assert refused.code == 2
    assert refused.message
    assert digest(workshop.out) == before
    # Not even the wish to discard it counts before the new run can start.
    require_refused(workshop.run(stage, mistake, "run.overwrite=true"), "RF2001", 2, "nowhere")
    assert digest(workshop.out) == before
    assert workshop.run(stage, "run.overwrite=true").code == 0


@pytest.mark.parametrize("what", ["model", "data"])
def test_a_hub_name_that_is_not_cached_fails_at_once(what: str, workshop: Workshop) -> None:
    name = "no-such-owner/no-such-name"
    begin = time.monotonic()
    outcome = workshop.run("sft", f"model={name}" if what == "model" else f"data.train={name}")
    assert time.monotonic() - begin < 5
    require_refused(outcome, "RF3010" if what == "model" else "RF2014", outcome.code, name)
    assert outcome.code in (2, 3)


def test_a_mended_input_needs_nothing_but_the_same_command(workshop: Workshop) -> None:
    good = (workshop.path / "demonstrations.jsonl").read_bytes()
    workshop.write("demonstrations.jsonl", b'{"prompt": 1}\n')
    assert workshop.run("sft").code == 2
    workshop.write("demonstrations.jsonl", good)
    assert workshop.run("sft").code == 0
    assert json.loads((workshop.out / "complete.json").read_text())["step"] == 2


def test_an_empty_override_unsets_what_a_file_sets(workshop: Workshop) -> None:
    text = f"reference: {workshop.path}/nowhere\nsampling:\n  stop: [w5]\n"
    file = workshop.write("config.yaml", text)
    arguments = workshop.arguments("ppo", "reference=", "sampling.stop=")
    outcome = workshop.call("ppo", *arguments, "--config", str(file), "--print-config")
    assert "reference: ''" in outcome.out
    assert "stop: []" in outcome.out
