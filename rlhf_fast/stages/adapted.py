"""What the stages share about adapters: a trunk with one, its checkpoints, its exports."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rlhf_fast.config import RewardModelConfig, SFTConfig
from rlhf_fast.config_lora import AdapterConfig
from rlhf_fast.distributed.agreement import ALONE
from rlhf_fast.distributed.world import World
from rlhf_fast.models.adapter_files import export_adapter
from rlhf_fast.models.adapter_roles import merged_classifier
from rlhf_fast.models.adapters import AdapterModule, SharedTrunk
from rlhf_fast.models.checks import check_positions, check_vocabulary
from rlhf_fast.models.export import export_model
from rlhf_fast.models.forward import compute_dtype
from rlhf_fast.models.heads import require_classifier
from rlhf_fast.models.loading import load_causal_lm
from rlhf_fast.models.merged_export import export_merged
from rlhf_fast.stages.placing import place
from rlhf_fast.stages.training import compute_type, export_bytes, training_bytes

ADAPTER_NAME = "adapter"


def open_trunk(module: nn.Module, path: str) -> SharedTrunk:
    """A loaded model as a trunk that says where it came from."""
    model: Any = module
    named = os.path.abspath(path) if os.path.isdir(path) else path
    return SharedTrunk(model, source=named or str(getattr(model.config, "name_or_path", "")))


def place_trunk(
    trunk: SharedTrunk,
    device: torch.device,
    *,
    gradient_checkpointing: bool,
    world: World = ALONE,
) -> None:
    """Put a trunk with all its adapters on a device: in bf16 if it computes so.

    It is frozen, so it needs no fp32 masters. On several ranks it is placed there; see `place`.
    """
    if compute_dtype(trunk.model) == "bfloat16":
        trunk.hold_in(torch.bfloat16)
    if world.size > 1:
        place(trunk.model, world)
    trunk.prepare(device, gradient_checkpointing=gradient_checkpointing)


def one_adapter(
    config: SFTConfig | RewardModelConfig,
    tokenizer: Any,
    world: World,
    *,
    name: str,
    longest: int,
) -> SharedTrunk:
    """The config's model as a trunk with one new adapter, checked and placed on the ranks.

    Args:
        config: with `lora.rank` above 0; `model` is a causal LM.
        tokenizer: encodes the data.
        world: where to.
        name: of the adapter.
        longest: tokens of the longest sequence it will read.

    Raises:
        ModelError: as `load_causal_lm`, RF3021, RF3028, RF3050, RF3063, RF3064.
    """
    module = load_causal_lm(config.model, dtype=compute_type(config.run))
    check_vocabulary(tokenizer, module)
    check_positions(module, longest)
    require_mergeable(config, module)
    trunk = open_trunk(module, config.model)
    shape = trunk.shape(config.lora.rank, config.lora.alpha, config.lora.targets)
    trunk.add(name, shape, seed=config.run.seed, trainable=True)
    place_trunk(
        trunk,
        world.device,
        gradient_checkpointing=config.gradient_checkpointing,
        world=world,
    )
    return trunk


def require_mergeable(config: SFTConfig | RewardModelConfig, module: nn.Module) -> None:
    """Refuse a merged export that could not be written at the end, before anything is trained.

    Raises:
        ModelError: RF3028, a merged reward model is a sequence classifier.
    """
    if isinstance(config, RewardModelConfig) and config.lora.merge_on_export:
        model: Any = module
        require_classifier(type(model.config), f"lora.merge_on_export of {config.model}")


def trunk_digest(module: nn.Module) -> dict[str, str]:
    """What a checkpoint of a role does not hold, and must find again: name -> SHA-256."""
    return {"trunk": module.trunk.digest} if isinstance(module, AdapterModule) else {}


def export_adapted(
    module: AdapterModule, tokenizer: Any, directory: Path, *, merge: bool, world: World = ALONE
) -> Path:
    """The adapter in `directory`; or, to `merge`, a full model there and it beside, as `adapter`.

    Errors as for `export_adapter`; of several ranks each calls it.
    """
    if not merge:
        return export_adapter(module, tokenizer, directory, world=world)
    assert module.name is not None
    export_adapter(module, tokenizer, directory.with_name(ADAPTER_NAME), world=world)
    if world.size > 1:
        return export_merged(module, tokenizer, directory, world)
    whole = (
        merged_classifier(module) if hasattr(module, "score") else module.trunk.merged(module.name)
    )
    return export_model(whole, tokenizer, directory)


def stage_bytes(model: str, keep_last: int, lora: AdapterConfig) -> int:
    """Disk space a stage needs at least; with an adapter, which is small, that of its exports."""
    if lora.rank == 0:
        return training_bytes(model, keep_last)
    return export_bytes(model) if lora.merge_on_export else 0
