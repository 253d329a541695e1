"""Our generator by the interface of verl's rollouts, in one process and on verl's own batches."""

from __future__ import annotations

import asyncio
import importlib
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench.integrations.stubs import stand_in
from rlhf_fast.errors import EnvironmentFault
from rlhf_fast.integrations import verl as adapter
from rlhf_fast.integrations.verl_replica import ServerRollout
from rlhf_fast.integrations.verl_rollout import Rollout
from tests.integrations.peers import installed

installed("verl", "0.9.1")
stand_in("verl")

DataProto = importlib.import_module("verl").DataProto
base = importlib.import_module("verl.workers.rollout.base")
replica = importlib.import_module("verl.workers.rollout.replica")
torch_functional = importlib.import_module("verl.utils.torch_functional")
verl_model = importlib.import_module("verl.utils.model")
RolloutConfig = importlib.import_module("verl.workers.config").RolloutConfig

VOCAB, PAD, WIDTH = 40, 0, 12
SPECIAL = {"eos_token_id": [3, 4], "pad_token_id": PAD}
PROMPTS = ([5, 6, 7], [8, 9, 10, 11, 12], [13], [13])


def make_config(**options: Any) -> Any:
    fixed = {"name": "rlhf_fast", "response_length": WIDTH, "tensor_model_parallel_size": 1}
    return RolloutConfig(**fixed | {"max_num_seqs": 8, "dtype": "float32"} | options)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, **sizes, **heads)).float()


@pytest.fixture
def rollout(model: nn.Module) -> Rollout:
    made = Rollout(make_config(calculate_log_probs=True), None)
    made.share(model)
    return made


def left_padded(rows: tuple[list[int], ...] = PROMPTS, **meta: Any) -> Any:
    width = max(map(len, rows))
    ids = torch.tensor([[PAD] * (width - len(r)) + r for r in rows])
    mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows])
    positions = verl_model.compute_position_id_with_mask(mask)
    tensors = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    return DataProto.from_single_dict(tensors, meta_info=SPECIAL | meta)


def log_softmax_of_responses(model: nn.Module, batch: Any, temperature: float = 1.0) -> Tensor:
    """`[B, R, V]` that transformers computes on the very batch that came back."""
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask", "position_ids")}
    with torch.no_grad():
        logits = model.eval()(**inputs).logits
    width = batch["responses"].shape[1]
    return (logits[:, -width - 1 : -1] / temperature).log_softmax(-1)


# ---- the layout ---------------------------------------------------------------------------------


def test_the_layout_is_verls(rollout: Rollout) -> None:
    given = left_padded()
    found = rollout.generate_sequences(given)
    batch, (rows, columns) = found.batch, given.batch["input_ids"].shape
    assert isinstance(found, DataProto)
    assert len(found) == rows
    names = ("prompts", "responses", "response_mask", "input_ids", "attention_mask", "position_ids")
    assert set(batch.keys()) == {*names, "rollout_log_probs"}
    assert {batch[name].dtype for name in names} == {torch.int64}
    assert torch.equal(batch["prompts"], given.batch["input_ids"])
    assert torch.equal(batch["input_ids"], torch.cat([batch["prompts"], batch["responses"]], 1))
    mask = torch_functional.get_response_mask(batch["responses"], SPECIAL["eos_token_id"])
    assert torch.equal(batch["response_mask"], mask)
    assert batch["responses"].shape == (rows, WIDTH)
    assert torch.equal(batch["attention_mask"][:, columns:], mask)
    assert torch.equal(batch["attention_mask"][:, :columns], given.batch["attention_mask"])
    positions = verl_model.compute_position_id_with_mask(batch["attention_mask"])
    assert torch.equal(batch["position_ids"], positions)
    assert (batch["responses"][mask == 0] == PAD).all()
    assert not batch["rollout_log_probs"][mask == 0].any()
    assert mask.sum(-1).tolist() != [WIDTH] * rows  # some end before, or nothing of this is shown


def test_log_probs_are_what_the_model_gives_on_the_batch_that_came_back(
    rollout: Rollout, model: nn.Module
) -> None:
    batch = rollout.generate_sequences(left_padded(temperature=0.7)).batch
    expected = log_softmax_of_responses(model, batch, 0.7)
    expected = expected.gather(-1, batch["responses"].unsqueeze(-1)).squeeze(-1)
    mask = batch["response_mask"].bool()
    torch.testing.assert_close(
        batch["rollout_log_probs"][mask], expected[mask], rtol=1e-4, atol=1e-4
    )


def test_a_batch_goes_on_into_verls_trainer(rollout: Rollout) -> None:
    """Its own response mask of the batch, and a union with what the trainer keeps."""
    trainer = importlib.import_module("verl.trainer.ppo.ray_trainer")
    found = rollout.generate_sequences(left_padded())
    assert torch.equal(trainer.compute_response_mask(found), found.batch["response_mask"])
    scores = DataProto.from_single_dict({"rm_scores": torch.zeros(len(found), WIDTH)})
    assert found.union(scores).batch["rm_scores"].shape == (len(found), WIDTH)


