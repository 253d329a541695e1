"""One trunk, an adapter a role: selection, gradients, exactness, files."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from rlhf_fast.config import OptimConfig
from rlhf_fast.config_lora import ALL_LINEAR
from rlhf_fast.engine.generator import HFGenerator
from rlhf_fast.models.adapter_roles import (
    AdapterActor,
    AdapterCritic,
    AdapterGenerator,
    AdapterReference,
)
from rlhf_fast.models.adapters import SharedTrunk, weights_digest
from rlhf_fast.models.forward import set_compute_dtype
from rlhf_fast.models.loading import load_causal_lm
from rlhf_fast.models.roles import Actor, Reference
from rlhf_fast.optim import GuardedOptimizer
from rlhf_fast.protocols import Generator, PolicyModel, ValueModel
from rlhf_fast.types import PackedSequences, PromptBatch, SamplingParams
from rlhf_fast_kernels import linear_ppo_autograd, linear_ppo_loss
from tests.models.tiny import build, next_token_targets, random_sequences, tokenizer

MODELS = ["llama", "qwen2", "gpt2"]
SEQUENCES = random_sequences([5, 1, 9, 3])
TARGETS = next_token_targets(SEQUENCES)


def shared(model_type="llama", *, rank=3, seed=0, targets=(ALL_LINEAR,), module=None):
    """A trunk with actor, critic (trained) and reward (frozen), all new."""
    trunk = SharedTrunk(build(model_type, seed=seed) if module is None else module)
    shape = trunk.shape(rank, 6.0, list(targets))
    for i, name in enumerate(("actor", "critic", "reward")):
        trunk.add(name, shape, seed=i, trainable=name != "reward")
    return trunk


def stir(trunk, *names, scale=0.3):
    """Give adapters numbers that change the outputs."""
    for i, name in enumerate(names):
        generator = torch.Generator().manual_seed(100 + i)
        for tensor in trunk.tensors(name).values():
            tensor.copy_(scale * torch.randn(tensor.shape, generator=generator))
    return trunk


def hidden(trunk, name):
    return AdapterActor(trunk, name).head_rows(SEQUENCES).hidden


def logprobs(policy, **options):
    with torch.no_grad():
        return policy.logprobs(SEQUENCES, TARGETS, **options)[0]


# ---- exactness ----------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", MODELS)
def test_reference_is_the_untouched_model_to_the_bit_whatever_the_adapters_hold(model_type):
    expected = logprobs(Reference(build(model_type)))
    trunk = stir(shared(model_type), "actor", "critic", "reward")
    assert torch.equal(logprobs(AdapterReference(trunk, None)), expected)
    assert not torch.equal(logprobs(AdapterActor(trunk)), expected)


@pytest.mark.parametrize("model_type", MODELS)
def test_a_new_actor_is_the_reference_to_the_bit(model_type):
    trunk = shared(model_type)
    assert torch.equal(logprobs(AdapterActor(trunk)), logprobs(AdapterReference(trunk, None)))


@pytest.mark.parametrize("model_type", MODELS)
def test_an_adapter_is_the_low_rank_product_added_to_the_weights(model_type):
    trunk = stir(shared(model_type), "actor")
    base = build(model_type).double()
    for name in trunk.shapes["actor"].layers:
        a, b = (trunk.tensors("actor")[f"{name}.lora_{k}.weight"].double() for k in "AB")
        layer, delta = base.get_submodule(name), 6.0 / 3 * b @ a
        layer.weight.data += delta.T if isinstance(layer, Conv1D) else delta
    torch.testing.assert_close(
        logprobs(AdapterActor(trunk)), logprobs(Actor(base)).float(), rtol=1e-5, atol=1e-5
    )


def test_a_trunk_held_in_bf16_is_the_bf16_model_to_the_bit_under_fp32_adapters(tmp_path):
    build().save_pretrained(tmp_path)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    set_compute_dtype(stock, "bfloat16")
    trunk = shared(module=load_causal_lm(tmp_path, dtype="bfloat16"))
    trunk.hold_in(torch.bfloat16)
    assert torch.equal(logprobs(AdapterReference(trunk, None)), logprobs(Reference(stock)))
    assert torch.equal(logprobs(AdapterActor(trunk)), logprobs(Reference(stock)))
    frozen = [p for n, p in trunk.model.named_parameters() if "lora_" not in n]
    assert {p.dtype for p in frozen} == {torch.bfloat16}
    assert {t.dtype for t in trunk.tensors("actor").values()} == {torch.float32}
    frequencies = trunk.model.model.rotary_emb.inv_freq
    assert frequencies.dtype == torch.float32


# ---- selection ----------------------------------------------------------------------------------


def peft_state(trunk):
    layers = [m for m in trunk.model.modules() if hasattr(m, "lora_A")]
    return {(tuple(m.active_adapters) if not m.disable_adapters else None) for m in layers}


def test_selection_is_what_peft_says_and_is_restored_whatever_happens():
    trunk = shared()
    assert trunk.active is None
    assert peft_state(trunk) == {None}
    with trunk.adapter("actor"):
        assert peft_state(trunk) == {("actor",)}
        with trunk.adapter(None):
            assert peft_state(trunk) == {None}
        with pytest.raises(RuntimeError), trunk.adapter("critic"):
            raise RuntimeError
        assert peft_state(trunk) == {("actor",)}
        assert trunk.active == "actor"
    assert peft_state(trunk) == {None}
    with pytest.raises(KeyError, match="no adapter 'judge'"), trunk.adapter("judge"):
        pass
    assert trunk.active is None


def test_selecting_never_changes_what_trains():
    trunk = shared()
    before = {n: p.requires_grad for n, p in trunk.model.named_parameters()}
    for name in ("critic", None, "reward", "actor"):
        with trunk.adapter(name):
            assert {n: p.requires_grad for n, p in trunk.model.named_parameters()} == before
    trained = {n for n, wanted in before.items() if wanted}
    assert {n.split(".")[-2] for n in trained} == {"actor", "critic"}


@pytest.mark.parametrize("model_type", MODELS)
def test_gradients_reach_only_the_adapter_of_the_role(model_type):
    trunk = stir(shared(model_type), "actor", "critic", "reward")
    actor, critic = AdapterActor(trunk), AdapterCritic(trunk)
    torch.nn.init.ones_(critic.module.score.weight)
    loss = actor.logprobs(SEQUENCES, TARGETS)[0].sum()
    values = critic.values(SEQUENCES).sum()  # the critic's forward before the actor's backward
    loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in actor.module.parameters())
    assert all(p.grad is None for p in critic.module.parameters())
    actor.module.zero_grad(set_to_none=True)
    values.backward()
    assert all(p.grad is not None and p.grad.any() for p in critic.module.parameters())
    owned = {id(p) for p in critic.module.parameters()}
    assert all(p.grad is None for p in trunk.model.parameters() if id(p) not in owned)


def test_gradients_equal_those_of_a_trunk_of_ones_own():
    trunk = stir(shared(), "actor", "critic", "reward")
    alone = SharedTrunk(build())
    alone.add(
        "actor", trunk.shapes["actor"], seed=0, trainable=True, tensors=trunk.tensors("actor")
    )
    for each in (trunk, alone):
        loss = AdapterActor(each).logprobs(SEQUENCES, TARGETS)[0].sum()
        if each is trunk:
            AdapterCritic(each).values(SEQUENCES)
        loss.backward()
    for key, parameter in alone._parameters("actor").items():
        assert torch.equal(parameter.grad, trunk._parameters("actor")[key].grad)


def test_recomputation_in_backward_runs_with_the_adapter_of_the_forward():
    gradients = []
    for checkpointing in (False, True):
        trunk = stir(shared(), "actor", "critic", "reward")
        trunk.prepare(torch.device("cpu"), gradient_checkpointing=checkpointing)
        actor, critic = AdapterActor(trunk), AdapterCritic(trunk)
        loss = actor.logprobs(SEQUENCES, TARGETS)[0].sum()
        torch.nn.init.ones_(critic.module.score.weight)
        values = critic.values(SEQUENCES).square().sum()
        with trunk.adapter("reward"):
            loss.backward()
            values.backward()
            assert trunk.active == "reward"
        roles = (actor.module, critic.module)
        gradients.append([p.grad for module in roles for p in module.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_optimizers_see_exactly_their_role_and_leave_the_rest_alone():
    trunk = stir(shared(), "actor", "critic", "reward")
    digest = weights_digest(trunk.model)
    actor, critic = AdapterActor(trunk), AdapterCritic(trunk)
    first = {n: copy.deepcopy(trunk.tensors(n)) for n in trunk.shapes}
    optimizer = GuardedOptimizer(critic.module, OptimConfig(lr=0.1), 10)
    names = [name for name, _ in optimizer.named_parameters]
    assert len(names) == 2 * len(trunk.shapes["critic"].layers) + 1
    assert "score.weight" in names
    for _ in range(2):
        loss = (critic.values(SEQUENCES) - 1).square().sum()
        logprobs(actor)
        loss.backward()
        optimizer.step()
    for name, changed in (("actor", False), ("reward", False), ("critic", True)):
        same = [torch.equal(t, first[name][k]) for k, t in trunk.tensors(name).items()]
        assert not any(same) if changed else all(same), name
    assert weights_digest(trunk.model) == digest == trunk.digest


def test_no_gradient_of_the_head_is_computed(monkeypatch):
    asked = []
    run = linear_ppo_autograd.run

    def spy(problem, needs, *rest):
        asked.append(needs)
        return run(problem, needs, *rest)

    monkeypatch.setattr(linear_ppo_autograd, "run", spy)
    trunk = stir(shared(), "actor")
    rows = AdapterActor(trunk).head_rows(SEQUENCES)
    assert rows is not None
    old = torch.full(TARGETS.shape, -3.0)
    loss = linear_ppo_loss(
        rows.hidden,
        rows.head.weight,
        TARGETS.clamp(min=0),
        old_logprobs=old,
        advantages=torch.ones_like(old),
        normalizer=float((TARGETS >= 0).sum()),
        mask=TARGETS >= 0,
    ).loss
    loss.backward()
    assert asked == [(True, False, False)]
    assert rows.head.weight.grad is None


def test_roles_are_what_the_trainer_asks_for():
    trunk = shared()
    assert isinstance(AdapterActor(trunk), PolicyModel)
    assert isinstance(AdapterReference(trunk, None), PolicyModel)
    assert isinstance(AdapterCritic(trunk), ValueModel)
    assert not AdapterCritic(trunk).values(SEQUENCES).any()


def test_adapters_are_a_function_of_their_seed_and_leave_the_global_state():
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    first = shared()
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(6)
    second = shared()
    for name in first.shapes:
        for key, tensor in first.tensors(name).items():
            assert torch.equal(tensor, second.tensors(name)[key])
            assert bool(tensor.any()) == key.endswith("lora_A.weight")
    a = next(iter(first.tensors("actor").values()))
    assert not torch.equal(a, next(iter(first.tensors("critic").values())))


class Failing:
    def generate(self, *args, **kwargs):
        raise RuntimeError("no")


def test_generation_has_the_actors_adapter_on_and_puts_back_what_was():
    trunk = stir(shared(), "actor", "critic")
    prompts = PromptBatch(PackedSequences.from_lists([[4, 5, 6]]), (0,), ({},), ("",))
    inner = HFGenerator.from_tokenizer(trunk.model, tokenizer())
    generator = AdapterGenerator(inner, trunk)
    assert isinstance(generator, Generator)
    with trunk.adapter("critic"):
        rollout = generator.generate(
            prompts,
            SamplingParams(max_new_tokens=5),
            samples_per_prompt=2,
            seeds=[1, 2],
        )
        assert trunk.active == "critic"
        with pytest.raises(RuntimeError):
            AdapterGenerator(Failing(), trunk).generate(None, None, samples_per_prompt=1, seeds=[])
        assert trunk.active == "critic"
    actor = AdapterActor(trunk)
    sequences = rollout.sequences()
    with torch.no_grad():
        again = actor.logprobs(sequences, next_token_targets(sequences))[0]
    lengths, start = sequences.lengths.tolist(), 0
    for row, length in enumerate(lengths):
        of_response = again[start + 2 : start + length - 1]
        expected = rollout.rollout_logprobs[row][rollout.response_mask[row]]
        torch.testing.assert_close(of_response, expected, rtol=1e-5, atol=1e-5)
        start += length
