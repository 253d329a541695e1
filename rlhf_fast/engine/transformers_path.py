"""Which models may run through transformers' continuous batching."""

from __future__ import annotations

from torch import nn
from transformers.utils.versions import require_version

from rlhf_fast.engine.module_forward import PAGED_MODEL_TYPES, batch_dependent_rope, unwrapped
from rlhf_fast.models.forward import compute_dtype, foreign_attention, kept_in_bf16

# Each is held by a test: what transformers cannot run it may get wrong without a word (softcaps).
TRANSFORMERS_MODEL_TYPES = (PAGED_MODEL_TYPES - {"gemma2", "gpt_neox", "opt", "vaultgemma"}) | {
    *("gpt_oss", "granite_swa", "granitemoe_swa", "phimoe"),
}


def version_fault() -> str | None:
    """What keeps the continuous batching of the installed version from running with our sampler."""
    try:
        # Before, it has no bound on rows (5.10) or leaves windows of attention out (5.15).
        require_version("transformers>=5.17")
        import rlhf_fast.engine.transformers_runner  # noqa: F401
    except ImportError as error:
        return f"continuous batching of this transformers does not run with our sampler ({error})"
    return None


def why_not_transformers(module: nn.Module) -> str | None:
    """None if transformers' continuous batching can draw what the engine promises, or why not."""
    fault = version_fault()
    if fault is not None:
        return fault
    config = unwrapped(module).config
    if config.model_type not in TRANSFORMERS_MODEL_TYPES:
        return f"architecture {config.model_type} is not known to run in continuous batching"
    if batch_dependent_rope(config):
        return "its rotary embedding depends on the longest sequence of the batch"
    if getattr(config, "attn_logit_softcapping", None) is not None:
        return "its attention leaves the softcap of the scores out"
    if compute_dtype(module) == "bfloat16" and not kept_in_bf16(module):
        return "it runs in a thread of its own, where bf16 over fp32 masters is not switched on"
    return foreign_attention(config)