# ---- settings -----------------------------------------------------------------------------------


def test_greedy_takes_the_best_token_and_reports_the_models_log_prob(
    rollout: Rollout, model: nn.Module
) -> None:
    batch = rollout.generate_sequences(left_padded(do_sample=False)).batch
    best = log_softmax_of_responses(model, batch).max(-1)
    mask = batch["response_mask"].bool()
    assert torch.equal(batch["responses"][mask], best.indices[mask])
    torch.testing.assert_close(batch["rollout_log_probs"][mask], best.values[mask])


@pytest.mark.parametrize(
    ("config", "meta"),
    [
        ({"top_k": 1}, {}),
        ({"top_k": -1}, {"top_k": 1}),
        ({"temperature": 0.0}, {}),
        ({}, {"top_p": 0.0}),
        ({}, {"min_p": 1.0}),
        ({"val_kwargs": {"top_k": 1}}, {"validate": True}),
        ({"val_kwargs": {"top_k": 1}}, {"validate": True, "top_k": 30}),
        ({"val_kwargs": {"temperature": 0.0}}, {"validate": True}),
        ({"do_sample": False}, {}),
    ],
)
def test_settings_that_leave_one_token_are_greedy(
    model: nn.Module, config: dict[str, Any], meta: dict[str, Any]
) -> None:
    if "val_kwargs" in config:
        sampling = importlib.import_module("verl.workers.config").SamplingConfig
        config = config | {"val_kwargs": sampling(**config["val_kwargs"])}
    rollout = Rollout(make_config(**config), None)
    rollout.share(model)
    greedy = rollout.generate_sequences(left_padded(do_sample=False)).batch["responses"]
    assert torch.equal(rollout.generate_sequences(left_padded(**meta)).batch["responses"], greedy)


def test_a_call_may_ask_for_fewer_tokens_and_not_for_more(rollout: Rollout) -> None:
    batch = rollout.generate_sequences(left_padded(response_length=2, eos_token_id=39)).batch
    assert batch["responses"].shape[1] == WIDTH
    assert batch["response_mask"].sum(-1).max() == 2
    with pytest.raises(ValueError, match="response_length=13"):
        rollout.generate_sequences(left_padded(response_length=WIDTH + 1))


def test_ignore_eos_fills_every_response(model: nn.Module) -> None:
    rollout = Rollout(make_config(ignore_eos=True), None)
    rollout.share(model)
    assert rollout.generate_sequences(left_padded()).batch["response_mask"].all()


def test_repeated_rows_are_samples_of_their_own_that_no_company_changes(model: nn.Module) -> None:
    """verl repeats a prompt for its n samples; seeds go by row."""
    rows = ([5, 6, 7],) * 6

    def draw(rows: tuple[list[int], ...]) -> Tensor:
        rollout = Rollout(make_config(), None)
        rollout.share(model)
        return rollout.generate_sequences(left_padded(rows)).batch["responses"]

    drawn = draw(rows)
    assert len({tuple(row.tolist()) for row in drawn}) > 3
    assert torch.equal(draw((*rows, [20, 21, 22, 23]))[:6], drawn)


def test_a_second_call_draws_anew(rollout: Rollout) -> None:
    first, second = (rollout.generate_sequences(left_padded()).batch for _ in range(2))
    assert not torch.equal(first["responses"], second["responses"])


def test_fields_of_engine_settings_come_by_verls_engine_kwargs(model: nn.Module) -> None:
    rollout = Rollout(make_config(engine_kwargs={"rlhf_fast": {"path": "modules"}}), None)
    rollout.share(model)
    assert rollout._ready().path == "modules"
    assert rollout._ready().settings.max_batch == 8


def test_neither_a_tokenizer_nor_ids_is_an_error(rollout: Rollout) -> None:
    prompts = left_padded()
    del prompts.meta_info["pad_token_id"]
    with pytest.raises(ValueError, match="pad_token_id"):
        rollout.generate_sequences(prompts)


# ---- weights ------------------------------------------------------------------------------------


class ModelConfig:
    """What a rollout with weights of its own reads of verl's `HFModelConfig`."""

    tokenizer = None

    def __init__(self, hf_config: Any) -> None:
        self.hf_config = hf_config


def own_rollout(model: nn.Module, **options: Any) -> Rollout:
    return Rollout(make_config(**options), ModelConfig(model.config))


def greedy(rollout: Rollout) -> Tensor:
    return rollout.generate_sequences(left_padded(do_sample=False)).batch["responses"]


