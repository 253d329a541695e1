"""The server of verl's rollout: what it answers, with which weights, and what it refuses.

In this process; `test_verl_served.py` has it behind Ray and in verl's trainer.
"""

from __future__ import annotations

import asyncio
import importlib
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench.integrations.stubs import stand_in
from rlhf_fast.engine.run import Run
from rlhf_fast.errors import EnvironmentFault, GenerationError
from rlhf_fast.integrations import verl as adapter
from rlhf_fast.integrations.verl_replica import ServerRollout, replica_class
from rlhf_fast.integrations.verl_server import Server
from rlhf_fast.integrations.verl_weights import Place, Places, copy_weights
from tests.integrations import verl_loop
from tests.integrations.peers import installed
from tests.integrations.verl_loop import EOS, build_model, write_model

installed("verl", "0.9.1")
stand_in("verl")

workers_config = importlib.import_module("verl.workers.config")
replica_module = importlib.import_module("verl.workers.rollout.replica")
PROMPTS = tuple(tuple(5 + (7 * i + 3 * k) % 50 for k in range(3 + i % 5)) for i in range(7))
GREEDY = {"temperature": 0, "top_k": -1, "top_p": 1.0, "repetition_penalty": 1.0, "logprobs": True}
# What verl's agent loop sends for training.
SAMPLED = {"temperature": 0.7, "top_p": 1.0, "top_k": -1, "repetition_penalty": 1.0}
SAMPLED |= {"logprobs": True}


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return build_model()


