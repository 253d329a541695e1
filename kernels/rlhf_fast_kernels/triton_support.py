"""Triton: whether it is here, how its kernels are loaded, launched and compiled ahead of time.

The kernels of an op live in `triton_kernels/<op>.py`, which imports triton when it is imported;
nothing else does, so the package works without it. Such a module holds the jitted kernels, plain
functions that choose their launch settings, and

    AOT_CASES = (AotCase(kernel, signature, constants, num_warps=8), ...)

which `python -m bench.kernels.triton_resources` and the tests compile for sm_80, sm_90 and sm_100
without a GPU.

With TRITON_INTERPRET=1 in the environment before the import, kernels run in Triton's interpreter on
CPU tensors: slow, for tests, and only where an implementation is asked for by name.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from types import ModuleType
from typing import Any

import torch

from rlhf_fast_kernels import dispatch

PACKAGE = "rlhf_fast_kernels.triton_kernels"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OLDEST_CAPABILITY = (8, 0)  # bf16 arithmetic and 48 KiB of shared memory a block


@dataclass(frozen=True)
class AotCase:
    """One specialisation of a kernel, compiled ahead of time.

    Attributes:
        kernel: the jitted function.
        signature: type of every argument that is no constant, e.g. `{"x": "*bf16", "rows": "i32"}`.
        constants: value of every `tl.constexpr` argument; None for an absent tensor.
        num_warps, num_stages: as at the launch.
        hot: a register spill in it fails the tests.
        multiples_of_16: pointers and sizes that are multiples of 16. A launch looks this up itself;
            without it loads of 16 bytes and pipelines of them are not compiled.
        oldest: the first architecture that launches it, as in sm_<oldest>.
    """

    kernel: Any
    signature: Mapping[str, str]
    constants: Mapping[str, Any] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 3
    hot: bool = True
    multiples_of_16: tuple[str, ...] = ()
    oldest: int = 80


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


@cache
def installed() -> bool:
    """Whether triton can be imported; looked up without importing it."""
    return importlib.util.find_spec("triton") is not None


def on_triton(device: torch.device) -> str | None:
    """Availability of a Triton implementation, for `dispatch.register`."""
    if not installed():
        return "triton is not installed"
    if device.type == "cuda":
        return _capability_reason(device.index or 0)
    if device.type == "cpu" and interpreting():
        return None
    return f"Triton kernels run on CUDA devices, the tensors are on {device.type}"


@cache
def _capability_reason(index: int) -> str | None:
    found = torch.cuda.get_device_capability(index)
    if found >= OLDEST_CAPABILITY:
        return None
    wanted = ".".join(map(str, OLDEST_CAPABILITY))
    return f"needs compute capability {wanted}, device {index} has {found[0]}.{found[1]}"


def register(op: str, function: Callable[..., Any], *, preference: int | None = None) -> None:
    """Add the Triton implementation of an op to the dispatcher.

    Args:
        op: name of the op.
        function: as for `dispatch.register`.
        preference: default `dispatch.PREFERENCES["triton"]`; an op on [tokens, vocab], for which a
            launch costs nothing beside the work, goes above CUDA. The interpreter comes after
            everything else, the reference included.
    """
    rank = dispatch.BY_NAME_ONLY if interpreting() else preference
    dispatch.register(op, "triton", function, on_triton, dtypes=DTYPES, preference=rank)


@cache
def kernels(op: str) -> ModuleType:
    """The kernels of an op; imports triton at the first call."""
    return importlib.import_module(f"{PACKAGE}.{op}")


def ops_with_kernels() -> tuple[str, ...]:
    """Names of the modules in `triton_kernels`, without what several of them share (`_name`)."""
    package = importlib.import_module(PACKAGE)
    names = (module.name for module in pkgutil.iter_modules(package.__path__))
    return tuple(sorted(name for name in names if not name.startswith("_")))


def launch(
    kernel: Any, programs: int, device: torch.device, *arguments: Any, **options: Any
) -> None:
    """Run `kernel` on a 1-D grid of `programs` on `device`'s current stream.

    Grids are 1-D because the other two dims end at 65535. FP fusion is named because its default
    differs between versions of Triton, and with it the bits of a result.
    """
    if device.type == "cuda":
        with torch.cuda.device(device):
            kernel[(programs,)](*arguments, enable_fp_fusion=True, **options)
    else:
        kernel[(programs,)](*arguments, **options)
