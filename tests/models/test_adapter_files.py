"""Adapters as peft directories, both ways, and everything that is refused."""

import json

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rlhf_fast.errors import ModelError
from rlhf_fast.models.adapter_files import RECORD, WEIGHTS, export_adapter, load_adapter
from rlhf_fast.models.adapter_roles import AdapterActor, AdapterCritic, AdapterRewardModel
from rlhf_fast.models.adapters import SharedTrunk, weights_digest
from rlhf_fast.models.directory import MANIFEST
from rlhf_fast.models.export import export_model
from rlhf_fast.models.heads import set_calibration
from rlhf_fast.models.loading import load_causal_lm
from tests.models.test_adapters import MODELS, SEQUENCES, TARGETS, logprobs, shared, stir
from tests.models.tiny import build, random_sequences, tokenizer


@pytest.fixture
def base(tmp_path):
    """A directory of a base model, by architecture."""

    def make(model_type="llama", seed=0):
        path = tmp_path / f"{model_type}-{seed}"
        build(model_type, seed=seed).save_pretrained(path)
        return path

    return make


def stirred(path, targets=("all-linear",)):
    trunk = shared(module=load_causal_lm(path, dtype="float32"), targets=targets)
    trunk.source = str(path)
    return stir(trunk, "actor", "critic", "reward")


@pytest.mark.parametrize("model_type", MODELS)
def test_peft_loads_an_exported_adapter_to_equal_logits(base, tmp_path, model_type):
    path = base(model_type)
    trunk = stirred(path)
    out = export_adapter(AdapterActor(trunk).adapted, tokenizer(), tmp_path / "out")
    stock = AutoModelForCausalLM.from_pretrained(path)
    loaded = peft.PeftModel.from_pretrained(stock, out).eval()
    ids = random_sequences([9]).ids[None]
    with torch.no_grad(), trunk.adapter("actor"):
        torch.testing.assert_close(
            loaded(input_ids=ids).logits, trunk.model.eval()(input_ids=ids).logits
        )
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(path)
    assert (out / "tokenizer.json").is_file()


@pytest.mark.parametrize("model_type", MODELS)
def test_peft_loads_an_exported_critic_with_its_head(base, tmp_path, model_type):
    path = base(model_type)
    trunk = stirred(path)
    critic = AdapterCritic(trunk)
    torch.nn.init.normal_(critic.module.score.weight)
    out = export_adapter(critic.adapted, tokenizer(), tmp_path / "out")
    stock = AutoModelForSequenceClassification.from_pretrained(path, num_labels=1)
    stock.config.pad_token_id = 0
    loaded = peft.PeftModel.from_pretrained(stock, out).eval()
    sequences = random_sequences([6])
    sequences.ids.clamp_(min=4)
    with torch.no_grad():
        raw = loaded(input_ids=sequences.ids[None]).logits[0]
        torch.testing.assert_close(critic.values(sequences)[-1:], raw)


def test_what_peft_writes_is_read(base, tmp_path):
    path = base()
    stock = AutoModelForSequenceClassification.from_pretrained(path, num_labels=1)
    stock.config.pad_token_id = 0
    config = peft.LoraConfig(
        r=5, lora_alpha=7, target_modules=["q_proj", "down_proj"], task_type="SEQ_CLS"
    )
    model = peft.get_peft_model(stock, config).eval()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(tmp_path / "judge")
    trunk = SharedTrunk(load_causal_lm(path, dtype="float32"))
    file = load_adapter(tmp_path / "judge", trunk)
    trunk.add("reward", file.shape, seed=0, trainable=False, tensors=file.tensors)
    judge = AdapterRewardModel(trunk, file)
    ids = torch.tensor([[5, 9, 30, 8]])
    with torch.no_grad():
        expected = model(input_ids=ids).logits[0]
    scores = judge.score_sequences(random_sequences([4]).__class__.from_lists(ids.tolist()))
    torch.testing.assert_close(scores, expected)
    assert not any(p.requires_grad for p in trunk.model.parameters())


def test_an_adapter_comes_back_with_head_calibration_and_shape(base, tmp_path):
    trunk = stirred(base(), targets=("v_proj", "mlp.up_proj"))
    critic = AdapterCritic(trunk)
    torch.nn.init.normal_(critic.module.score.weight)
    set_calibration(critic.module, 2.0, -1.0)
    expected = critic.values(SEQUENCES)
    out = export_adapter(critic.adapted, tokenizer(), tmp_path / "out")
    again = SharedTrunk(load_causal_lm(base(), dtype="float32"))
    file = load_adapter(out, again)
    assert file.shape.targets == ("mlp.up_proj", "v_proj")
    assert set(file.shape.layers) == set(trunk.shapes["critic"].layers)
    again.add("critic", file.shape, seed=9, trainable=True, tensors=file.tensors)
    assert torch.equal(AdapterCritic(again, file).values(SEQUENCES), expected)


@pytest.mark.parametrize("model_type", MODELS)
def test_merging_makes_a_copy_that_stock_transformers_loads(base, tmp_path, model_type):
    path = base(model_type)
    trunk = stirred(path)
    digest = weights_digest(trunk.model)
    export_model(trunk.merged("actor"), tokenizer(), tmp_path / "merged")
    assert weights_digest(trunk.model) == digest == weights_digest(build(model_type))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    ids = random_sequences([9]).ids[None]
    with torch.no_grad(), trunk.adapter("actor"):
        torch.testing.assert_close(
            merged(input_ids=ids).logits, trunk.model(input_ids=ids).logits, rtol=1e-5, atol=1e-4
        )
    names = load_file(tmp_path / "merged" / "model.safetensors")
    assert not any("lora" in name or "base_layer" in name for name in names)
    assert trunk.active is None


