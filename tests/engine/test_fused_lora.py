"""LoRA adapters in the fused forward: the modules' numbers, an untouched trunk, exact refusals."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import peft
import pytest
import torch

from rlhf_fast.engine.hybrid import HybridEngine
from rlhf_fast.engine.settings import EngineSettings
from rlhf_fast.models.adapter_roles import AdapterGenerator
from rlhf_fast.models.adapters import SharedTrunk, weights_digest
from rlhf_fast.models.forward import set_compute_dtype
from rlhf_fast.types import Rollout, SamplingParams
from tests.engine.test_generator import EOS, batch_of, build, ragged, seeds_for, trainer_logprobs

GREEDY = SamplingParams(10, temperature=0.0)
TARGETS = {
    "all": ["all-linear"],
    "attention": ["q_proj", "v_proj"],
    "others": ["k_proj", "o_proj", "up_proj", "down_proj"],
}


def engine_of(module: Any, path: str = "auto", **settings: Any) -> HybridEngine:
    chosen = EngineSettings(path=path, page_size=4, poison=True, **settings)
    return HybridEngine(module, eos_ids=[EOS], settings=chosen)


def trunk_of(name: str, targets: Sequence[str], roles: Sequence[str] = ("actor",)) -> SharedTrunk:
    trunk = SharedTrunk(build(name))
    for index, role in enumerate(roles):
        shape = trunk.shape(3 + index, 6.0, targets)
        trunk.add(role, shape, seed=index, trainable=True)
        generator = torch.Generator().manual_seed(9 + index)
        for key, tensor in trunk.tensors(role).items():
            if key.endswith(".lora_B.weight"):
                tensor.copy_(torch.randn(tensor.shape, generator=generator) / 4)
    return trunk


def rollout_of(engine: Any, sampling: SamplingParams = GREEDY) -> Rollout:
    return engine.generate(batch_of(ragged()), sampling, samples_per_prompt=2, seeds=seeds_for(12))


def assert_same(got: Rollout, expected: Rollout) -> None:
    assert got.response_ids() == expected.response_ids()
    torch.testing.assert_close(
        got.rollout_logprobs, expected.rollout_logprobs, atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("name", ["llama", "llama-bias", "qwen3"])
def test_tokens_and_log_probs_are_those_of_the_modules(name: str, targets: str) -> None:
    trunk = trunk_of(name, TARGETS[targets])
    fused = engine_of(trunk.model)
    assert fused.path == "fused"
    bare = rollout_of(fused)
    got = rollout_of(AdapterGenerator(fused, trunk))
    assert_same(got, rollout_of(AdapterGenerator(engine_of(trunk.model, "modules"), trunk)))
    assert got.response_ids() != bare.response_ids()
    assert_same(bare, rollout_of(engine_of(build(name), "fused")))
    assert weights_digest(trunk.model) == trunk.digest


def test_each_role_generates_with_its_own_adapter() -> None:
    trunk = trunk_of("llama", ["all-linear"], ("actor", "critic"))
    fused, modules = engine_of(trunk.model), engine_of(trunk.model, "modules")
    seen = []
    for role in ("actor", "critic", "actor"):
        got = rollout_of(AdapterGenerator(fused, trunk, role))
        assert_same(got, rollout_of(AdapterGenerator(modules, trunk, role)))
        seen.append(got.response_ids())
    assert seen[0] == seen[2] != seen[1]


def test_what_training_writes_into_an_adapter_is_seen() -> None:
    trunk = trunk_of("llama", ["all-linear"])
    engine = engine_of(trunk.model)
    before = rollout_of(AdapterGenerator(engine, trunk)).response_ids()
    optimizer = torch.optim.SGD([p for p in trunk.model.parameters() if p.requires_grad], lr=0.5)
    with trunk.adapter("actor"):
        ids = torch.arange(3, 12)[None]
        trunk.model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    after = rollout_of(AdapterGenerator(engine, trunk))
    assert after.response_ids() != before
    assert_same(after, rollout_of(AdapterGenerator(engine_of(trunk.model, "modules"), trunk)))


@pytest.mark.parametrize("held", ["bf16", "fp32"])
def test_bf16_stays_as_near_to_the_trainer_as_the_modules(held: str) -> None:
    trunk = trunk_of("llama", ["all-linear"])
    if held == "bf16":
        trunk.hold_in(torch.bfloat16)
    set_compute_dtype(trunk.model, "bfloat16")
    wide = copy.deepcopy(trunk.model).float()
    set_compute_dtype(wide, "float32")
    for layer in wide.modules():
        if hasattr(layer, "_disable_adapters"):
            layer._disable_adapters, layer._active_adapter = False, ["actor"]
    gaps = {}
    for path in ("fused", "modules"):
        rollout = rollout_of(
            AdapterGenerator(engine_of(trunk.model, path), trunk), SamplingParams(10)
        )
        flat = torch.tensor([x for row in trainer_logprobs(wide, rollout) for x in row])
        gaps[path] = float((rollout.rollout_logprobs[rollout.response_mask] - flat).abs().mean())
    assert 1e-4 < gaps["fused"] <= 1.5 * gaps["modules"] + 1e-3


def wrapped(**options: Any) -> Any:
    settings = {"r": 2, "target_modules": ["q_proj", "up_proj"], "init_lora_weights": False}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return peft.get_peft_model(build(), peft.LoraConfig(**{**settings, **options})).eval()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"lora_dropout": 0.5},
        {"rank_pattern": {"up_proj": 5}, "alpha_pattern": {"q_proj": 3}},
        {"use_rslora": True, "r": 4},
    ],
)
def test_a_peft_wrapper_runs_fused(options: dict[str, Any]) -> None:
    module = wrapped(**options)
    module.train()  # dropout is off in generation all the same
    engine = engine_of(module)
    assert engine.path == "fused"
    got = rollout_of(engine)
    assert_same(got, rollout_of(engine_of(module, "modules")))
    with module.disable_adapter():
        plain = rollout_of(engine)
        assert_same(plain, rollout_of(engine_of(module, "modules")))
    assert plain.response_ids() != got.response_ids()


def test_two_active_adapters_add_up() -> None:
    module = wrapped()
    module.add_adapter(
        "other", peft.LoraConfig(r=3, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    )
    module.base_model.set_adapter(["default", "other"])
    engine = engine_of(module)
    assert engine.path == "fused"
    assert_same(rollout_of(engine), rollout_of(engine_of(module, "modules")))


def hooked() -> Any:
    module = wrapped()
    module.base_model.model.model.layers[0].mlp.up_proj.lora_A["default"].register_forward_hook(
        lambda *_: None
    )
    return module


def merged() -> Any:
    module = wrapped()
    module.merge_adapter()
    return module


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: wrapped(use_dora=True), "no plain LoRA"),
        (lambda: wrapped(lora_bias=True), "has a bias"),
        (lambda: wrapped(target_modules=["q_proj", "lm_head"]), "only the projections"),
        (lambda: wrapped(target_modules=["embed_tokens"]), "is a Embedding"),
        (lambda: wrapped(modules_to_save=["norm"]), "is a ModulesToSaveWrapper"),
        (hooked, "has forward hooks"),
        (merged, "merged adapter"),
        (
            lambda: peft.get_peft_model(
                build(), peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[])
            ),
            "runs through the modules",
        ),
    ],
)  # fmt: skip
def test_every_other_adapter_runs_through_the_modules(make: Any, reason: str) -> None:
    engine = engine_of(make())
    assert engine.path == "modules"
    assert reason in engine.reason


def test_an_adapter_activated_later_is_looked_at_again() -> None:
    module = wrapped()
    engine = engine_of(module)
    assert engine.path == "fused"
    rollout_of(engine)
    module.merge_adapter()
    rollout_of(engine)
    assert engine.path == "modules"
