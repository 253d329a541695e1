"""Which device a process computes on."""

from __future__ import annotations

import os

import torch

from rlhf_fast.config import RunConfig
from rlhf_fast.errors import ConfigError, EnvironmentFault
from rlhf_fast.launch import launched_ranks


def choose_device(config: RunConfig) -> torch.device:
    """The device a config asks for, of several GPUs that of this rank; errors as in `setup_run`."""
    wanted = config.device
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    if wanted == "cuda" and launched_ranks() > 1:
        wanted = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    elif wanted.startswith("cuda:") and launched_ranks() > 1:
        raise ConfigError(
            "RF1030",
            f"device {wanted!r} for {launched_ranks()} processes",
            where="run.device",
            expected="cuda: each process takes the GPU of its local rank",
            remedy="set run.device=cuda, and CUDA_VISIBLE_DEVICES if some are to be left out",
        )
    name, _, index = wanted.partition(":")
    if name not in ("cpu", "cuda") or (index and not index.isdecimal()):
        raise ConfigError(
            "RF1030",
            f"unknown device {config.device!r}",
            where="run.device",
            expected="auto, cpu, cuda or cuda:N",
            remedy="set it to one of these",
        )
    if name == "cuda":
        devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if int(index or 0) >= devices:
            raise EnvironmentFault(
                "RF7030",
                f"device {config.device} was asked for, {devices} CUDA devices are usable",
                where="run.device",
                expected="a GPU, its driver, and a torch built for it "
                f"(this torch: {torch.__version__}, CUDA {torch.version.cuda or 'none'})",
                remedy="run `rlhf-fast env`, or set run.device=cpu",
            )
        if config.dtype == "bfloat16" and not _computes_in_bf16(torch.device(wanted)):
            raise EnvironmentFault(
                "RF7031",
                "this GPU does not compute in bfloat16",
                where="run.dtype",
                remedy="set run.dtype=float32",
            )
    return torch.device(wanted)


def _computes_in_bf16(device: torch.device) -> bool:
    """Whether a GPU has bf16 products: by default PyTorch counts that it can hold such a tensor."""
    # Of this device, not of the first one, on which every rank would leave a context.
    with torch.cuda.device(device):
        return torch.cuda.is_bf16_supported(including_emulation=False)
