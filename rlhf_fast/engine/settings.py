"""How generation runs: sizes, memory, and what is chosen from them."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral

import torch
from torch import nn

from rlhf_fast.config import EngineConfig
from rlhf_fast.engine.host_memory import available_host_memory
from rlhf_fast.engine.module_forward import cache_shape_of
from rlhf_fast.engine.paged_cache import default_page_size
from rlhf_fast.errors import GenerationError
from rlhf_fast_kernels.attention_backends import AttentionChoice, choose_attention

# Of what is free before a rollout: the rest is for activations and for what else runs.
GPU_SHARE, _CPU_SHARE = 0.8, 0.25


@dataclass(frozen=True)
class EngineSettings:
    """How generation runs.

    Args:
        path: one of PATHS; auto takes the first of fused, modules and padded that can run.
        max_batch: samples decoded side by side at most.
        kv_bytes: key-value memory at most; 0: four fifths of the free memory of a GPU, a quarter of
            that of the host.
        page_size: tokens of a page; 0: 64 on a CPU, 256 on a GPU. At least 4 with
            path=transformers.
        prefill_tokens: tokens of one prefill forward.
        burst: decoding steps between two looks of the host; 0: 8, or 1 where an ended row would go
            on until then.
        poison: debug mode: freed pages become NaN.
        keep_memory: hold a GPU's key-value memory, and a bf16 copy of fp32 weights, between
            rollouts.
        attention: what attends on the fused path, one of `attention_backends.NAMES`, or auto.
        cuda_graphs: record decoding steps on a GPU; see `decode_graphs`.

    Raises:
        GenerationError: RF4038, a size below its least.
    """

    path: str = "auto"
    max_batch: int = 256
    kv_bytes: int = 0
    page_size: int = 0
    prefill_tokens: int = 8192
    burst: int = 0
    poison: bool = False
    keep_memory: bool = False
    cuda_graphs: bool = True
    attention: str = "auto"

    def __post_init__(self) -> None:
        least = {"max_batch": 1, "kv_bytes": 0, "page_size": 0, "prefill_tokens": 1, "burst": 0}
        if self.path == "transformers" and self.page_size != 0:  # 0 is the default
            least["page_size"] = 4  # transformers refuses smaller ones
        faults = [
            f"{name}={value!r}: an integer, at least {low}"
            for name, low in least.items()
            if not (isinstance(value := getattr(self, name), Integral) and int(value) >= low)
        ]
        if faults:
            raise GenerationError(
                "RF4038",
                f"{len(faults)} size{'s' if len(faults) > 1 else ''} with which nothing can run",
                where="EngineSettings",
                expected="; ".join(faults),
                remedy="raise what is named, or leave it at its default",
            )


def engine_settings(config: EngineConfig, max_batch: int) -> EngineSettings:
    """The engine section of a stage's config, and how many samples decode side by side."""
    return EngineSettings(
        path=config.path,
        max_batch=max_batch,
        kv_bytes=int(config.kv_gb * 1e9),
        page_size=config.page_size,
        prefill_tokens=config.prefill_tokens,
        burst=config.burst,
        keep_memory=config.keep_memory,
        cuda_graphs=config.cuda_graphs,
        attention=config.attention,
    )


def choose_attention_for(
    module: nn.Module, settings: EngineSettings, device: torch.device
) -> AttentionChoice:
    """What attends on the fused path.

    Raises:
        GenerationError: RF4032, what the settings name cannot.
    """
    shape = cache_shape_of(module)
    page_size = settings.page_size or default_page_size(device.type)
    try:
        return choose_attention(
            device, shape.dtype, shape.head_dim, page_size, wish=settings.attention
        )
    except ValueError as error:
        raise GenerationError(
            "RF4032",
            f"engine.attention: {error}",
            where=f"engine.attention, {type(module).__name__}",
            remedy="use engine.attention=auto",
        ) from error


def padded_slots(module: nn.Module, kv_bytes: int) -> int | None:
    """Tokens that a padded batch may hold in all; None: no limit was set."""
    return kv_bytes // cache_shape_of(module).token_bytes if kv_bytes else None


def cache_budget(device: torch.device, wish: int, coming: int = 0) -> int:
    """Bytes of key-value memory at most; a rollout will take `coming` bytes beside it."""
    if wish > 0:
        return wish
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(GPU_SHARE * max(0, free + held - coming))
    return int(_CPU_SHARE * max(0, available_host_memory() - coming))
