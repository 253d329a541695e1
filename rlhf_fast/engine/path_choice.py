"""Which of the ways of running a model is taken, and why."""

from __future__ import annotations

from torch import nn

from rlhf_fast.engine.fused_support import why_not_fused
from rlhf_fast.engine.module_forward import why_not_paged
from rlhf_fast.engine.transformers_path import why_not_transformers
from rlhf_fast.errors import GenerationError
from rlhf_fast.models.attention_mode import attention_configs, drops_softcap

PATHS = ("auto", "fused", "modules", "transformers", "padded")


def choose_path(module: nn.Module, wish: str) -> tuple[str, str]:
    """(path, why that one).

    Args:
        module: what generates.
        wish: one of PATHS.

    Raises:
        GenerationError: RF4003, no path can run it; RF4032, the path wished for cannot; RF4045, its
            own forward computes another function than its config says.
    """
    if wish not in PATHS:
        raise GenerationError("RF4032", f"no path {wish!r}", expected=f"one of {', '.join(PATHS)}")
    if any(c.is_prompt_learning for c in getattr(module, "peft_config", {}).values()):
        raise GenerationError(
            "RF4003",
            "adapters of prompt learning put tokens before the prompt, which no path samples from",
            expected="adapters inside the layers, such as LoRA",
        )
    if any(drops_softcap(config) for config in attention_configs(module)):
        raise GenerationError(
            "RF4045",
            "the model's SDPA attention leaves the softcap of its scores out",
            expected="log-probs in training that are those of the samples",
            remedy="load it with attn_implementation='eager'",
        )
    not_fused = why_not_fused(module)
    not_paged = why_not_paged(module)
    obstacles = {"fused": not_fused, "modules": not_paged, "padded": None}
    if wish == "transformers":
        obstacles[wish] = why_not_transformers(module)
    if wish == "auto":
        if not_fused is None:
            return "fused", "the fused forward knows this architecture"
        if not_paged is None:
            return "modules", not_fused
        return "padded", not_paged
    obstacle = obstacles[wish]
    if obstacle is not None:
        raise GenerationError(
            "RF4032",
            f"engine.path={wish} cannot run: {obstacle}",
            where=f"engine.path, {type(module).__name__}",
            remedy="use engine.path=auto",
        )
    return wish, "asked for"
