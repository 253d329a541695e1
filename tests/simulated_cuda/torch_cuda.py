"""What `torch.cuda` answers: devices, memory, random numbers."""

from __future__ import annotations

import contextlib
from typing import Any

import simulated_cuda
import torch

from tests.simulated_cuda import streams
from tests.simulated_cuda.process_groups import VERSION

SYNC_MODES = {"default": 0, "warn": 1, "error": 2}


class Properties:
    """Of an H100, but for its memory."""

    name = "simulated"
    major, minor = 9, 0
    multi_processor_count = 132
    warp_size = 32
    max_threads_per_multi_processor = 2048
    shared_memory_per_block = 48 << 10
    shared_memory_per_block_optin = 227 << 10
    shared_memory_per_multiprocessor = 228 << 10
    regs_per_multiprocessor = 64 << 10
    L2_cache_size = 50 << 20
    clock_rate = 1_980_000
    memory_clock_rate = 2_619_000
    memory_bus_width = 5120
    gcnArchName = "sm_90"
    is_integrated = 0
    uuid = "GPU-00000000-0000-0000-0000-000000000000"

    @property
    def total_memory(self) -> int:
        return int(simulated_cuda.capacity())


class on_device(contextlib.ContextDecorator):
    """`torch.cuda.device`."""

    def __init__(self, device: Any) -> None:
        self._index = index_of(device)

    def __enter__(self) -> None:
        self._before = simulated_cuda.current_device()
        simulated_cuda.set_device(self._index)

    def __exit__(self, *_: object) -> None:
        simulated_cuda.set_device(self._before)


def index_of(device: Any = None) -> int:
    """The number of a device; of the current one if none is named."""
    if isinstance(device, str | torch.device):
        device = torch.device(device)
        if device.type != "cuda":
            raise ValueError(f"Expected a cuda device, but got: {device}")
        device = device.index
    return simulated_cuda.current_device() if device is None or device < 0 else int(device)


def _allocated(device: Any = None) -> int:
    return int(simulated_cuda.allocated(index_of(device)))


def _peak(device: Any = None) -> int:
    return int(simulated_cuda.peak(index_of(device)))


def _statistics(device: Any = None) -> dict[str, int]:
    kinds = {"current": _allocated(device), "peak": _peak(device)}
    numbers = {
        f"{name}.all.{kind}": value
        for name in ("allocated_bytes", "reserved_bytes", "active_bytes")
        for kind, value in kinds.items()
    }
    return {**numbers, "num_alloc_retries": 0, "num_ooms": 0}


def _free(device: Any = None) -> tuple[int, int]:
    capacity = int(simulated_cuda.capacity())
    return capacity - _allocated(device), capacity


def _generators() -> list[torch.Generator]:
    return [simulated_cuda.default_generator(i) for i in range(simulated_cuda.device_count())]


def _generator(device: Any = "cuda") -> torch.Generator:
    return simulated_cuda.default_generator(index_of(device))


def _seed_all(seed: int) -> None:
    for generator in _generators():
        generator.manual_seed(seed)


def _set_states(states: Any) -> None:
    for generator, state in zip(_generators(), states, strict=True):
        generator.set_state(state)


def _devices() -> dict[str, Any]:
    return {
        "_lazy_init": lambda: None,
        "_is_compiled": lambda: True,
        "init": lambda: None,
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: simulated_cuda.device_count(),
        "current_device": lambda: simulated_cuda.current_device(),
        "set_device": lambda device: simulated_cuda.set_device(index_of(device)),
        "device": on_device,
        "_DeviceGuard": on_device,
        "get_device_properties": lambda device=None: Properties(),
        "get_device_capability": lambda device=None: (Properties.major, Properties.minor),
        "get_device_name": lambda device=None: Properties.name,
        "get_arch_list": lambda: ["sm_90"],
        "is_bf16_supported": lambda including_emulation=True: True,
        "can_device_access_peer": lambda one, other: True,
        "set_sync_debug_mode": lambda mode: simulated_cuda.set_sync_mode(
            SYNC_MODES.get(mode, mode)
        ),
        "get_sync_debug_mode": lambda: simulated_cuda.sync_mode(),
    }


def _memory() -> dict[str, Any]:
    return {
        "memory_allocated": _allocated,
        "max_memory_allocated": _peak,
        "memory_reserved": _allocated,
        "max_memory_reserved": _peak,
        "reset_peak_memory_stats": lambda device=None: simulated_cuda.reset_peak(index_of(device)),
        "memory_stats": _statistics,
        "mem_get_info": _free,
        "empty_cache": lambda: None,
        "ipc_collect": lambda: None,
    }


def _random() -> dict[str, Any]:
    return {
        "default_generators": tuple(_generators()),
        "manual_seed": lambda seed: _generator().manual_seed(seed),
        "manual_seed_all": _seed_all,
        "seed": lambda: _generator().seed(),
        "seed_all": lambda: _seed_all(_generator().seed()),
        "initial_seed": lambda: _generator().initial_seed(),
        "get_rng_state": lambda device="cuda": _generator(device).get_state(),
        "set_rng_state": lambda state, device="cuda": _generator(device).set_state(state),
        "get_rng_state_all": lambda: [generator.get_state() for generator in _generators()],
        "set_rng_state_all": _set_states,
    }


# What other modules of PyTorch import from its CUDA build.
_C_FUNCTIONS: dict[str, Any] = {
    "_cuda_isInBadFork": lambda: False,
    "_cuda_getDeviceCount": lambda: torch.cuda.device_count(),
    "_cuda_getDevice": lambda: simulated_cuda.current_device(),
    "_cuda_setDevice": lambda device: simulated_cuda.set_device(device),
    "_cuda_getCurrentRawStream": lambda device: 0,
    "_nccl_version": lambda: VERSION,
}


def install() -> None:
    """Answer in the place of `torch.cuda`."""
    for name, function in _C_FUNCTIONS.items():
        setattr(torch._C, name, function)
    tables = (_devices(), _memory(), _random(), streams.table())
    for name, value in (item for table in tables for item in table.items()):
        setattr(torch.cuda, name, value)
        for module in (torch.cuda.memory, torch.cuda.random, torch.cuda.streams, torch.cuda.graphs):
            if hasattr(module, name):
                setattr(module, name, value)
    for name in ("range_push", "range_pop", "mark"):
        setattr(torch.cuda.nvtx, name, lambda *_, **__: 0)
    torch.version.cuda = "13.0"