@pytest.fixture(scope="module")
def path(model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"), model)


def model_config(path: Path, **options: Any) -> Any:
    # Its default, flash_attention_2, is not installed on a CPU.
    return workers_config.HFModelConfig(path=str(path), **options)


def rollout_config(**options: Any) -> Any:
    sizes = {"prompt_length": 16, "response_length": 12, "max_num_seqs": 4}
    fixed = {"name": "rlhf_fast", "tensor_model_parallel_size": 1, "dtype": "float32"}
    return workers_config.RolloutConfig(**fixed | sizes | options)


@pytest.fixture
def serve(path: Path) -> Iterator[Callable[..., Server]]:
    made: list[Server] = []

    def make(where: Path = path, **options: Any) -> Server:
        made.append(Server(rollout_config(**options), model_config(where)))
        return made[-1]

    yield make
    for server in made:
        asyncio.run(server._free_pages())


async def update(server: Server, weights: Any, steps: int | None = None) -> None:
    """As `ServerRollout.update_weights`, without Ray between."""
    targets = (await server.begin_update()).mapped()
    await copy_weights(targets, weights)
    await server.finish_update(steps)


async def ask(server: Server, prompts: Any = PROMPTS, **sampling: Any) -> list[Any]:
    """All at once; the settings are a fresh dict each, as verl's client sends them."""
    settings = GREEDY | sampling
    return await asyncio.gather(
        *(server.generate(list(p), dict(settings), f"r{i}") for i, p in enumerate(prompts))
    )


def generated(model: nn.Module, prompt: tuple[int, ...], tokens: int = 12) -> list[int]:
    """Greedy tokens of transformers."""
    ids = torch.tensor([prompt])
    options = {"do_sample": False, "max_new_tokens": tokens, "eos_token_id": EOS, "pad_token_id": 0}
    out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
    return out[0, len(prompt) :].tolist()


def forced(model: nn.Module, prompt: tuple[int, ...], tokens: list[int], t: float = 1.0) -> Tensor:
    """Log-probs of the tokens by one forward of transformers over the whole sequence."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[*prompt, *tokens]])).logits[0]
    rows = (logits[len(prompt) - 1 : -1] / t).log_softmax(-1)
    return rows.gather(-1, torch.tensor(tokens).unsqueeze(-1)).squeeze(-1)


def require_greedy(model: nn.Module, outputs: list[Any]) -> None:
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        assert output.token_ids == generated(model, prompt)
        expected = forced(model, prompt, output.token_ids)
        torch.testing.assert_close(torch.tensor(output.log_probs), expected, rtol=0, atol=1e-5)
        assert output.stop_reason == "completed"


# ---- what is drawn ------------------------------------------------------------------------------


def test_greedy_answers_are_those_of_transformers_and_decode_side_by_side(
    serve: Callable[..., Server], model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[int] = []
    turn = Run.turn

    def watched(run: Run) -> None:
        turn(run)
        rows.append(len(run.scheduler.rows))

    monkeypatch.setattr(Run, "turn", watched)
    server = serve()

    async def body() -> list[Any]:
        await update(server, model.state_dict().items(), 3)
        return await ask(server)

    outputs = asyncio.run(body())
    assert all(isinstance(output, replica_module.TokenOutput) for output in outputs)
    require_greedy(model, outputs)
    assert {output.extra_fields["global_steps"] for output in outputs} == {3}
    assert max(rows) > 1
    # Some end by themselves, or only the length was seen to end anything.
    assert len({len(output.token_ids) for output in outputs}) > 1


def test_log_probs_are_of_the_distribution_that_was_drawn_from(
    serve: Callable[..., Server], model: nn.Module
) -> None:
    server = serve()

    async def body() -> tuple[list[Any], list[Any]]:
        await update(server, model.state_dict().items())
        return await ask(server, **SAMPLED), await ask(server, **SAMPLED | {"top_k": 2})

    plain, filtered = asyncio.run(body())
    for prompt, output in zip(PROMPTS, plain, strict=True):
        expected = forced(model, prompt, output.token_ids, 0.7)
        torch.testing.assert_close(torch.tensor(output.log_probs), expected, rtol=0, atol=1e-5)
    for prompt, output in zip(PROMPTS, filtered, strict=True):
        whole = forced(model, prompt, output.token_ids, 0.7)
        assert (torch.tensor(output.log_probs) > whole + 1e-4).any()


def test_without_logprobs_there_are_none(serve: Callable[..., Server], model: nn.Module) -> None:
    server = serve()

    async def body() -> list[Any]:
        await update(server, model.state_dict().items())
        return await ask(server, logprobs=False)

    assert all(output.log_probs is None for output in asyncio.run(body()))


def test_draws_repeat_whatever_the_order_and_are_new_after_an_update(
    serve: Callable[..., Server], model: nn.Module
) -> None:
    """Eight samples of one prompt and one of each other: the sets are the same."""
    prompts = (*PROMPTS, *PROMPTS[:1] * 7)

    def drawn(server: Server, asked: Any, steps: int) -> dict[tuple[int, ...], list[Any]]:
        async def body() -> list[Any]:
            await update(server, model.state_dict().items(), steps)
            return await ask(server, asked, **SAMPLED)

        found: dict[tuple[int, ...], list[Any]] = {}
        for prompt, output in zip(asked, asyncio.run(body()), strict=True):
            found.setdefault(prompt, []).append(output.token_ids)
        return {prompt: sorted(samples) for prompt, samples in found.items()}

    first, second = serve(), serve(max_num_seqs=2)
    samples = drawn(first, prompts, 1)
    assert len({tuple(sample) for sample in samples[PROMPTS[0]]}) == 8
    assert drawn(second, tuple(reversed(prompts)), 1) == samples
    assert drawn(second, prompts, 2) != samples


def test_a_seed_of_a_request_rules(serve: Callable[..., Server], model: nn.Module) -> None:
    server = serve()

    async def body() -> list[list[Any]]:
        await update(server, model.state_dict().items())
        return [await ask(server, **SAMPLED, seed=seed) for seed in (5, 5, 6)]

    first, again, other = ([o.token_ids for o in outputs] for outputs in asyncio.run(body()))
    assert first == again
    assert first != other


@pytest.mark.parametrize(
    ("options", "asked", "length"),
    [
        ({}, {"max_tokens": 3}, 3),
        ({}, {"max_new_tokens": 4}, 4),
        ({"response_length": 9}, {}, 9),
        ({"prompt_length": 5, "response_length": 6}, {}, 6),
        ({"prompt_length": 2, "response_length": 6}, {}, 4),
        ({"max_model_len": 10}, {}, 6),
        ({"max_model_len": 10}, {"max_tokens": 50}, 6),
    ],
)
def test_lengths_are_those_of_verls_servers(
    serve: Callable[..., Server],
    model: nn.Module,
    options: dict[str, Any],
    asked: dict[str, Any],
    length: int,
) -> None:
    """A prompt of four tokens that nothing but the length ends."""
    server = serve(ignore_eos=True, **options)

    async def body() -> Any:
        await update(server, model.state_dict().items())
        return await ask(server, PROMPTS[1:2], **asked)

    assert len(asyncio.run(body())[0].token_ids) == length


def test_stops_come_by_id_and_by_text(serve: Callable[..., Server], model: nn.Module) -> None:
    server = serve()
    whole = generated(model, PROMPTS[0])
    stop = whole[5]
    cut = whole[: whole.index(stop) + 1]

    async def body() -> list[Any]:
        await update(server, model.state_dict().items())
        asked = [{"stop_token_ids": [stop]}, {"stop": f"w{stop - 4}"}, {"stop": ["nowhere"]}, {}]
        return [(await ask(server, PROMPTS[:1], **each))[0].token_ids for each in asked]

    assert asyncio.run(body()) == [cut, cut, whole, whole]


@pytest.mark.parametrize(
    ("sampling", "words"),
    [
        ({"repetition_penalty": 1.2}, "repetition_penalty=1.2"),
        ({"presence_penalty": 0.5, "n": 2}, "presence_penalty.*n=2"),
        ({"guided_decoding": "json"}, "guided_decoding"),
        ({"prompt_logprobs": 1}, "prompt_logprobs"),
    ],
)
def test_settings_that_the_generator_lacks_fail_their_request_alone(
    serve: Callable[..., Server], model: nn.Module, sampling: dict[str, Any], words: str
) -> None:
    server = serve()

    async def body() -> list[Any]:
        await update(server, model.state_dict().items())
        with pytest.raises(EnvironmentFault, match=rf"RF7331.*{words}"):
            await ask(server, PROMPTS[:1], **sampling)
        return await ask(server)

    require_greedy(model, asyncio.run(body()))


def test_a_prompt_without_room_and_images_are_refused(
    serve: Callable[..., Server], model: nn.Module
) -> None:
    server = serve(max_model_len=8)

    async def body() -> None:
        await update(server, model.state_dict().items())
        with pytest.raises(GenerationError, match=r"RF4006.*8 tokens"):
            await server.generate(list(range(5, 13)), dict(GREEDY), "long")
        with pytest.raises(EnvironmentFault, match=r"RF7331.*image_data"):
            await server.generate([5], dict(GREEDY), "seen", image_data=[object()])
        with pytest.raises(GenerationError, match="RF4009"):
            await server.generate([10**6], dict(GREEDY), "stranger")

    asyncio.run(body())


# ---- weights ------------------------------------------------------------------------------------


def test_an_update_is_what_generates_next(serve: Callable[..., Server], model: nn.Module) -> None:
    server, other = serve(), build_model(seed=3)

    async def body() -> tuple[list[Any], list[Any]]:
        await update(server, model.state_dict().items(), 1)
        before = await ask(server)
        await update(server, other.state_dict().items(), 2)
        return before, await ask(server)

    before, after = asyncio.run(body())
    require_greedy(model, before)
    require_greedy(other, after)
    assert [o.token_ids for o in before] != [o.token_ids for o in after]
    assert {output.extra_fields["global_steps"] for output in after} == {2}


def test_the_worker_writes_into_the_servers_own_storage(serve: Callable[..., Server]) -> None:
    """One copy: what is mapped is the memory that generation reads."""
    server = serve()
    targets = asyncio.run(server.begin_update()).mapped()
    parameters = dict(server._module.named_parameters())
    assert targets.keys() >= parameters.keys()
    for index, (name, parameter) in enumerate(parameters.items()):
        targets[name].fill_(index)
        assert bool((parameter == index).all())
        if parameter.device.type == "cpu":  # another mapping of it
            assert targets[name].data_ptr() != parameter.data_ptr()


def test_a_device_of_another_number_is_the_same_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Worker and server may count the GPUs that they see in different ways. Stands in for a GPU."""

    def rebuild(size: int, storage_device: int, offset: int) -> Tensor:
        return torch.tensor([float(size), float(storage_device), float(offset)])

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    places = Places({"here": (rebuild, (5, 0, 7))}, {"w": Place("here", 1, (2,))})
    assert places.mapped()["w"].tolist() == [3.0, 7.0]


def test_tied_weights_come_under_one_name_or_both(
    serve: Callable[..., Server], tmp_path: Path
) -> None:
    tied = build_model(tie_word_embeddings=True)
    server = serve(write_model(tmp_path, tied))
    weights = dict(tied.state_dict())
    assert "lm_head.weight" in weights

    async def body(named: dict[str, Tensor]) -> list[Any]:
        await update(server, named.items())
        return await ask(server)

    require_greedy(tied, asyncio.run(body(weights)))
    del weights["lm_head.weight"]
    require_greedy(tied, asyncio.run(body(weights)))


def test_weights_in_bf16_run_fused(serve: Callable[..., Server], model: nn.Module) -> None:
    server = serve(dtype="bfloat16")

    async def body() -> list[Any]:
        await update(server, model.state_dict().items())
        return await ask(server)

    outputs = asyncio.run(body())
    assert server._engine is not None
    assert server._engine.path == "fused"
    assert server._engine.copied_bytes == 0
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        expected = forced(model, prompt, output.token_ids)
        torch.testing.assert_close(torch.tensor(output.log_probs), expected, rtol=0, atol=0.3)


@pytest.mark.parametrize("change", ["unknown", "shape", "missing", "fails"])
def test_a_half_written_module_does_not_generate(
    serve: Callable[..., Server], model: nn.Module, change: str
) -> None:
    server = serve()
    weights = dict(build_model(seed=3).state_dict())
    name = "model.layers.1.mlp.up_proj.weight"
    tensor = weights.pop(name)
    if change == "unknown":
        weights["module." + name] = tensor
    elif change == "shape":
        weights[name] = tensor[:-1]

    def handed() -> Iterator[tuple[str, Tensor]]:
        yield from weights.items()
        if change == "fails":
            raise RuntimeError("the trainer failed")

    async def body() -> None:
        with pytest.raises(EnvironmentFault, match="RF7332"):
            await ask(server)
        await update(server, model.state_dict().items())
        require_greedy(model, await ask(server))
        wrong = RuntimeError if change == "fails" else EnvironmentFault
        with pytest.raises(wrong, match="failed" if change == "fails" else rf"RF7332.*{name}"):
            await update(server, handed())
        with pytest.raises(EnvironmentFault, match="RF7332"):
            await ask(server)
        await update(server, model.state_dict().items())
        require_greedy(model, await ask(server))

    asyncio.run(body())


# ---- requests that do not come to their end -----------------------------------------------------

LONG = {"max_tokens": 100, "ignore_eos": True}


async def under_way(server: Server, model: nn.Module) -> asyncio.Task[Any]:
    """A request of 100 tokens that has begun."""
    await update(server, model.state_dict().items(), 1)
    task = asyncio.create_task(ask(server, PROMPTS[:1], **LONG))
    live = None
    while live is None or not live._running:
        await asyncio.sleep(0.001)
        live = server._live
    return task


@pytest.mark.parametrize("what", ["begin_update", "sleep", "abort_all_requests", "abort_request"])
def test_what_is_under_way_is_answered_with_what_it_has(
    serve: Callable[..., Server], model: nn.Module, what: str
) -> None:
    server = serve(engine_kwargs={"rlhf_fast": {"burst": 1}})

    async def body() -> Any:
        task = await under_way(server, model)
        arguments = ("r0",) if what == "abort_request" else ()
        found = await getattr(server, what)(*arguments)
        if what == "abort_all_requests":
            assert found == {"aborted_count": 1, "request_ids": ["r0"]}
        return (await task)[0]

    output = asyncio.run(body())
    whole = generated(model, PROMPTS[0], 100)
    assert output.stop_reason == "aborted"
    assert len(output.token_ids) < 100
    assert output.token_ids[: len(whole)] == whole[: len(output.token_ids)]
    assert len(output.log_probs) == len(output.token_ids)
    assert output.extra_fields["global_steps"] == 1


def test_after_abort_all_requests_wait_or_are_rejected_until_generation_resumes(
    serve: Callable[..., Server], model: nn.Module
) -> None:
    server = serve()

    async def body() -> list[Any]:
        await update(server, model.state_dict().items())
        await server.abort_all_requests()
        task = asyncio.create_task(ask(server))
        await update(server, model.state_dict().items())
        assert not (await asyncio.wait([task], timeout=0.2))[0]
        await server.resume_generation()
        waited = await task
        await server.abort_all_requests(reject_request=True)
        for output in await ask(server):
            assert (output.stop_reason, output.token_ids) == ("aborted", [])
        await server.resume_generation()
        require_greedy(model, await ask(server))
        return waited

    require_greedy(model, asyncio.run(body()))


def test_a_client_that_goes_away_frees_its_place(
    serve: Callable[..., Server], model: nn.Module
) -> None:
    server = serve(max_num_seqs=1)

    async def body() -> list[Any]:
        task = await under_way(server, model)
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        return await ask(server)

    require_greedy(model, asyncio.run(body()))


def test_draining_waits_for_the_last_answer(serve: Callable[..., Server], model: nn.Module) -> None:
    server = serve()

    async def body() -> None:
        task = await under_way(server, model)
        await server.wait_for_requests_to_drain()
        await asyncio.sleep(0)
        assert (await task)[0].stop_reason == "completed"

    asyncio.run(body())


# ---- memory -------------------------------------------------------------------------------------


def test_asleep_it_says_so_and_awake_it_goes_on(
    serve: Callable[..., Server], model: nn.Module
) -> None:
    """The order of verl's step: sleep, weights awake, update, cache awake."""
    server = serve()

    async def body() -> list[Any]:
        await update(server, model.state_dict().items())
        await ask(server)
        await server.sleep()
        assert server._engine is None
        with pytest.raises(EnvironmentFault, match="RF7333"):
            await ask(server)
        await server.wake_up(tags=["weights"])
        await update(server, build_model(seed=3).state_dict().items())
        with pytest.raises(EnvironmentFault, match="RF7333"):
            await ask(server)
        await server.wake_up(tags=["kv_cache"])
        after = await ask(server)
        await server.sleep()
        await server.wake_up()
        if torch.cuda.is_available():  # where the weights gave their memory back
            with pytest.raises(EnvironmentFault, match="RF7332"):
                await ask(server)
            await update(server, build_model(seed=3).state_dict().items())
        require_greedy(build_model(seed=3), await ask(server))
        await server.release_kv_cache()
        await server.resume_kv_cache()
        await server.clear_kv_cache()
        require_greedy(build_model(seed=3), await ask(server))
        return after

    require_greedy(build_model(seed=3), asyncio.run(body()))


def test_with_free_cache_engine_off_it_does_not_sleep(
    serve: Callable[..., Server], model: nn.Module
) -> None:
    server = serve(free_cache_engine=False)

    async def body() -> list[Any]:
        await update(server, model.state_dict().items())
        await server.sleep()
        return await ask(server)

    require_greedy(model, asyncio.run(body()))


# ---- what is refused before anything starts -----------------------------------------------------

WRONG = [
    ({"tensor_model_parallel_size": 2}, "tensor_model_parallel_size=2"),
    ({"data_parallel_size": 2, "repetition_penalty": 1.1}, r"data_parallel.*repetition_penalty"),
    ({"prometheus": workers_config.rollout.PrometheusConfig(enable=True)}, "prometheus"),
    ({"qat": {"enable": True}}, "qat"),
    ({"scheduling_policy": "priority"}, "scheduling_policy"),
    ({"logprobs_mode": "raw_logits"}, "logprobs_mode"),
]


@pytest.mark.parametrize(("options", "words"), WRONG)
def test_options_that_the_server_lacks_are_refused_by_whoever_comes_first(
    path: Path, options: dict[str, Any], words: str
) -> None:
    config, models = rollout_config(**options), model_config(path)
    makers: list[Callable[[], Any]] = [
        lambda: ServerRollout(config, models, replica_rank=0),
        lambda: replica_class()(0, config, models),
        lambda: Server(config, models),
    ]
    for make in makers:
        with pytest.raises(EnvironmentFault, match=rf"RF7331.*{words}"):
            make()


def test_adapters_without_merging_are_refused(path: Path) -> None:
    with pytest.raises(EnvironmentFault, match=r"RF7331.*merge"):
        ServerRollout(rollout_config(), model_config(path, lora_rank=8), replica_rank=0)
    merged = model_config(path, lora_rank=8, lora={"merge": True})
    assert ServerRollout(rollout_config(), merged, replica_rank=3).replica_rank == 3


def test_more_tokens_than_the_model_has_positions_are_refused(
    serve: Callable[..., Server],
) -> None:
    with pytest.raises(EnvironmentFault, match=r"RF7331.*max_model_len=129.*128"):
        serve(max_model_len=129)


def test_an_architecture_that_runs_on_no_pages_is_refused(
    serve: Callable[..., Server], tmp_path: Path
) -> None:
    from transformers import GPTJConfig, GPTJForCausalLM

    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "rotary_dim": 4, "n_positions": 64}
    other = GPTJForCausalLM(GPTJConfig(vocab_size=verl_loop.VOCAB, **sizes))
    with pytest.raises(EnvironmentFault, match=r"RF7331.*gptj"):
        serve(write_model(tmp_path, other))


