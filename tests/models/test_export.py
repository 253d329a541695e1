"""Exports load in stock transformers to identical outputs, and are all or nothing."""

from __future__ import annotations

import copy
import json
import os
import resource
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
)

from rlhf_fast.errors import EnvironmentFault, ModelError
from rlhf_fast.models import export
from rlhf_fast.models.directory import MANIFEST
from rlhf_fast.models.export import export_model
from rlhf_fast.models.forward import enable_gradient_checkpointing, packed_hidden
from rlhf_fast.models.heads import Calibration, get_calibration, set_calibration
from rlhf_fast.models.loading import load_causal_lm, load_sequence_classifier
from rlhf_fast.models.roles import Actor, RewardModel
from tests.models.tiny import CHAT_TEMPLATE, EOS, PAD, build, build_classifier, random_sequences
from tests.models.tiny import tokenizer as tiny_tokenizer


def contents(directory: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in directory.iterdir()}


def aligned(module: Any) -> Any:
    """The module out of the mapped file: matrix products at unaligned addresses round elsewhere."""
    return copy.deepcopy(module)


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3", "gpt2", "gpt_neox", "gemma2"])
@pytest.mark.parametrize("tied", [True, False])
def test_stock_transformers_gives_identical_logits(
    tmp_path: Path, model_type: str, tied: bool
) -> None:
    module = build(model_type, tie_word_embeddings=tied)
    actor = Actor(module)
    enable_gradient_checkpointing(module)
    packed_hidden(actor.module, random_sequences([4, 7])).sum().backward()
    directory = export_model(actor.module, tiny_tokenizer(), tmp_path / "policy")
    stock = aligned(AutoModelForCausalLM.from_pretrained(directory))
    ids = random_sequences([11]).ids[None]
    with torch.no_grad():
        assert torch.equal(stock(input_ids=ids).logits, module.eval()(input_ids=ids).logits)


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_stock_transformers_gives_identical_scores(tmp_path: Path, model_type: str) -> None:
    module = build_classifier(model_type)
    set_calibration(module, 3.0, -1.0)
    directory = export_model(module, tiny_tokenizer(), tmp_path / "rm")
    stock = aligned(AutoModelForSequenceClassification.from_pretrained(directory))
    sequences = random_sequences([11])
    with torch.no_grad():
        raw = stock(input_ids=sequences.ids[None]).logits
        assert torch.equal(raw, module.eval()(input_ids=sequences.ids[None]).logits)
    loaded = load_sequence_classifier(directory, init_head=False, dtype="float32")
    assert get_calibration(loaded) == Calibration(3.0, -1.0)
    ours = RewardModel(loaded).score_sequences(sequences)
    torch.testing.assert_close(ours, raw[0] * 3 - 1, rtol=1e-5, atol=1e-5)


def test_config_is_a_plain_one_with_its_own_dropout(tmp_path: Path) -> None:
    build("gpt2", attn_pdrop=0.2, resid_pdrop=0.3).save_pretrained(tmp_path / "first")
    before = json.loads((tmp_path / "first" / "config.json").read_text())
    module = load_causal_lm(tmp_path / "first", dtype="bfloat16")
    assert module.config.attn_pdrop == 0
    Actor(module)
    export_model(module, tiny_tokenizer(), tmp_path / "second")
    after = json.loads((tmp_path / "second" / "config.json").read_text())
    assert after == before


def test_export_is_ready_for_generation(tmp_path: Path) -> None:
    module = build("llama", pad_token_id=None, eos_token_id=None)
    module.generation_config = GenerationConfig(eos_token_id=None, pad_token_id=None)
    directory = export_model(module, tiny_tokenizer(), tmp_path / "policy")
    config = json.loads((directory / "config.json").read_text())
    assert (config["pad_token_id"], config["eos_token_id"]) == (PAD, EOS)
    stock, loaded = (
        AutoModelForCausalLM.from_pretrained(directory),
        AutoTokenizer.from_pretrained(directory),
    )
    assert stock.generation_config.eos_token_id == EOS
    assert stock.generation_config.pad_token_id == PAD
    assert loaded.chat_template == CHAT_TEMPLATE
    with torch.no_grad():
        stock.lm_head.weight.zero_()
        stock.lm_head.weight[EOS] = 1e3 * stock.model.norm.weight
    prompt = loaded("w5 w6", return_tensors="pt")["input_ids"]
    assert stock.generate(prompt, do_sample=False, max_new_tokens=5).shape[1] <= 7


@pytest.mark.parametrize("before", [5, [5, 6]])
def test_generation_stops_at_what_was_learnt(before: Any, tmp_path: Path) -> None:
    """A base whose texts end otherwise than the tokenizer says, as with a new chat template."""
    directory = export_model(build("llama", eos_token_id=before), tiny_tokenizer(), tmp_path / "lm")
    stops = GenerationConfig.from_pretrained(directory).eos_token_id
    assert stops == [EOS, *(before if isinstance(before, list) else [before])]


def test_several_eos_ids_are_kept(tmp_path: Path) -> None:
    module = build("llama")
    module.generation_config.eos_token_id = [2, 5]
    directory = export_model(module, tiny_tokenizer(), tmp_path / "policy")
    assert GenerationConfig.from_pretrained(directory).eos_token_id == [2, 5]


