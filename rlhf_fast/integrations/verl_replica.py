"""Our server in verl's hands: the replica that starts it, and the worker's side of it.

`replica_class` is what verl's `RolloutReplicaRegistry` loads for `rollout.name=rlhf_fast`: one
server a replica, a Ray actor on the node and the device of the worker that trains. `ServerRollout`
is what that worker makes by the same name, and pushes its weights through.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Iterable
from typing import Any

import torch

from rlhf_fast.integrations.verl_options import NAME, refuse, unsupported_of_server
from rlhf_fast.integrations.verl_server import Server
from rlhf_fast.integrations.verl_weights import copy_weights, require_full_weights


def server_name(replica_rank: int) -> str:
    """Name of a replica's actor, by which its worker finds it."""
    return f"{NAME}_server_{replica_rank}"


class ServerRollout:
    """A training worker's side of the server that shares its device, as verl's `BaseRollout`.

    Args:
        config: verl's `RolloutConfig`.
        model_config: verl's `HFModelConfig`.
        device_mesh: has no meaning here.
        replica_rank: of the server; -1: this process's rank.

    Raises:
        EnvironmentFault: RF7331, an option that our server lacks.
    """

    def __init__(
        self, config: Any, model_config: Any, device_mesh: Any = None, replica_rank: int = -1
    ) -> None:
        as_dataclass = importlib.import_module("verl.utils.config").omega_conf_to_dataclass
        self.config = as_dataclass(config)
        self.model_config = as_dataclass(model_config)
        refuse(unsupported_of_server(self.config, self.model_config))
        self.replica_rank = int(os.environ["RANK"]) if replica_rank < 0 else replica_rank
        self.is_leader_rank = True

    @functools.cached_property
    def server(self) -> Any:
        """Handle of the actor, which starts after this object."""
        return importlib.import_module("ray").get_actor(server_name(self.replica_rank))

    async def update_weights(
        self,
        weights: Iterable[tuple[str, torch.Tensor]],
        global_steps: int | None = None,
        wire_format: str = "named_tensors",
        **options: Any,
    ) -> None:
        """Write named tensors where the server reads them; the server generates from all or none.

        Args:
            weights: (name, tensor) pairs, an iterable or an asynchronous one.
            global_steps: of the trainer, which answers carry.
            wire_format, options: as verl gives them.

        Raises:
            EnvironmentFault: RF7331 another wire format or adapters alone, RF7332 names or shapes
                that are not those of the server's module.
        """
        require_full_weights(wire_format, options)
        targets = (await self.server.begin_update.remote()).mapped()
        await copy_weights(targets, weights)
        if next(iter(targets.values())).is_cuda:
            torch.cuda.synchronize()
        await self.server.finish_update.remote(global_steps)

    async def resume(self, tags: list[str]) -> None:
        """See `Server.wake_up`."""
        if self.config.free_cache_engine:
            await self.server.wake_up.remote(tags=tags)

    async def release(self) -> None:
        """See `Server.sleep`."""
        if self.config.free_cache_engine:
            await self.server.sleep.remote()

    def generate_sequences(self, prompts: Any) -> Any:
        """Requests go to the server; `rlhf_fast.integrations.verl_rollout` generates in process."""
        raise NotImplementedError("verl's rollouts generate through their servers")


@functools.lru_cache(maxsize=1)
def replica_class() -> type:
    """verl's `RolloutReplica` with our server."""
    base: Any = importlib.import_module("verl.workers.rollout.replica").RolloutReplica
    as_dataclass = importlib.import_module("verl.utils.config").omega_conf_to_dataclass

    class Replica(base):
        """One server of ours, beside the worker whose weights it has."""

        def __init__(
            self,
            replica_rank: int,
            config: Any,
            model_config: Any,
            gpus_per_node: int = 8,
            is_reward_model: bool = False,
            is_teacher_model: bool = False,
            name_suffix: str = "",
        ) -> None:
            faults = unsupported_of_server(as_dataclass(config), model_config)
            faults += ["a server of a reward model"] * is_reward_model
            faults += ["a server of a teacher"] * is_teacher_model
            refuse(faults)
            super().__init__(replica_rank, config, model_config, gpus_per_node)

        async def init_colocated(self, resource_pool: Any) -> None:
            refuse(["servers without training workers (colocated)"])

        async def init_standalone(self) -> None:
            refuse(["servers without training workers (standalone)"])

        async def launch_servers(self) -> None:
            server = await _launch(self)
            self.servers = [server]
            self._server_handle = server
            # Not an address of HTTP, which there is none of; verl tells servers apart by it.
            self._server_address = server_name(self.replica_rank)

        async def abort_request(self, request_id: str) -> dict[str, Any]:
            """Answer one request with what there is."""
            return await self._server_handle.abort_request.remote(request_id)

    return Replica


def _place_of(worker: Any) -> tuple[str, str | None]:
    """(node, visible devices) of the process this runs in; None: it has no accelerator."""
    ray = importlib.import_module("ray")
    context = ray.get_runtime_context()
    resource = importlib.import_module("verl.utils.device").get_resource_name()
    devices = context.get_accelerator_ids().get(resource, [])
    return context.get_node_id(), ",".join(devices) if devices else None


async def _launch(replica: Any) -> Any:
    """The actor of a replica; returns when it is ready for weights."""
    ray = importlib.import_module("ray")
    platform = importlib.import_module("verl.plugin.platform").get_platform()
    node, devices = await replica.workers[0].__ray_call__.remote(_place_of)
    strategy = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(node, soft=False)
    server = (
        ray.remote(Server)
        .options(
            name=server_name(replica.replica_rank),
            scheduling_strategy=strategy,
            runtime_env={"env_vars": dict.fromkeys(platform.ray_noset_envvars(), "1")},
            max_concurrency=replica.max_concurrency,
        )
        .remote(replica.config, replica.model_config, replica.replica_rank, devices)
    )
    await server.get_rollout_config.remote()
    return server
