"""Dropout off, remembered, and put back into the config on export."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

_MEMORY = "rlhf_fast_dropout_before"

# `attn_pdrop` and friends are GPT-2's names; jitter is the noise that MoE routers add in train
# mode; layerdrop skips whole layers.
_NAME_PARTS = ("dropout", "pdrop", "layerdrop", "jitter_noise")


def disable_dropout(module: nn.Module) -> None:
    """Set every source of randomness in a train-mode forward to 0: layers and config fields.

    Reaches `nn.Dropout` layers, probabilities that attention and router modules copied from their
    config, and the config fields themselves. `dropout_before` keeps the config's own values.
    """
    for child in module.modules():
        if isinstance(child, nn.modules.dropout._DropoutNd):
            child.p = 0.0
            continue
        for name in _probabilities(vars(child)):
            setattr(child, name, 0.0)
    memory: dict[str, float] = getattr(module, _MEMORY, {})
    for config in _configs(module):
        for name in _probabilities(vars(config)):
            if config is module.config:
                memory.setdefault(name, getattr(config, name))
            setattr(config, name, 0.0)
    setattr(module, _MEMORY, memory)


def dropout_before(module: nn.Module) -> dict[str, float]:
    """The config fields that `disable_dropout` changed, with the values they had."""
    memory: dict[str, float] = getattr(module, _MEMORY, {})
    return dict(memory)


def remember_dropout(module: nn.Module, source: nn.Module) -> None:
    """Let `dropout_before(module)` be that of `source`."""
    setattr(module, _MEMORY, dropout_before(source))


def _probabilities(fields: dict[str, Any]) -> list[str]:
    return [
        name
        for name, value in fields.items()
        if isinstance(value, float) and value > 0 and any(part in name for part in _NAME_PARTS)
    ]


def _configs(module: nn.Module) -> Iterator[Any]:
    found = {id(c): c for m in module.modules() if (c := getattr(m, "config", None)) is not None}
    yield from found.values()