@pytest.mark.parametrize("role", ["is_reward_model", "is_teacher_model"])
def test_servers_of_other_models_are_refused(path: Path, role: str) -> None:
    with pytest.raises(EnvironmentFault, match="RF7331"):
        replica_class()(0, rollout_config(), model_config(path), **{role: True})


@pytest.mark.parametrize("mode", ["standalone", "colocated"])
def test_modes_without_training_workers_are_refused(path: Path, mode: str) -> None:
    replica = replica_class()(0, rollout_config(), model_config(path))
    start: Callable[..., Awaitable[None]] = getattr(replica, f"init_{mode}")
    with pytest.raises(EnvironmentFault, match=rf"RF7331.*{mode}"):
        asyncio.run(start(*[None] * (mode == "colocated")))
    assert replica.resource_pool is None


def test_updates_of_another_kind_are_refused_before_the_server_hears_of_them(path: Path) -> None:
    rollout = ServerRollout(rollout_config(), model_config(path), replica_rank=0)
    rollout.__dict__["server"] = SimpleNamespace()
    for options in ({"wire_format": "delta_flush"}, {"peft_config": object()}):
        with pytest.raises(EnvironmentFault, match="RF7331"):
            asyncio.run(rollout.update_weights(iter(()), **options))


# ---- the place in verl --------------------------------------------------------------------------


def test_a_registry_that_moved_is_one_error_and_verl_is_as_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base = importlib.import_module("verl.workers.rollout.base")
    before = dict(base._ROLLOUT_REGISTRY)
    monkeypatch.delattr(replica_module.RolloutReplicaRegistry, "_registry")
    with pytest.raises(EnvironmentFault, match=r"RF7303.*RolloutReplicaRegistry\._registry"):
        adapter.install()
    assert before == base._ROLLOUT_REGISTRY


def test_it_has_every_method_that_verl_calls_on_a_server() -> None:
    """Those of verl's replicas, by its own source."""
    inspect, re = importlib.import_module("inspect"), importlib.import_module("re")
    source = inspect.getsource(replica_module.RolloutReplica)
    called = set(re.findall(r"server\.(\w+)\.remote", source))
    assert len(called) >= 9
    assert called <= set(dir(Server))
