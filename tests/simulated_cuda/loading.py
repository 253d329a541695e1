"""Put the simulated device into this process; nothing may have imported PyTorch before."""

from __future__ import annotations

import ctypes
import importlib.machinery
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

from tests.simulated_cuda.building import built, torch_folder


def load() -> None:
    """Make `torch.cuda` say that there are devices, and let them work."""
    if "torch" in sys.modules:
        raise RuntimeError("the simulated device must be loaded before torch is imported")
    os.environ.setdefault("TRITON_INTERPRET", "1")
    libraries = built()
    # By hand, so that the device's library finds the PyTorch of this environment.
    for name in ("libc10.so", "libtorch_cpu.so", "libtorch.so", "libtorch_python.so"):
        ctypes.CDLL(str(torch_folder() / "lib" / name), mode=ctypes.RTLD_GLOBAL)
    ctypes.CDLL(str(libraries["simulated_cuda"]), mode=ctypes.RTLD_GLOBAL)
    import torch  # noqa: F401

    device = _extension("simulated_cuda", libraries["simulated_cuda"])
    device.set_device_count(int(os.environ.get("SIMULATED_CUDA_DEVICES", "1")))

    from tests.simulated_cuda import attention, launches, process_groups, storages, torch_cuda

    torch_cuda.install()
    storages.install()
    launches.install()
    attention.install()
    process_groups.install(_extension("simulated_nccl", libraries["simulated_nccl"]))


def _extension(name: str, path: Path) -> ModuleType:
    loader = importlib.machinery.ExtensionFileLoader(name, str(path))
    spec = importlib.util.spec_from_file_location(name, path, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    loader.exec_module(module)
    return module
