"""Configuration in a report: every setting, and which of them differ from the defaults."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlhf_fast.config import (
    EvalConfig,
    PPOConfig,
    RewardModelConfig,
    SFTConfig,
    StageConfig,
    leaves,
)
from rlhf_fast.report.html import details, table

_KINDS: Mapping[str, type[StageConfig]] = {
    "sft": SFTConfig,
    "rm": RewardModelConfig,
    "reward_model": RewardModelConfig,
    "ppo": PPOConfig,
    "eval": EvalConfig,
    "evaluate": EvalConfig,
}
_NO_DEFAULT = "-"


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one mapping with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def changes(stage: str, config: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Settings that differ from the stage's defaults: (key, default, value), sorted by key.

    Args:
        stage: name of the stage; for an unknown one every setting counts as changed.
        config: nested settings as stored in the run directory.
    """
    kind = _KINDS.get(stage)
    defaults = {key: value for key, value, _ in leaves(kind())} if kind else {}
    found = []
    for key, value in sorted(flatten(config).items()):
        default = defaults.get(key, _NO_DEFAULT)
        if default != value:
            found.append((key, _text(default), _text(value)))
    return found


def config_part(stage: str, config: Mapping[str, Any]) -> str:
    """Tables of a stage's changed settings and, folded, of all of them; empty without a config."""
    if not config:
        return ""
    everything = [(key, _text(value)) for key, value in sorted(flatten(config).items())]
    changed = table(
        ("setting", "default", "this run"), changes(stage, config), ("code", "code", "code")
    )
    all_of_them = table(("setting", "value"), everything, ("code", "code"))
    return changed + details(f"all {len(everything)} settings of {stage}", all_of_them)


def _text(value: Any) -> str:
    return '""' if value == "" else str(value)
