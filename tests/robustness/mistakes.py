"""What people get wrong in config and data, and the message it must lead to.

A case damages a `Workshop` and returns the overrides that go with it.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from dataclasses import dataclass

from tests.robustness.workshop import Workshop

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


@case("RF1005", "run.seed=18446744073709551616", "at most 18446744073709551615", stage="sft")
def seed_beyond_the_generators(w: Workshop) -> list[str]:
    return ["run.seed=18446744073709551616"]


@case("RF4038", "page_size=3: an integer, at least 4")
def pages_that_transformers_refuses(w: Workshop) -> list[str]:
    return ["engine.path=transformers", "engine.page_size=3"]


@case("RF4038", "page_size=3: an integer, at least 4", stage="eval")
def pages_that_transformers_refuses_in_an_evaluation(w: Workshop) -> list[str]:
    return ["engine.path=transformers", "engine.page_size=3"]


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


@case("RF2070", "all 2 rows", "eval_fraction", stage="rm")
def one_prompt_of_which_none_can_be_held_out(w: Workshop) -> list[str]:
    pair = {"prompt": "w4", "chosen": " w5", "rejected": " w6"}
    w.rows("ranked.jsonl", [pair, pair | {"chosen": " w7"}])
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


def _pretraining(w: Workshop, words: int, *changes: str) -> list[str]:
    file = w.write("texts.jsonl", json.dumps({"text": "w4 " * words}) + "\n")
    return [f"ptx.data={file}", "ptx.coef=1", "ptx.batch_size=1", "data.max_length=99", *changes]


@case("RF3050", "91 tokens, the model 64 positions", "data.max_length")
def pretraining_text_beyond_the_positions(w: Workshop) -> list[str]:
    return _pretraining(w, 90)


@case("RF1032", "at least 51", "microbatch_tokens")
def pretraining_text_beyond_the_token_budget(w: Workshop) -> list[str]:
    return _pretraining(w, 50, "microbatch_tokens=50")


@case("RF2061", "12 examples", "rollout.prompts")
def fewer_prompts_than_a_batch(w: Workshop) -> list[str]:
    return ["rollout.prompts=13"]


@case("RF2061", "12 examples", "pretraining data", "ptx.batch_size")
def fewer_texts_than_a_batch(w: Workshop) -> list[str]:
    return ["ptx.coef=1", f"ptx.data={w.path}/demonstrations.jsonl", "ptx.batch_size=13"]
