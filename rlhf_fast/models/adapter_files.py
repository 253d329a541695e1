"""Adapters as peft directories: adapter_config.json and adapter_model.safetensors.

`peft.PeftModel.from_pretrained(base, directory)` loads what is exported here, and what it exports
is loaded here, strictly: an adapter of another base model, or one that does more than LoRA, is an
error before anything runs. Nothing is downloaded and no pickle is opened.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from rlhf_fast.config_lora import ALL_LINEAR
from rlhf_fast.distributed.agreement import ALONE
from rlhf_fast.distributed.world import World
from rlhf_fast.errors import ModelError
from rlhf_fast.models.adapters import AdapterModule, AdapterShape, SharedTrunk
from rlhf_fast.models.checks import choose_pad_token
from rlhf_fast.models.directory import ADAPTER_CONFIG, MANIFEST, sha256
from rlhf_fast.models.export import publish_on_main, save_tokenizer
from rlhf_fast.models.heads import Calibration, get_calibration
from rlhf_fast.models.sharded_export import whole

WEIGHTS = "adapter_model.safetensors"
RECORD = "rlhf_fast_adapter.json"
_PREFIX = "base_model.model."
_HEAD = "score.weight"
# Fields of a peft config that change what a layer computes, with the values that plain LoRA has.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "use_dora": (None, False),
    "bias": (None, "none"),
    "lora_bias": (None, False),
    "rank_pattern": (None, {}),
    "alpha_pattern": (None, {}),
    "target_parameters": (None, [], {}),
    "layer_replication": (None, []),
    "trainable_token_indices": (None, [], {}),
    "alora_invocation_tokens": (None, []),
    "use_bdlora": (None, False),
    "kasa_config": (None,),
    # PiSSA, OLoRA, CorDA, LoftQ and others take what A and B begin with out of the base weights, so
    # such an adapter belongs to weights that the base model's directory does not hold.
    "init_lora_weights": (None, True, False, "gaussian", "eva", "orthogonal"),
}


@dataclass(frozen=True)
class AdapterFile:
    """An adapter read from a directory.

    Args:
        directory: where it lay.
        shape: its layers, rank and scale.
        tensors: `<layer>.lora_A.weight` and so on, as `SharedTrunk.tensors` names them.
        head: [1, H] weight of a scalar head; None without one.
        calibration: of the scores; the identity where none is recorded.
    """

    directory: Path
    shape: AdapterShape
    tensors: Mapping[str, Tensor]
    head: Tensor | None
    calibration: Calibration


def load_adapter(path: str | Path, trunk: SharedTrunk) -> AdapterFile:
    """Read an adapter for a trunk.

    Args:
        path: a directory written by peft or by `export_adapter`.
        trunk: what it goes on; unchanged.

    Raises:
        ModelError: no adapter there, or an unreadable one (RF3060); more than plain LoRA (RF3061);
            of another base model (RF3062); NaN or Inf (RF3020).
    """
    directory = Path(os.path.expanduser(path))
    config, record = _read_json(directory, ADAPTER_CONFIG), _read_record(directory)
    odd = [f"{k}={config.get(k)!r}" for k, plain in _PLAIN.items() if config.get(k) not in plain]
    if odd:
        raise ModelError(
            "RF3061",
            "the adapter is more than plain LoRA",
            where=f"{directory / ADAPTER_CONFIG}: {', '.join(odd)}",
            expected="LoRA with one rank and one alpha for all layers, no bias, and the base "
            "model's weights as they are",
            remedy="train such an adapter, or merge this one into a full model with peft",
        )
    tensors = _read_weights(directory)
    head = tensors.pop(_HEAD, None)
    paths = sorted({name.rpartition(".lora_")[0] for name in tensors})
    rank, alpha = _rank_and_alpha(config, directory)
    listed = config.get("target_modules")
    targets = tuple(sorted(map(str, listed))) if isinstance(listed, list) else tuple(paths)
    shape = AdapterShape(rank, alpha, tuple(paths), targets, bool(config.get("use_rslora")))
    _require_same_base(directory, trunk, shape, tensors, head, record.get("trunk_sha256"))
    return AdapterFile(directory, shape, tensors, head, _calibration(record, directory))


def adapter_shape(path: str | Path, trunk: SharedTrunk) -> AdapterShape:
    """The shape that adapter_config.json states; no weights are read.

    Raises:
        ModelError: RF3060, RF3063.
    """
    directory = Path(os.path.expanduser(path))
    config = _read_json(directory, ADAPTER_CONFIG)
    listed = config.get("target_modules")
    # A pattern, or none: peft settles it by names; every layer of the blocks is the most it can be.
    targets = [str(t) for t in listed] if isinstance(listed, list) else [ALL_LINEAR]
    return trunk.shape(*_rank_and_alpha(config, directory), targets)


def export_adapter(
    module: AdapterModule, tokenizer: Any, directory: str | Path, *, world: World = ALONE
) -> Path:
    """Write a role's adapter, and its scalar head if it has one, for peft; with the tokenizer.

    Written and synced beside `directory`, then exchanged with it in one step.

    Args:
        module: the role's parameters on its trunk.
        tokenizer: the trunk's; not changed.
        directory: where to; replaced if it is a model or an adapter.
        world: the ranks that hold the module, each of which calls this; rank 0 writes.

    Returns:
        The directory.

    Raises:
        ModelError: `directory` holds something else (RF3030).
        EnvironmentFault: the disk is full, or writing is not permitted (RF7201).
    """
    assert module.name is not None
    tensors = {
        f"{_PREFIX}{key}": whole(value) for key, value in module.trunk.tensors(module.name).items()
    }
    score = getattr(module, "score", None)
    if score is not None:
        tensors[f"{_PREFIX}{_HEAD}"] = whole(score.weight)

    def write(draft: Path) -> None:
        _write(module, tensors, copy.deepcopy(tokenizer), draft)

    return publish_on_main(directory, write, world)


def _write(
    module: AdapterModule, tensors: Mapping[str, Tensor], tokenizer: Any, draft: Path
) -> None:
    trunk, name, score = module.trunk, module.name, getattr(module, "score", None)
    assert name is not None
    shape = trunk.shapes[name]
    config = shape.peft_config(
        target_modules=list(shape.targets),
        fan_in_fan_out=trunk.is_transposed(shape),
        task_type="CAUSAL_LM" if score is None else "SEQ_CLS",
        modules_to_save=None if score is None else ["score"],
        base_model_name_or_path=trunk.source,
        inference_mode=True,
    )
    choose_pad_token(tokenizer, int(module.get_input_embeddings().weight.shape[0]))
    config.save_pretrained(str(draft))
    _sort_targets(draft / ADAPTER_CONFIG)
    contents = {key: value.cpu().contiguous() for key, value in tensors.items()}
    save_file(contents, draft / WEIGHTS, metadata={"format": "pt"})
    save_tokenizer(tokenizer, draft)
    calibration = get_calibration(module)
    record = {"trunk_sha256": trunk.digest, "calibration": vars(calibration)}
    (draft / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def _sort_targets(path: Path) -> None:
    """peft holds the targets in a set, whose order differs between processes: equal runs would
    leave unequal files.
    """
    content = json.loads(path.read_text(encoding="utf-8"))
    content["target_modules"] = sorted(content["target_modules"])
    path.write_text(json.dumps(content, indent=2, sort_keys=True), encoding="utf-8")


def _read_json(directory: Path, name: str) -> dict[str, Any]:
    try:
        content = json.loads((directory / name).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _unreadable(directory / name, str(error)) from error
    if not isinstance(content, dict):
        raise _unreadable(directory / name, "it is no JSON object")
    return content


def _read_record(directory: Path) -> dict[str, Any]:
    """What `export_adapter` noted; peft's own directories have no such file."""
    return _read_json(directory, RECORD) if (directory / RECORD).exists() else {}


