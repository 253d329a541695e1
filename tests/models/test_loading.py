"""Loading is strict: every way a model directory can be wrong is one clear error."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Gemma2ForCausalLM, Gemma2PreTrainedModel

from rlhf_fast.errors import ModelError
from rlhf_fast.models.checks import (
    check_context,
    check_same_tokenizer,
    check_vocabulary,
    choose_pad_token,
)
from rlhf_fast.models.directory import stop_ids, write_manifest
from rlhf_fast.models.forward import compute_dtype
from rlhf_fast.models.heads import Calibration, get_calibration, set_calibration
from rlhf_fast.models.loading import (
    critic_from,
    load_causal_lm,
    load_critic,
    load_sequence_classifier,
    load_tokenizer,
)
from rlhf_fast.models.roles import Critic
from tests.models.tiny import VOCAB, build, build_classifier, random_sequences, tokenizer

WEIGHTS = "model.safetensors"


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A stock directory of a tiny Llama with dropout in its config."""
    build("llama", attention_dropout=0.1).save_pretrained(tmp_path / "lm")
    tokenizer().save_pretrained(tmp_path / "lm")
    return tmp_path / "lm"


@pytest.fixture
def saved_rm(tmp_path: Path) -> Path:
    build_classifier("llama").save_pretrained(tmp_path / "rm")
    return tmp_path / "rm"


def edit_weights(directory: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    weights = load_file(directory / WEIGHTS)
    edit(weights)
    save_file(weights, directory / WEIGHTS, metadata={"format": "pt"})


def edit_config(directory: Path, **changes: Any) -> None:
    file = directory / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gpt_neox", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
def test_causal_lm_is_loaded_exactly(tmp_path: Path, model_type: str, tied: bool) -> None:
    original = build(model_type, tie_word_embeddings=tied)
    original.save_pretrained(tmp_path)
    loaded = load_causal_lm(tmp_path, dtype="float32")
    ids = random_sequences([9]).ids[None]
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, original.eval()(input_ids=ids).logits)
    assert not loaded.training
    # Memory of its own, not the mapped file.
    assert all(p.data_ptr() % 64 == 0 for p in loaded.parameters())


def test_masters_are_fp32_whatever_the_file_holds(tmp_path: Path) -> None:
    build("llama").bfloat16().save_pretrained(tmp_path)
    loaded = load_causal_lm(tmp_path, dtype="bfloat16")
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert compute_dtype(loaded) == "bfloat16"


def test_dropout_and_padding_idx_are_off(saved: Path) -> None:
    loaded = load_causal_lm(saved, dtype="float32").train()
    assert loaded.config.attention_dropout == 0
    assert loaded.get_input_embeddings().padding_idx is None
    ids = random_sequences([9]).ids[None]
    assert torch.equal(loaded(input_ids=ids).logits, loaded(input_ids=ids).logits)


