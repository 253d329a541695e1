"""Our server behind Ray: in the hands of verl's server manager, and in verl's own trainer."""

from __future__ import annotations

import asyncio
import importlib
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from rlhf_fast.integrations import verl as adapter
from tests.integrations import verl_loop
from tests.integrations.peers import installed
from tests.integrations.verl_processes import environment, numbers, require_steps, trained

installed("verl", "0.9.1")
ray = pytest.importorskip("ray")

from tests.integrations.test_verl_replica import (  # noqa: E402 - skips without verl
    GREEDY,
    PROMPTS,
    require_greedy,
)
from tests.integrations.verl_loop import build_model  # noqa: E402


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("verl")
    verl_loop.write_model(made / "model", build_model())
    verl_loop.write_run(made)
    return made


# ---- verl's server manager ----------------------------------------------------------------------


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Ray on this machine, whose processes find this checkout and switch the adapter on."""
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    options = {"num_cpus": 4, "include_dashboard": False, "log_to_driver": False}
    ray.init(**options)
    yield
    ray.shutdown()


def worker_class() -> Any:
    """What stands in for a training worker: it makes the rollout of its name and has weights.

    A class of this function travels by value: Ray's processes do not import tests.
    """

    class Worker:
        def __init__(self, config: Any, rank: int) -> None:
            os.environ["RANK"] = str(rank)
            get = importlib.import_module("verl.workers.rollout.base").get_rollout_class
            as_dataclass = importlib.import_module("verl.utils.config").omega_conf_to_dataclass
            settings, model = as_dataclass(config.rollout), as_dataclass(config.model)
            self.rollout = get(config.rollout.name)(
                config=settings, model_config=model, device_mesh=None
            )

        async def update(self, weights: dict[str, torch.Tensor], steps: int) -> None:
            """As `ActorRolloutRefWorker.update_weights`."""
            await self.rollout.resume(tags=["weights"])
            await self.rollout.update_weights(iter(weights.items()), global_steps=steps)
            await self.rollout.resume(tags=["kv_cache"])

    return ray.remote(Worker)


def test_verls_server_manager_drives_two_replicas(cluster: None, directory: Path) -> None:
    """Launch, weights, its client's requests at once, sleep, other weights, requests again."""
    llm_server = importlib.import_module("verl.workers.rollout.llm_server")
    overrides = ("actor_rollout_ref.rollout.prompt_length=16", "data.max_response_length=12")
    config = verl_loop.composed(directory, directory / "model", *overrides)
    workers = [worker_class().remote(config.actor_rollout_ref, rank) for rank in range(2)]
    group = SimpleNamespace(workers=workers, world_size=2)

    def push(model: nn.Module, steps: int) -> None:
        weights = model.state_dict()
        ray.get([worker.update.remote(weights, steps) for worker in workers])

    async def ask(client: Any) -> list[Any]:
        requests = (
            client.generate(f"r{i}", prompt_ids=list(prompt), sampling_params=dict(GREEDY))
            for i, prompt in enumerate(PROMPTS)
        )
        return await asyncio.gather(*requests)

    async def body() -> None:
        manager = await llm_server.LLMServerManager.create(config=config, worker_group=group)
        assert manager.get_addresses() == ["rlhf_fast_server_0", "rlhf_fast_server_1"]
        client, replicas = manager.get_client(), manager.get_replicas()
        with pytest.raises(ray.exceptions.RayTaskError, match="RF7332"):
            await ask(client)
        for steps, seed in enumerate((5, 3)):
            model = build_model(seed)
            await asyncio.to_thread(push, model, steps)
            outputs = await ask(client)
            require_greedy(model, outputs)
            assert {output.extra_fields["max_global_steps"] for output in outputs} == {steps}
            await asyncio.gather(*(replica.sleep() for replica in replicas))
        with pytest.raises(ray.exceptions.RayTaskError, match="RF7333"):
            await ask(client)
        await asyncio.gather(*(replica.wake_up() for replica in replicas))
        require_greedy(build_model(3), await ask(client))

    with adapter.patched():
        asyncio.run(body())


# ---- verl's trainer -----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(600)  # some twenty processes, most of them imports
@pytest.mark.parametrize(
    ("trainer", "ranks", "estimator"), [("v1", 1, "grpo"), ("v1", 2, "gae"), ("v0", 2, "grpo")]
)
def test_verls_trainer_trains_on_our_samples(
    directory: Path, trainer: str, ranks: int, estimator: str
) -> None:
    """`main_ppo`: FSDP2, its agent loop, its reward loop, two steps and an update after each.

    verl compares the probabilities that came with the samples with those its own engine gives. With
    weights of another step, or of one rank's shard, they would be far apart.
    """
    if trainer == "v1":  # verl's default, whose samples travel through a store of their own
        pytest.importorskip("transfer_queue")
    more = verl_loop.critic(directory / "model") if estimator == "gae" else []
    printed = trained(directory, ranks, f"trainer.use_v1={trainer == 'v1'}", *more)
    require_steps(printed, *("actor", "critic")[: 1 + bool(more)])
    samples = [verl_loop.rollouts(directory, step) for step in (1, 2)]
    assert [len(rows) for rows in samples] == [8, 8]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_conversation_with_a_tool_goes_on_behind_its_words(directory: Path) -> None:
    """Each turn is a request with all that was said before; the tool's words are masked."""
    pytest.importorskip("transfer_queue")
    printed = trained(directory, 1, *verl_loop.tools(directory), external="last_word")
    turns = numbers(printed, "num_turns/max")
    assert turns
    assert min(turns) >= 4  # a prompt, the model, the tool, the model again
    for step in (1, 2):
        for row in verl_loop.rollouts(directory, step):
            assert len(row["output"].split()) <= 3 * verl_loop.RESPONSE
