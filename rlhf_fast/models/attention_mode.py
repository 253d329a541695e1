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


@contextmanager
def attention_mode(configs: tuple[Any, ...], implementation: str) -> Iterator[None]:
    """Make attention layers call `implementation` until the block is left, however it is left.

    Args:
        configs: of the module, `attention_configs(module)`.
        implementation: a name registered with `transformers.AttentionInterface`.
    """
    previous = [config._attn_implementation for config in configs]
    try:
        for config in configs:
            config._attn_implementation = implementation
        yield
    finally:
        for config, name in zip(configs, previous, strict=True):
            config._attn_implementation = name
