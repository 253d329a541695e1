"""What this installation is: versions, machine, what was built and which implementation runs."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
from pathlib import Path
from typing import Any

import torch

import rlhf_fast
from rlhf_fast.errors import EnvironmentFault
from rlhf_fast_kernels import dispatch, native
from rlhf_fast_kernels.attention_backends import choose_attention

REQUIRED = ("torch", "transformers", "safetensors", "peft", "omegaconf", "rich", "numpy")
OPTIONAL = {
    "triton": "Triton kernels (comes with CUDA builds of torch)",
    "flash_attn": "varlen and paged attention on GPUs: extra flash-attn",
    "datasets": "parquet, arrow and hub data: extra data",
    "tensorboard": "metric sink: extra loggers",
    "wandb": "metric sink: extra loggers",
    "trackio": "metric sink: extra loggers",
}


def collect() -> dict[str, Any]:
    """Facts as nested plain values: versions, machine, optional packages, build, ops."""
    return {
        "rlhf_fast": rlhf_fast.__version__,
        "versions": {name: _version(name) or "missing" for name in REQUIRED},
        "optional": {
            name: _version(name) or f"not installed ({use})" for name, use in OPTIONAL.items()
        },
        "machine": _machine(),
        "build": native.describe(),
        "ops": [row._asdict() for row in dispatch.report()],
        "attention": _attention(),
    }


def _attention() -> dict[str, str]:
    """What generation attends with here, in bf16, with heads of 128 and pages of 256 tokens."""
    device = dispatch.devices()[-1]
    choice = choose_attention(device, torch.bfloat16, 128, 256)
    ours = "rlhf_fast" if choice.prefill is None else choice.prefill.name
    return {"decode": choice.decode.name, "prefill": ours, "reason": choice.reason}


def _version(package: str) -> str:
    """Installed version; empty if it cannot be imported."""
    if importlib.util.find_spec(package) is None:
        return ""
    try:
        return importlib.metadata.version(package.replace("_", "-"))
    except importlib.metadata.PackageNotFoundError:
        return "unknown version"


def _machine() -> dict[str, str]:
    gpu = "none visible to torch"
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        gpu = ", ".join(names)
    elif torch.version.cuda is None:
        gpu = "none: this torch is a CPU build"
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_name(),
        "threads": f"{torch.get_num_threads()} of {os.cpu_count()} processors",
        "gpu": gpu,
    }


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or "unknown"


def render(facts: dict[str, Any]) -> str:
    """The facts as plain lines, one table of ops at the end."""
    lines = [f"rlhf_fast {facts['rlhf_fast']}", "", "versions"]
    for section in ("versions", "machine"):
        if section != "versions":
            lines += ["", section]
        lines += [f"  {name:<14}{value}" for name, value in facts[section].items()]
    lines += ["", "optional packages"]
    lines += [f"  {name:<14}{value}" for name, value in facts["optional"].items()]
    lines += ["", "compiled module"]
    lines += [f"  {name:<14}{value}" for name, value in facts["build"].items()]
    lines += ["", "attention of generation"]
    lines += [f"  {name:<14}{value}" for name, value in facts["attention"].items()]
    lines += ["", "ops: what runs, and why nothing else does"]
    for row in facts["ops"]:
        lines.append(f"  {row['op']:<24}{row['device']:<6}{row['impl']:<11}{row['reason']}")
        lines += [f"  {'':<30}not {impl}: {reason}" for impl, reason in row["unavailable"].items()]
    return "\n".join(lines)


def check_op_choice() -> None:
    """Refuse an RLHF_FAST_OPS that names no op or implementation, or one that cannot run here.

    Raises:
        EnvironmentFault: RF7040.
    """
    try:
        dispatch.parse_environment(os.environ.get(dispatch.ENVIRONMENT, ""))
    except ValueError as error:
        raise EnvironmentFault(
            "RF7040",
            str(error),
            where=f"environment variable {dispatch.ENVIRONMENT}",
            remedy="unset it, or see `rlhf-fast env` for ops and implementations",
        ) from error
    device = "cuda" if torch.cuda.is_available() else "cpu"
    broken = [row for row in dispatch.report() if row.impl == "none" and row.device == device]
    if broken:
        raise EnvironmentFault(
            "RF7040",
            "; ".join(row.reason for row in broken),
            where=f"environment variable {dispatch.ENVIRONMENT}",
            remedy="unset it: by default each op takes what can run",
        )


def check_ops() -> tuple[str, bool]:
    """Parity of every implementation that runs here with the reference: (table, all passed)."""
    rows = dispatch.selftest()
    lines = [f"{'op':<24}{'impl':<11}{'device':<8}{'dtype':<10}{'max error':>11}  result"]
    for row in rows:
        verdict = "ok" if row.ok else "FAILED"
        lines.append(
            f"{row.op:<24}{row.impl:<11}{row.device:<8}{row.dtype:<10}{row.max_error:>11.2e}  "
            f"{verdict}{' ' + row.note if row.note else ''}"
        )
    failed = sum(not row.ok for row in rows)
    lines.append(f"{len(rows) - failed} of {len(rows)} checks passed")
    return "\n".join(lines), failed == 0