def test_neither_module_nor_tokenizer_is_changed(tmp_path: Path) -> None:
    module, tokenizer = build("llama"), tiny_tokenizer()
    tokenizer.pad_token = None
    Actor(module)
    weights = {k: v.clone() for k, v in module.state_dict().items()}
    config = module.config.to_dict()
    # `save_pretrained` notes the class and the type of what it saves; that is all that may differ.
    config |= {"architectures": ["LlamaForCausalLM"], "dtype": "float32"}
    export_model(module, tokenizer, tmp_path / "policy")
    assert module.config.to_dict() == config
    assert tokenizer.pad_token is None
    assert all(torch.equal(v, weights[k]) for k, v in module.state_dict().items())


def test_second_export_replaces_the_first(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "policy"
    export_model(build("llama", seed=1), tiny_tokenizer(), target)
    (target / "left_over.txt").write_text("of the first")
    second = build("llama", seed=2)
    export_model(second, tiny_tokenizer(), target)
    stock = AutoModelForCausalLM.from_pretrained(target)
    assert torch.equal(stock.lm_head.weight, second.lm_head.weight)
    assert not (target / "left_over.txt").exists()
    assert [p.name for p in target.parent.iterdir()] == ["policy"]
    assert (target / MANIFEST).is_file()


@pytest.mark.parametrize("before", ["a model", "an empty directory", "nothing"])
def test_a_link_stays_and_what_it_leads_to_is_replaced(tmp_path: Path, before: str) -> None:
    real, link = tmp_path / "large_disk" / "policy", tmp_path / "run" / "model"
    real.parent.mkdir()
    link.parent.mkdir()
    if before == "a model":
        export_model(build("llama", seed=1), tiny_tokenizer(), real)
    elif before == "an empty directory":
        real.mkdir()
    link.symlink_to(real)
    module = build("llama", seed=2)
    assert export_model(module, tiny_tokenizer(), link) == link
    assert link.is_symlink()
    assert [p.name for p in link.parent.iterdir()] == ["model"]
    assert [p.name for p in real.parent.iterdir()] == ["policy"]
    stock = AutoModelForCausalLM.from_pretrained(link)
    assert torch.equal(stock.lm_head.weight, module.lm_head.weight)


def test_without_atomic_exchange_the_old_one_steps_aside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "_exchange", lambda first, second: False)
    for seed in (1, 2):
        module = build("llama", seed=seed)
        export_model(module, tiny_tokenizer(), tmp_path / "policy")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    assert torch.equal(stock.lm_head.weight, module.lm_head.weight)
    assert [p.name for p in tmp_path.iterdir()] == ["policy"]


class _Killed(BaseException):
    """Stands for a process that ends here."""


@pytest.mark.parametrize("step", ["_write", "write_manifest", "_sync", "_publish"])
def test_interrupted_export_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    target = tmp_path / "policy"
    export_model(build("llama", seed=1), tiny_tokenizer(), target)
    before = contents(target)

    def die(*_: Any) -> None:
        raise _Killed

    with monkeypatch.context() as patch:
        patch.setattr(export, step, die)
        with pytest.raises(_Killed):
            export_model(build("llama", seed=2), tiny_tokenizer(), target)
    assert contents(target) == before
    export_model(build("llama", seed=2), tiny_tokenizer(), target)
    assert contents(target) != before
    assert [p.name for p in tmp_path.iterdir()] == ["policy"]


def test_full_disk_is_one_message_and_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "policy"
    export_model(build("llama"), tiny_tokenizer(), target)
    before = contents(target)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(EnvironmentFault, match=r"(?s)RF7201.*No space left.*policy"):
        export_model(build("llama", seed=2), tiny_tokenizer(), target)
    assert contents(target) == before
    assert [p.name for p in tmp_path.iterdir()] == ["policy"]


def test_a_disk_that_is_full_when_the_tokenizer_comes_is_the_same_message(tmp_path: Path) -> None:
    target = tmp_path / "policy"
    export_model(build("llama"), tiny_tokenizer(), target)
    before, soft = contents(target), resource.getrlimit(resource.RLIMIT_FSIZE)
    largest = max(map(len, before.values()))
    long = tiny_tokenizer()  # longer than the weights
    long.add_tokens([f"{'added' * 60}{i}" for i in range(1 + largest // 300)])
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest + 1, soft[1]))
    try:
        with pytest.raises(EnvironmentFault, match=r"(?s)RF7201.*File too large.*policy"):
            export_model(build("llama", seed=2), long, target)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, soft)
        signal.signal(signal.SIGXFSZ, handler)
    assert contents(target) == before
    assert [p.name for p in tmp_path.iterdir()] == ["policy"]


def test_foreign_directories_and_files_are_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("years of work")
    (tmp_path / "file").write_text("a file")
    (tmp_path / "empty").mkdir()
    for name in ("thesis", "file"):
        with pytest.raises(ModelError, match="RF3030"):
            export_model(build("llama"), tiny_tokenizer(), tmp_path / name)
    assert (tmp_path / "thesis" / "chapter.tex").is_file()
    export_model(build("llama"), tiny_tokenizer(), tmp_path / "empty")