# ---- what is refused ----------------------------------------------------------------------------


def exported(base, tmp_path):
    trunk = stirred(base())
    return export_adapter(AdapterActor(trunk).adapted, tokenizer(), tmp_path / "out")


def refused(directory, trunk, code, *needles):
    with pytest.raises(ModelError, match=code) as caught:
        load_adapter(directory, trunk)
    for needle in needles:
        assert needle in str(caught.value)


def fresh(path):
    return SharedTrunk(load_causal_lm(path, dtype="float32"))


def edit(file, **changes):
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | changes))


def test_an_adapter_of_other_weights_is_refused_even_if_it_fits(base, tmp_path):
    out = exported(base, tmp_path)
    refused(out, fresh(base(seed=1)), "RF3062", "another base model")
    (out / RECORD).unlink()  # as peft writes it: only the shapes can tell
    load_adapter(out, fresh(base(seed=1)))


def test_an_adapter_of_another_architecture_is_refused(base, tmp_path):
    out = exported(base, tmp_path)
    (out / RECORD).unlink()
    refused(out, fresh(base("gpt2")), "RF3062", "the trunk takes None")


def test_tensors_that_do_not_fit_the_config_are_refused(base, tmp_path):
    out = exported(base, tmp_path)
    edit(out / "adapter_config.json", r=2)
    refused(out, fresh(base()), "RF3062")


@pytest.mark.parametrize(
    "change",
    [
        {"use_dora": True},
        {"bias": "all"},
        {"rank_pattern": {"q": 2}},
        {"init_lora_weights": "olora"},
        {"init_lora_weights": "pissa_niter_4"},
    ],
)
def test_more_than_plain_lora_is_refused(base, tmp_path, change):
    out = exported(base, tmp_path)
    edit(out / "adapter_config.json", **change)
    refused(out, fresh(base()), "RF3061", next(iter(change)))


def test_unreadable_directories_are_refused(base, tmp_path):
    trunk = fresh(base())
    refused(tmp_path / "nothing", trunk, "RF3060")
    refused(base(), trunk, "RF3060", "adapter_config.json")
    out = exported(base, tmp_path)
    blob = bytearray((out / WEIGHTS).read_bytes())
    blob[-1] ^= 1
    (out / WEIGHTS).write_bytes(blob)
    refused(out, trunk, "RF3060", "SHA-256")
    (out / WEIGHTS).unlink()
    refused(out, trunk, "RF3060")
    (out / "adapter_config.json").write_text("[]")
    refused(out, trunk, "RF3060", "no JSON object")


def test_peft_takes_the_start_of_some_adapters_out_of_the_base(base, tmp_path):
    """Added to the base as it lies on the disk, such an adapter is another model than peft's."""
    trunk = AutoModelForCausalLM.from_pretrained(base())
    ids = torch.arange(4, 12)[None]
    plain = trunk(ids).logits
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="pissa")
    adapted = peft.get_peft_model(trunk, config)
    adapted.save_pretrained(tmp_path / "pissa")
    with adapted.disable_adapter():
        assert not torch.allclose(adapted(ids).logits, plain, atol=1e-2)
    refused(tmp_path / "pissa", fresh(base()), "RF3061", "init_lora_weights='pissa'")


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("adapter_config.json", {"r": "four"}),
        ("adapter_config.json", {"lora_alpha": [1]}),
        (RECORD, {"calibration": {"slope": 1}}),
        (RECORD, {"calibration": {"gain": "one"}}),
        (MANIFEST, {"sha256": []}),
    ],
)
def test_values_of_another_kind_are_refused(base, tmp_path, name, change):
    out = exported(base, tmp_path)
    edit(out / name, **change)
    refused(out, fresh(base()), "RF3060", name)


def test_nan_in_an_adapter_is_refused(base, tmp_path):
    out = exported(base, tmp_path)
    tensors = load_file(out / WEIGHTS)
    tensors[next(iter(tensors))][0, 0] = float("nan")
    save_file(tensors, out / WEIGHTS)
    (out / "rlhf_fast_manifest.json").unlink()
    refused(out, fresh(base()), "RF3020")


def test_unknown_targets_and_the_head_are_refused():
    trunk = SharedTrunk(build())
    with pytest.raises(ModelError, match="RF3063") as caught:
        trunk.shape(2, 4.0, ["q_proj", "qkv"])
    assert "qkv" in str(caught.value)
    assert "down_proj" in str(caught.value)
    with pytest.raises(ModelError, match="RF3064"):
        trunk.shape(2, 4.0, ["q_proj", "lm_head"])


def test_a_model_with_adapters_is_no_trunk():
    trunk = shared()
    with pytest.raises(ModelError, match="RF3065"):
        SharedTrunk(trunk.model)


def test_an_adapter_directory_is_no_model(base, tmp_path):
    with pytest.raises(ModelError, match="RF3066"):
        load_causal_lm(exported(base, tmp_path), dtype="float32")


@pytest.mark.parametrize("model_type", MODELS)
def test_a_fresh_adapter_of_the_same_file_gives_the_same_bits(base, tmp_path, model_type):
    trunk = stirred(base(model_type))
    expected = logprobs(AdapterActor(trunk))
    out = export_adapter(AdapterActor(trunk).adapted, tokenizer(), tmp_path / "out")
    again = fresh(base(model_type))
    file = load_adapter(out, again)
    again.add("actor", file.shape, seed=9, trainable=True, tensors=file.tensors)
    assert torch.equal(logprobs(AdapterActor(again)), expected)
    assert TARGETS.numel() == expected.numel()