def pairs(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.state_dict().items()


async def pairs_later(model: nn.Module) -> AsyncIterator[tuple[str, Tensor]]:
    for pair in pairs(model):
        yield pair


@pytest.mark.parametrize("stream", [pairs, pairs_later])
def test_weights_that_are_handed_over_are_what_generates(
    rollout: Rollout, model: nn.Module, stream: Any
) -> None:
    other = own_rollout(model)
    asyncio.run(other.update_weights(stream(model), global_steps=3, peft_config=None))
    assert torch.equal(greedy(other), greedy(rollout))
    changed = {name: x.flip(0) for name, x in model.state_dict().items()}
    asyncio.run(other.update_weights(iter(changed.items())))
    assert not torch.equal(greedy(other), greedy(rollout))


def test_shared_weights_are_the_trained_ones_without_a_copy(model: nn.Module) -> None:
    rollout = Rollout(make_config(), None)
    rollout.share(model)
    before, parameters = greedy(rollout), list(model.parameters())
    optimizer = torch.optim.SGD(parameters, lr=3.0)
    batch = left_padded().batch
    loss = model(input_ids=batch["input_ids"], labels=batch["input_ids"]).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()

    def unread() -> Iterator[tuple[str, Tensor]]:
        raise AssertionError("weights were read")
        yield

    asyncio.run(rollout.update_weights(unread()))
    after = greedy(rollout)
    assert not torch.equal(before, after)
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert rollout._ready().copied_bytes == 0
    fresh = own_rollout(model)
    asyncio.run(fresh.update_weights(pairs(model)))
    assert torch.equal(greedy(fresh), after)


@pytest.mark.parametrize("free", [True, False])
def test_released_and_resumed_it_goes_on(model: nn.Module, free: bool) -> None:
    rollout = own_rollout(model, free_cache_engine=free)
    asyncio.run(rollout.update_weights(pairs(model)))
    before, engine = greedy(rollout), rollout._engine
    asyncio.run(rollout.release())
    assert (rollout._engine is None) == free
    asyncio.run(rollout.resume(["weights"]))
    asyncio.run(rollout.update_weights(pairs(model)))
    asyncio.run(rollout.resume(["kv_cache"]))
    assert torch.equal(greedy(rollout), before)
    assert (rollout._engine is engine) != free


def test_nothing_generates_before_weights_have_come(model: nn.Module) -> None:
    with pytest.raises(EnvironmentFault, match="RF7332"):
        own_rollout(model).generate_sequences(left_padded())


@pytest.mark.parametrize("change", ["unknown", "shape", "missing"])
def test_weights_that_do_not_fit_are_refused(model: nn.Module, change: str) -> None:
    weights = dict(model.state_dict())
    name = "model.layers.1.mlp.up_proj.weight"
    tensor = weights.pop(name)
    if change == "unknown":
        weights["module." + name] = tensor
    elif change == "shape":
        weights[name] = tensor[:-1]
    rollout = own_rollout(model)
    asyncio.run(rollout.update_weights(pairs(model)))
    before = greedy(rollout)
    with pytest.raises(EnvironmentFault, match=rf"RF7332.*{name}"):
        asyncio.run(rollout.update_weights(iter(weights.items())))
    with pytest.raises(EnvironmentFault, match="RF7332"):
        greedy(rollout)
    asyncio.run(rollout.update_weights(pairs(model)))
    assert torch.equal(greedy(rollout), before)


def test_weights_kept_in_bf16_run_fused(model: nn.Module) -> None:
    rollout = own_rollout(model, dtype="bfloat16")
    asyncio.run(rollout.update_weights(pairs(model)))
    greedy(rollout)
    assert rollout._engine is not None
    assert rollout._engine.path == "fused"


@pytest.mark.parametrize("options", [{"wire_format": "delta_flush"}, {"peft_config": object()}])
def test_other_ways_of_handing_weights_over_are_refused(
    model: nn.Module, options: dict[str, Any]
) -> None:
    with pytest.raises(EnvironmentFault, match="RF7331"):
        asyncio.run(own_rollout(model).update_weights(pairs(model), **options))


# ---- the place in verl --------------------------------------------------------------------------


def test_verl_finds_it_by_its_name_while_the_adapter_is_on() -> None:
    with adapter.patched() as report:
        assert base.get_rollout_class("rlhf_fast", "async") is ServerRollout
        assert issubclass(replica.get_rollout_replica_class("rlhf_fast"), replica.RolloutReplica)
        for registry in ("_ROLLOUT_REGISTRY", "RolloutReplicaRegistry._registry"):
            assert any(registry in place for place in report.replaced)
    with pytest.raises(AssertionError, match="rlhf_fast"):
        base.get_rollout_class("rlhf_fast", "async")
    with pytest.raises(ValueError, match="rlhf_fast"):
        replica.get_rollout_replica_class("rlhf_fast")


def test_it_has_every_method_of_verls_rollouts() -> None:
    methods = {n for n in vars(base.BaseRollout) if not n.startswith("_")}
    assert methods <= set(dir(Rollout))
    assert methods <= set(dir(ServerRollout))


def test_options_that_the_generator_lacks_are_refused_together() -> None:
    config = make_config(tensor_model_parallel_size=2, repetition_penalty=1.1)
    with pytest.raises(EnvironmentFault, match=r"RF7331.*tensor_model.*repetition_penalty=1\.1"):
        Rollout(config, None)