def _rank_and_alpha(config: Mapping[str, Any], directory: Path) -> tuple[int, float]:
    try:
        return int(config.get("r") or 0), float(config.get("lora_alpha") or 0)
    except (TypeError, ValueError, OverflowError) as error:
        raise _unreadable(directory / ADAPTER_CONFIG, f"r or lora_alpha: {error}") from error


def _calibration(record: Mapping[str, Any], directory: Path) -> Calibration:
    try:
        found = Calibration(**(record.get("calibration") or {}))
        return Calibration(float(found.gain), float(found.bias))
    except (TypeError, ValueError) as error:
        raise _unreadable(directory / RECORD, f"calibration: {error}") from error


def _read_weights(directory: Path) -> dict[str, Tensor]:
    """All tensors, names less peft's prefix."""
    file = directory / WEIGHTS
    if (directory / MANIFEST).exists():
        listed = _read_json(directory, MANIFEST).get("sha256")
        if not isinstance(listed, dict):
            raise _unreadable(directory / MANIFEST, "it lists no digests")
        digest = listed.get(WEIGHTS)
        if file.is_file() and digest is not None and sha256(file) != digest:
            raise _unreadable(file, f"its SHA-256 is not the one in {MANIFEST}")
    try:
        loaded = load_file(file)
    except (OSError, SafetensorError) as error:
        raise _unreadable(file, str(error)) from error
    bad = [name for name, tensor in loaded.items() if not bool(torch.isfinite(tensor).all())]
    if bad:
        raise ModelError(
            "RF3020",
            f"NaN or Inf in {len(bad)} loaded weight tensors",
            where=f"{file}: {', '.join(bad[:5])}",
            remedy="the run that wrote them had diverged; use an earlier checkpoint",
        )
    return {name.removeprefix(_PREFIX): tensor for name, tensor in loaded.items()}


def _unreadable(file: Path, reason: str) -> ModelError:
    return ModelError(
        "RF3060",
        f"the adapter cannot be read: {reason}",
        where=str(file),
        expected=f"a directory with {ADAPTER_CONFIG} and {WEIGHTS}, as peft and the stages write",
        remedy="correct the path, or save the adapter again as safetensors",
    )


def _require_same_base(
    directory: Path,
    trunk: SharedTrunk,
    shape: AdapterShape,
    tensors: Mapping[str, Tensor],
    head: Tensor | None,
    digest: Any,
) -> None:
    problems = []
    if digest is not None and digest != trunk.digest:
        problems.append(
            f"it was trained on weights {str(digest)[:12]}, the trunk is {trunk.digest[:12]}"
        )
    wanted = trunk.tensor_shapes(shape)
    width = trunk.model.get_input_embeddings().weight.shape[1]
    if head is not None and tuple(head.shape) != (1, width):
        problems.append(f"its head is {tuple(head.shape)}, the trunk is {width} wide")
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    odd = sorted(n for n in wanted.keys() | found.keys() if wanted.get(n) != found.get(n))
    problems += [f"{n}: {found.get(n)}, the trunk takes {wanted.get(n)}" for n in odd[:3]]
    if problems or not found:
        raise ModelError(
            "RF3062",
            "the adapter belongs to another base model: " + "; ".join(problems or ["no layers"]),
            where=str(directory),
            expected="an adapter of the model that is the trunk",
            remedy="name the base model it was trained on, or train it anew on this one",
        )
