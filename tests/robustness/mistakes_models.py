"""What people get wrong in models, tokenizers and rewards, and the message it must lead to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.models.tiny import build, build_classifier, tokenizer
from tests.robustness.mistakes import CASES, Damage, case
from tests.robustness.workshop import Workshop

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


def _granite(w: Workshop) -> None:
    """transformers has no sequence classifier of this architecture."""
    build("granite").save_pretrained(w.path / "policy")


@case("RF3028", "granite", "policy", stage="rm")
def reward_model_of_an_architecture_without_classifier(w: Workshop) -> list[str]:
    _granite(w)
    return []


@case("RF3028", "granite", "lora.merge_on_export", stage="rm")
def merged_reward_model_of_an_architecture_without_classifier(w: Workshop) -> list[str]:
    _granite(w)
    return ["lora.rank=2", "lora.merge_on_export=true"]


@case("RF3028", "granite", "critic")
def critic_of_an_architecture_without_classifier(w: Workshop) -> list[str]:
    _granite(w)
    return ["reward.model=", f"reward.function={w.path}/reward.py:score"]


@case("RF3028", "granite", "memory.value_head=actor")
def value_head_that_could_not_be_exported(w: Workshop) -> list[str]:
    _granite(w)
    function = f"reward.function={w.path}/reward.py:score"
    return ["reward.model=", function, "memory.value_head=actor"]


@case("RF4032", "no fused forward for gpt2")
def path_that_cannot_run_the_actor(w: Workshop) -> list[str]:
    build("gpt2").save_pretrained(w.path / "policy")
    return ["engine.path=fused", f"reference={w.path}/policy", f"critic={w.path}/judge"]


@case("RF4032", "attention torch_varlen cannot run")  # float32 is not for it, nor is a CPU
def attention_that_cannot_run_here(w: Workshop) -> list[str]:
    return ["engine.attention=torch_varlen"]


@case("RF4032", "fp32 masters", stage="eval")
def path_that_cannot_run_the_type(w: Workshop) -> list[str]:
    return ["engine.path=transformers", "run.dtype=bfloat16"]


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


ALL_CASES = tuple(CASES)
