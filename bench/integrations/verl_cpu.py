"""verl on a CPU: a platform by its own registry, in every process of a run.

    VERL_USE_EXTERNAL_MODULES=rlhf_fast.integrations.verl,bench.integrations.verl_cpu

verl imports this module in each of its processes. Its resource pools are made of GPUs, of which Ray
is told that they are there (`ray_kwargs.ray_init.num_gpus`). For tests and benches alone.
"""

from __future__ import annotations

import importlib
import os
from functools import partial
from types import ModuleType
from typing import Any

import torch

from .verl_alone import leave_alone


class _NoDevice(ModuleType):
    """What verl asks of `torch.cuda`: nothing to do, and no memory in use."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if "memory" in name or name == "current_device":
            return lambda *_, **__: 0
        return lambda *_, **__: None

    def mem_get_info(self, *_: Any) -> tuple[int, int]:
        return 1 << 34, 1 << 34

    def device_count(self) -> int:
        return 1

    def get_device_name(self, *_: Any) -> str:
        return "CPU"


_MODULE = _NoDevice("one_cpu")
_CPU: dict[str, Any] = {
    "device_name": property(lambda self: "cpu"),
    "vendor_name": property(lambda self: "cpu"),
    "device_module": property(lambda self: _MODULE),
    "is_available": lambda self: True,
    "is_platform_available": lambda self, use_smi_check=False: True,
    "current_device": lambda self: torch.device("cpu"),
    "device_count": lambda self: 1,
    "set_device": lambda self, index: None,
    "synchronize": lambda self, index=None: None,
    "manual_seed": lambda self, seed: None,
    "manual_seed_all": lambda self, seed: None,
    "set_allocator_settings": lambda self, settings: None,
    "empty_cache": lambda self: None,
    "communication_backend_name": lambda self: "gloo",
}


def use_cpu() -> None:
    """Make the CPU verl's platform in this process."""
    platform = importlib.import_module("verl.plugin.platform")
    cuda = importlib.import_module("verl.plugin.platform.platform_cuda").PlatformCUDA
    registry = importlib.import_module("verl.plugin.platform.platform_manager").PlatformRegistry
    if registry.get("cpu") is None:
        registry.register("cpu")(type("OneCPU", (cuda,), _CPU))
    platform.platform_manager._current_platform = registry.get("cpu")()
    os.environ["VERL_ENGINE_DEVICE"] = "cuda"  # its engines are registered for no other name
    # Of "cpu:gloo,{device}:{backend}" PyTorch takes each device once.
    distributed = importlib.import_module("verl.utils.distributed")
    own = distributed.initialize_global_process_group_ray
    distributed.initialize_global_process_group_ray = partial(own, backend="gloo")
    leave_alone()


if __name__ in os.environ.get("VERL_USE_EXTERNAL_MODULES", "").split(","):
    use_cpu()
