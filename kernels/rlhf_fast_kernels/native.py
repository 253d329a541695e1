"""The compiled module `_core`, and how tensors are handed to it.

The package works without `_core`: a missing, broken or foreign module (built for another Python) is
a reason, never an ImportError.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

HERE = Path(__file__).parent

# The values of `enum class DType` in csrc/host/tensor_view.h.
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1}

TensorView = tuple[int, int, int, int]
MaskView = tuple[int, int, int]
Availability = Callable[[torch.device], str | None]


def _load() -> tuple[ModuleType | None, str]:
    try:
        return importlib.import_module("rlhf_fast_kernels._core"), ""
    except ModuleNotFoundError:
        others = sorted(path.name for path in HERE.glob("_core*") if path.suffix in {".so", ".pyd"})
        if others:
            return None, f"the compiled module is for another Python: {', '.join(others)}"
        return None, build_report().get("core_reason") or "no compiled module was built"
    except Exception as error:  # a truncated file, a missing libstdc++, a wrong processor, ...
        return None, f"the compiled module does not load: {error}"


def build_report() -> dict[str, Any]:
    """What the installation built, and why not more; `{}` if it left no report.

    Keys: mode, python, platform, core, core_reason, cuda, cuda_reason, cxx, cmake, nvcc,
    cuda_archs.
    """
    try:
        report = json.loads((HERE / "build_report.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return report if isinstance(report, dict) else {}


_module, _load_reason = _load()


def core() -> Any:
    """The compiled module; RuntimeError with the reason if there is none."""
    if _module is None:
        raise RuntimeError(f"rlhf_fast_kernels._core: {_load_reason}")
    return _module


def missing(*functions: str) -> str | None:
    """Why the compiled module cannot serve these functions; None if it can."""
    if _module is None:
        return _load_reason
    absent = [name for name in functions if not hasattr(_module, name)]
    if absent:
        return f"the compiled module is older than the sources: it lacks {', '.join(absent)}"
    return None


def on_cpu(*functions: str) -> Availability:
    """Availability of a C++ CPU implementation that needs `functions` of the compiled module."""

    def available(device: torch.device) -> str | None:
        if device.type != "cpu":
            return f"reads host memory, the tensors are on {device.type}"
        return missing(*functions)

    return available


def on_cuda(*functions: str) -> Availability:
    """Availability of a CUDA C++ implementation that needs `functions` of the compiled module."""

    def available(device: torch.device) -> str | None:
        if device.type != "cuda":
            return f"reads CUDA memory, the tensors are on {device.type}"
        return missing(*functions) or _cuda_reason(device.index or 0)

    return available


@cache
def _cuda_reason(index: int) -> str | None:
    reason = core().cuda_unusable_reason(index)
    if reason == "built without CUDA":
        return build_report().get("cuda_reason") or reason
    return reason or None


def describe() -> dict[str, str]:
    """One line each for `rlhf-fast env`: the compiled module, its CPU and its CUDA part."""
    if _module is None:
        return {"core": f"no ({_load_reason})", "cpu": "PyTorch", "cuda": "no compiled module"}
    info = _module.build_info()
    if info["cuda"] is None:
        cuda = f"not built ({build_report().get('cuda_reason') or 'no reason recorded'})"
    else:
        cuda = f"toolkit {info['cuda']}, {info['cuda_archs']}; {_module.cuda_status()}"
    return {
        "core": f"yes ({info['compiler']})",
        "cpu": f"{_module.cpu_features()}, {thread_count()} threads",
        "cuda": cuda,
    }


def thread_count() -> int:
    """Threads for one op: as many as torch would use for one of its own."""
    return torch.get_num_threads()


def advise_huge_pages(tensor: torch.Tensor) -> None:
    """Ask for large pages under memory of the host that was just allocated; a hint.

    Where rows lie scattered, as keys and values do, small pages cost more than the reading: 60 MB
    of them were read at 18 GB/s instead of 40.
    """
    if tensor.device.type == "cpu" and missing("advise_huge_pages") is None:
        core().advise_huge_pages(tensor.data_ptr(), tensor.nbytes)


def placement(device: torch.device) -> int | tuple[int, int]:
    """Where a C++ op runs: the number of CPU threads, or CUDA device and current stream."""
    if device.type == "cpu":
        return thread_count()
    return device.index or 0, torch.cuda.current_stream(device).cuda_stream


def view(tensor: torch.Tensor | None) -> TensorView | None:
    """(address, dtype code, row stride, column stride) of `[S, R]`, or of `[N]` as one row."""
    if tensor is None:
        return None
    strides = tensor.stride()
    row, column = strides if len(strides) == 2 else (0, strides[0])
    return tensor.data_ptr(), DTYPE_CODES[tensor.dtype], row, column


def row_view(tensor: torch.Tensor | None) -> TensorView | None:
    """The same of `[S]`: one element per row."""
    if tensor is None:
        return None
    return tensor.data_ptr(), DTYPE_CODES[tensor.dtype], tensor.stride(0), 0


def mask_view(mask: torch.Tensor | None) -> MaskView | None:
    """(address, row stride, column stride) of a bool `[S, R]`, or of `[N]` as one row."""
    if mask is None:
        return None
    strides = mask.stride()
    row, column = strides if len(strides) == 2 else (0, strides[0])
    return mask.data_ptr(), row, column
