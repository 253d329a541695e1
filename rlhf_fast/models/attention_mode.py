"""Which attention implementation a Hugging Face model calls, switched for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


def attention_configs(module: nn.Module) -> tuple[Any, ...]:
    """Every config object of a module and its submodules that names an implementation."""
    configs = {id(c): c for m in module.modules() if (c := getattr(m, "config", None)) is not None}
    return tuple(c for c in configs.values() if hasattr(c, "_attn_implementation"))


def implementations(configs: tuple[Any, ...]) -> tuple[str, ...]:
    """What the attention layers of each config call now."""
    return tuple(config._attn_implementation for config in configs)


def drops_softcap(config: Any) -> bool:
    """Whether the attention that a config names leaves the softcap of the scores out.

    transformers before 5.21 chooses SDPA for such models, which takes the softcap and does nothing
    with it; later versions choose eager attention themselves.
    """
    capped = getattr(config, "attn_logit_softcapping", None) is not None
    return capped and config._attn_implementation == "sdpa"


def keep_softcap(module: nn.Module) -> None:
    """Let the layers for which `drops_softcap` holds call eager attention, which has it."""
    for config in filter(drops_softcap, attention_configs(module)):
        config._attn_implementation = "eager"


@contextmanager
def attention_mode(configs: tuple[Any, ...], *names: str) -> Iterator[None]:
    """Make attention layers call other implementations until the block is left, however it is left.

    Blocks nest: each puts back what it found.

    Args:
        configs: of the module, `attention_configs(module)`.
        names: registered with `transformers.AttentionInterface`: one for all configs, or one each.
    """
    chosen = names * len(configs) if len(names) == 1 else names
    previous = implementations(configs)
    try:
        for config, name in zip(configs, chosen, strict=True):
            config._attn_implementation = name
        yield
    finally:
        for config, name in zip(configs, previous, strict=True):
            config._attn_implementation = name