def test_a_softcap_of_scores_is_never_left_to_sdpa(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers before 5.21 takes SDPA for these, which ignores the softcap without a word."""
    build("gemma2", attn_logit_softcapping=0.5, query_pre_attn_scalar=1).save_pretrained(tmp_path)
    monkeypatch.setattr(Gemma2PreTrainedModel, "_supports_sdpa", True)
    stock = Gemma2ForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    ids = torch.arange(3, 15)[None]
    for loaded in (
        load_causal_lm(tmp_path, dtype="float32"),
        load_critic(tmp_path, dtype="float32"),
        critic_from(load_causal_lm(tmp_path, dtype="float32")),
    ):
        assert loaded.config._attn_implementation == "eager"
        hidden = loaded.model(ids).last_hidden_state
        torch.testing.assert_close(hidden, stock.model(ids).last_hidden_state)


def test_loading_is_silent(saved: Path, capfd: pytest.CaptureFixture[str]) -> None:
    load_sequence_classifier(saved, init_head=True, dtype="float32")
    load_tokenizer(saved)
    assert capfd.readouterr() == ("", "")


def test_missing_directory_and_uncached_hub_name_fail_at_once() -> None:
    for name in ("no/such-model-of-anyone", "/nowhere/at/all", "a/b/c/d"):
        start = time.monotonic()
        with pytest.raises(ModelError, match=r"(?s)RF3010.*hf download"):
            load_causal_lm(name, dtype="float32")
        assert time.monotonic() - start < 5


def test_a_home_of_nobody_is_a_missing_directory() -> None:
    with pytest.raises(ModelError, match="RF3010"):
        load_causal_lm("~no_such_user/model", dtype="float32")


def test_a_missing_export_asks_for_its_stage() -> None:
    with pytest.raises(ModelError, match=r"(?s)RF3010.*run the stage that writes it first"):
        load_causal_lm("runs/sft/model", dtype="float32")
    with pytest.raises(ModelError, match=r"(?s)RF3010.*hf download"):
        load_causal_lm("somebody/model", dtype="float32")


def test_cached_hub_name_is_loaded_from_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = tmp_path / "models--some--name"
    commit = "0123456789abcdef0123456789abcdef01234567"
    build("llama").save_pretrained(repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert load_causal_lm("some/name", dtype="float32").config.model_type == "llama"


def test_directory_without_config(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="RF3011"):
        load_causal_lm(tmp_path, dtype="float32")


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"model_type": "no_such_type"}', "{}", '{"model_type": ["llama"]}']
)
def test_unusable_config(saved: Path, text: str) -> None:
    (saved / "config.json").write_text(text)
    with pytest.raises(ModelError, match="RF3012"):
        load_causal_lm(saved, dtype="float32")


@pytest.mark.parametrize(
    "change", [{"num_attention_heads": 3}, {"num_attention_heads": 0}, {"hidden_size": "wide"}]
)
def test_config_that_its_own_class_refuses(saved: Path, change: dict[str, Any]) -> None:
    edit_config(saved, **change)
    with pytest.raises(ModelError, match="RF3025"):
        load_causal_lm(saved, dtype="float32")


def test_remote_code_is_refused(saved: Path) -> None:
    edit_config(saved, model_type="custom", auto_map={"AutoModelForCausalLM": "modeling.Custom"})
    with pytest.raises(ModelError, match=r"(?s)RF3013.*auto_map"):
        load_causal_lm(saved, dtype="float32")


def test_an_architecture_that_is_no_causal_lm(tmp_path: Path) -> None:
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8
    )
    ViTModel(config).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="RF3025"):
        load_causal_lm(tmp_path, dtype="float32")


def test_pickled_weights_are_refused(saved: Path) -> None:
    (saved / WEIGHTS).unlink()
    (saved / "pytorch_model.bin").write_bytes(b"never opened")
    with pytest.raises(ModelError, match=r"(?s)RF3014.*pytorch_model\.bin"):
        load_causal_lm(saved, dtype="float32")


def test_no_weights(saved: Path) -> None:
    (saved / WEIGHTS).unlink()
    with pytest.raises(ModelError, match="RF3015"):
        load_causal_lm(saved, dtype="float32")


def test_missing_shard_is_named(tmp_path: Path) -> None:
    build("llama").save_pretrained(tmp_path, max_shard_size="5KB")
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 1
    load_causal_lm(tmp_path, dtype="float32")
    shards[1].unlink()
    with pytest.raises(ModelError, match=rf"(?s)RF3015.*{shards[1].name}"):
        load_causal_lm(tmp_path, dtype="float32")


def test_missing_unexpected_and_misshaped_weights_are_listed(saved: Path) -> None:
    def edit(weights: dict[str, Any]) -> None:
        del weights["model.layers.1.mlp.up_proj.weight"]
        weights["model.layers.0.extra.weight"] = torch.zeros(2)
        weights["model.norm.weight"] = torch.zeros(5)

    edit_weights(saved, edit)
    with pytest.raises(ModelError) as caught:
        load_causal_lm(saved, dtype="float32")
    message = str(caught.value)
    assert caught.value.code == "RF3017"
    assert "1 missing, 1 unexpected, 1 mis-shaped" in message
    assert "model.layers.1.mlp.up_proj.weight" in message
    assert "model.layers.0.extra.weight" in message
    assert "model.norm.weight [5] instead of [16]" in message


@pytest.mark.parametrize("damage", ["truncated", "header", "empty"])
def test_damaged_safetensors_file_is_named(saved: Path, damage: str) -> None:
    file = saved / WEIGHTS
    content = bytearray(file.read_bytes())
    if damage == "truncated":
        content = content[:-100]
    elif damage == "header":
        content[9] ^= 0xFF
    else:
        content = bytearray()
    file.write_bytes(bytes(content))
    with pytest.raises(ModelError, match=r"(?s)RF3016.*model\.safetensors"):
        load_causal_lm(saved, dtype="float32")


@pytest.mark.parametrize(
    "index",
    ["[]", '{"weight_map": [1]}', '{"weight_map": {"a": 1}}', '{"weight_map": {"a": 1, "b": "x"}}'],
)
def test_index_of_another_kind_is_damage(saved: Path, index: str) -> None:
    (saved / WEIGHTS).unlink()
    (saved / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ModelError, match=r"(?s)RF3016.*index\.json"):
        load_causal_lm(saved, dtype="float32")


def test_flipped_bit_in_the_data_is_found_by_the_manifest(saved: Path) -> None:
    write_manifest(saved)
    load_causal_lm(saved, dtype="float32")
    content = bytearray((saved / WEIGHTS).read_bytes())
    content[-50] ^= 0x01
    (saved / WEIGHTS).write_bytes(bytes(content))
    with pytest.raises(ModelError, match=r"(?s)RF3016.*SHA-256"):
        load_causal_lm(saved, dtype="float32")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_in_loaded_weights_is_named(saved: Path, value: float) -> None:
    def edit(weights: dict[str, Any]) -> None:
        weights["model.layers.1.mlp.up_proj.weight"][2, 3] = value

    edit_weights(saved, edit)
    with pytest.raises(ModelError, match=r"(?s)RF3020.*layers\.1\.mlp\.up_proj\.weight"):
        load_causal_lm(saved, dtype="float32")


def test_reward_head_is_required_or_made(saved: Path) -> None:
    with pytest.raises(ModelError, match=r"(?s)RF3018.*init_head"):
        load_sequence_classifier(saved, init_head=False, dtype="float32")
    one = load_sequence_classifier(saved, init_head=True, dtype="float32", seed=1)
    again = load_sequence_classifier(saved, init_head=True, dtype="float32", seed=1)
    other = load_sequence_classifier(saved, init_head=True, dtype="float32", seed=2)
    assert torch.equal(one.score.weight, again.score.weight)
    assert not torch.equal(one.score.weight, other.score.weight)


def test_reward_head_has_the_standard_deviation_of_the_recipe(tmp_path: Path) -> None:
    build("llama", hidden_size=1024, num_hidden_layers=1).save_pretrained(tmp_path)
    head = load_sequence_classifier(tmp_path, init_head=True, dtype="float32").score
    weight = head.weight.detach()
    assert float(weight.std()) * math.sqrt(1025) == pytest.approx(1, abs=0.1)
    assert abs(float(weight.mean())) * math.sqrt(1025) < 0.1
    assert head.bias is None


def test_reward_model_is_loaded_with_its_head_and_calibration(tmp_path: Path) -> None:
    original = build_classifier("llama")
    set_calibration(original, 1.5, -0.25)
    original.save_pretrained(tmp_path)
    loaded = load_sequence_classifier(tmp_path, init_head=False, dtype="float32")
    assert torch.equal(loaded.score.weight, original.score.weight)
    assert get_calibration(loaded) == Calibration(1.5, -0.25)


def test_two_labels_are_no_reward_model(tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    config = build_classifier("llama").config
    config.num_labels = 2
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"(?s)RF3017.*score\.weight \[2, 16\] instead of \[1, 16"):
        load_sequence_classifier(tmp_path, init_head=False, dtype="float32")


def test_critic_from_a_causal_lm_starts_at_zero(saved: Path) -> None:
    sequences = random_sequences([5, 3])
    for module in (
        load_critic(saved, dtype="float32"),
        critic_from(load_causal_lm(saved, dtype="float32")),
    ):
        critic = Critic(module)
        values = critic.values(sequences)
        assert (values == 0).all()
        values.sum().backward()
        assert float(module.score.weight.grad.abs().sum()) > 0


def test_critic_from_a_reward_model_is_all_of_it(saved_rm: Path) -> None:
    reward_model = load_sequence_classifier(saved_rm, init_head=False, dtype="float32")
    set_calibration(reward_model, 2.0, 1.0)
    reward_model.requires_grad_(False)
    sequences = random_sequences([5, 3])
    expected = Critic(reward_model).values(sequences)
    critic = critic_from(reward_model)
    assert torch.equal(Critic(critic).values(sequences), expected)
    assert all(p.requires_grad for p in critic.parameters())
    shared = {p.data_ptr() for p in critic.parameters()} & {
        p.data_ptr() for p in reward_model.parameters()
    }
    assert not shared
    from_disk = load_critic(saved_rm, dtype="float32")
    assert torch.equal(from_disk.score.weight, reward_model.score.weight)


def test_critic_backbone_is_that_of_the_causal_lm() -> None:
    module = build("gpt2")
    critic = critic_from(module)
    for name, weight in module.base_model.state_dict().items():
        assert torch.equal(critic.base_model.state_dict()[name], weight)


def test_tokenizer_round_trip_and_errors(saved: Path, saved_rm: Path) -> None:
    loaded = load_tokenizer(saved)
    assert loaded("w5 w9")["input_ids"] == [5, 9]
    assert loaded.chat_template == tokenizer().chat_template
    with pytest.raises(ModelError, match="RF3019"):
        load_tokenizer(saved_rm)
    (saved / "tokenizer.json").write_text("{ broken")
    with pytest.raises(ModelError, match="RF3019"):
        load_tokenizer(saved)


def test_tokenizer_larger_than_the_embedding() -> None:
    model = build("llama")
    check_vocabulary(tokenizer(VOCAB), model)
    with pytest.raises(ModelError, match=r"(?s)RF3021.*39.*37 embedding rows"):
        check_vocabulary(tokenizer(VOCAB + 3), model)


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_context_length(model_type: str) -> None:
    model = build(model_type)
    check_context(model, 40, 24)
    with pytest.raises(ModelError, match=r"(?s)RF3022.*40.*25.*65.*64"):
        check_context(model, 40, 25)


@pytest.mark.parametrize(
    ("generation", "found"),
    [
        ({"eos_token_id": 5}, (5,)),
        ({"eos_token_id": [2, 5]}, (2, 5)),
        ({"eos_token_id": None}, ()),
        ({}, ()),
        (None, (2,)),
    ],
)
def test_what_ends_a_response(saved: Path, generation: Any, found: tuple[int, ...]) -> None:
    file = saved / "generation_config.json"
    file.unlink() if generation is None else file.write_text(json.dumps(generation))
    assert stop_ids(saved) == found


@pytest.mark.parametrize("content", ["{", "[]"])
def test_a_generation_config_that_cannot_be_read(saved: Path, content: str) -> None:
    (saved / "generation_config.json").write_text(content)
    with pytest.raises(ModelError, match=r"(?s)RF3012: generation_config\.json.*copy"):
        stop_ids(saved)


def test_same_tokenizer() -> None:
    check_same_tokenizer(tokenizer(), tokenizer())
    with pytest.raises(ModelError, match=r"(?s)RF3023.*37 and 38 tokens, 1 with other ids.*w37"):
        check_same_tokenizer(tokenizer(), tokenizer(38))
    other = tokenizer()
    other.eos_token = "<pad>"
    with pytest.raises(ModelError, match="eos_token_id 2 and 0"):
        check_same_tokenizer(tokenizer(), other)


def test_an_export_with_a_new_pad_token_is_still_like_its_base() -> None:
    padded = _without_pad()
    assert choose_pad_token(padded, VOCAB) == 36
    check_same_tokenizer(padded, _without_pad())
    check_same_tokenizer(_without_pad(), padded)
    other = _without_pad()
    other.add_tokens(["word"])  # its id is that of the pad token
    with pytest.raises(ModelError, match="RF3023"):
        check_same_tokenizer(padded, other)


def test_same_vocabulary_other_splitting() -> None:
    from tokenizers.pre_tokenizers import Whitespace

    other = tokenizer()
    other.backend_tokenizer.pre_tokenizer = Whitespace()
    with pytest.raises(ModelError, match="split text differently"):
        check_same_tokenizer(tokenizer(), other)


def test_choose_pad_token() -> None:
    assert choose_pad_token(tokenizer(), VOCAB) == 0
    bare = tokenizer()
    bare.pad_token = None
    assert choose_pad_token(bare, VOCAB) == 0  # "<pad>" is in the vocabulary
    spare = _without_pad()
    assert choose_pad_token(spare, VOCAB) == 36
    assert spare.pad_token_id == 36 != spare.eos_token_id
    full = _without_pad()
    assert choose_pad_token(full, 36) == full.eos_token_id
    full.eos_token = None
    full.pad_token = None
    with pytest.raises(ModelError, match="RF3024"):
        choose_pad_token(full, 36)


def _without_pad() -> Any:
    """Ids 0 to 35, no token that could be meant for padding."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    vocab = {"<unk>": 0, "<eos>": 1} | {f"w{i}": i for i in range(2, 36)}
    model = Tokenizer(WordLevel(vocab, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=model, eos_token="<eos>", unk_token="<unk>")
