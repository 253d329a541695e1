"""What a figure must carry with it: commit, versions, processor or GPU, clock, load."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

from rlhf_fast_kernels import native

HERE = Path(__file__).resolve().parent
PACKAGE = "rlhf-fast"
DTYPE_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
# Names the commit where the sources were copied without their history.
COMMIT_VARIABLE = "BENCH_COMMIT"
CLOCKS = {"sm_mhz": "clocks.sm", "power_w": "power.draw", "temperature_c": "temperature.gpu"}


def environment(threads: int, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Commit, versions, processor and load; call after `torch.set_num_threads`."""
    device = torch.device(device)
    facts: dict[str, Any] = {
        "commit": _commit(),
        "modified": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "version": _version(PACKAGE),
        "python": platform.python_version(),
        "system": platform.platform(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "transformers": _version("transformers"),
        "device": str(device),
        "cpu": _processor(),
        "cpu_mhz": _clock(),
        "cores": os.cpu_count(),
        "core_module": native.describe()["cpu"],
        "threads": threads,
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    return facts | gpu_facts(device) if device.type == "cuda" else facts


def gpu_facts(device: torch.device) -> dict[str, Any]:
    """Name, memory and generation of the GPU, driver and CUDA versions."""
    properties = torch.cuda.get_device_properties(device)
    return {
        "gpu": properties.name,
        "gpu_memory_gib": round(properties.total_memory / 2**30, 1),
        "gpu_capability": f"{properties.major}.{properties.minor}",
        "gpu_multiprocessors": properties.multi_processor_count,
        "gpu_l2_mib": round(properties.L2_cache_size / 2**20, 1),
        "driver": _nvidia_smi(device, "driver_version"),
        "cuda": torch.version.cuda,
    }


def gpu_clocks(device: torch.device) -> dict[str, float]:
    """SM clock, power and temperature at this moment; without nvidia-smi, nothing."""
    values = _nvidia_smi(device, ",".join(CLOCKS.values())).split(",")
    found = {}
    for name, value in zip(CLOCKS, values, strict=False):
        try:
            found[name] = float(value)
        except ValueError:  # "[N/A]": the machine does not say
            continue
    return found


def _nvidia_smi(device: torch.device, fields: str) -> str:
    # By UUID: the indices of nvidia-smi ignore CUDA_VISIBLE_DEVICES.
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    which = (
        f"GPU-{uuid}".replace("GPU-GPU-", "GPU-") if uuid is not None else str(device.index or 0)
    )
    return _output(
        "nvidia-smi", f"--id={which}", f"--query-gpu={fields}", "--format=csv,noheader,nounits"
    )


def _commit() -> str:
    """Of the checkout, or of what pip installed from a repository; else what the variable says."""
    return (
        _git("rev-parse", "--short=12", "HEAD")
        or _installed_commit()[:12]
        or os.environ.get(COMMIT_VARIABLE, "")
    )


def _installed_commit() -> str:
    # https://packaging.python.org/en/latest/specifications/direct-url
    try:
        text = importlib.metadata.distribution(PACKAGE).read_text("direct_url.json")
    except importlib.metadata.PackageNotFoundError:
        return ""
    return str(json.loads(text or "{}").get("vcs_info", {}).get("commit_id", ""))


def _git(*arguments: str) -> str:
    """What git says of our own checkout: an installation may lie within somebody else's."""
    home = _output("git", "rev-parse", "--show-toplevel")
    if not home or Path(home).resolve() != HERE.parents[1]:
        return ""
    return _output("git", *arguments)


def _output(*command: str) -> str:
    """What a command prints; nothing where it is missing, fails or hangs."""
    try:
        done = subprocess.run(
            command,
            cwd=HERE,
            capture_output=True,
            text=True,
            check=True,
            timeout=30,
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    names = _cpuinfo("model name")
    return names[0] if names else platform.processor()


def _clock() -> float | None:
    """Median clock of the cores at this moment, MHz; None where the system does not tell."""
    found = _cpuinfo("cpu MHz")
    return statistics.median(map(float, found)) if found else None


def _cpuinfo(key: str) -> list[str]:
    """A value of every core."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    return [line.partition(":")[2].strip() for line in lines if line.startswith(key)]
