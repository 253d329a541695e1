"""What must hold of a Hugging Face model directory before anything is loaded from it."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError, safe_open
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from rlhf_fast.errors import ModelError

MANIFEST = "rlhf_fast_manifest.json"
ADAPTER_CONFIG = "adapter_config.json"
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def resolve(path: str | Path) -> Path:
    """The directory of a model: `path` itself, or the cached snapshot of a hub name.

    The network is never asked, so an unknown name fails at once.

    Raises:
        ModelError: neither a directory nor a cached name, or it holds no config.json.
    """
    directory = Path(os.path.expanduser(path))
    if not directory.is_dir():
        directory = _cached_snapshot(str(path))
    if (directory / ADAPTER_CONFIG).is_file() and not (directory / "config.json").is_file():
        raise ModelError(
            "RF3066",
            "the directory holds an adapter, not a model",
            where=str(directory),
            expected="a whole model",
            remedy="train with lora.merge_on_export=true for one, or name it as lora.actor_adapter "
            "or lora.reward_adapter",
        )
    if not (directory / "config.json").is_file():
        raise ModelError(
            "RF3011",
            "the directory holds no config.json",
            where=str(directory),
            expected="a directory written by save_pretrained, or by a stage of this package",
            remedy="check the path; a checkpoint's model lies in a folder of its own",
        )
    return directory


def _cached_snapshot(name: str) -> Path:
    try:
        config = try_to_load_from_cache(name, "config.json")
    except HFValidationError:
        config = None
    if isinstance(config, str):
        return Path(config).parent
    parts = Path(name).parts
    # The export of a stage, and too long for a hub name, which is OWNER/NAME at most.
    exported = parts[-1:] == ("model",) and len(parts) > 2
    raise ModelError(
        "RF3010",
        f"no such model: {name!r}",
        where=name,
        expected="a local directory, or a hub name that is in the Hugging Face cache",
        remedy="run the stage that writes it first, or correct the path"
        if exported
        else "correct the path, or download it first: hf download NAME",
    )


def read_config(directory: Path) -> dict[str, Any]:
    """config.json as written, after checking that transformers' own code can run it.

    Raises:
        ModelError: not a JSON object, or an architecture that needs code from the repository.
    """
    return read_config_file(directory / "config.json")


def read_config_file(file: Path) -> dict[str, Any]:
    """As `read_config`, from a file of any name."""
    config = _object_in(file)
    model_type = config.get("model_type")
    if isinstance(model_type, str) and model_type in CONFIG_MAPPING:
        return config
    if "auto_map" in config:
        raise ModelError(
            "RF3013",
            "the model runs code of its own repository",
            where=f"{file}: auto_map, model_type {model_type!r}",
            expected="an architecture that transformers itself contains",
            remedy="such code is never run here; convert the model to a built-in architecture",
        )
    raise ModelError(
        "RF3012",
        f"{file.name} names no architecture that transformers knows: model_type {model_type!r}",
        where=str(file),
        remedy="update transformers, or check that this is a language model",
    )


def _object_in(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("not a JSON object")
        return content
    except (ValueError, OSError) as error:
        raise ModelError(
            "RF3012",
            f"{file.name} cannot be read: {error}",
            where=str(file),
            remedy="copy or download the model again",
        ) from error


def stop_ids(path: str | Path) -> tuple[int, ...]:
    """Ids that end a response of the model in a directory, besides the tokenizer's EOS.

    As transformers does: of its generation config, or of config.json where it has none.

    Raises:
        ModelError: as `resolve`; RF3012 if the file is not a JSON object.
    """
    directory = resolve(path)
    file = directory / "generation_config.json"
    if not file.is_file():
        file = directory / "config.json"
    named = _object_in(file).get("eos_token_id")
    listed = named if isinstance(named, list) else [named]
    return tuple(i for i in listed if isinstance(i, int))


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a model, each checked to be whole.

    Raises:
        ModelError: only pickled weights, no weights, a missing shard, a damaged file.
    """
    files = _listed_files(directory)
    digests = _manifest_digests(directory)
    for file in files:
        _check_whole(file, digests.get(file.name))
    return files


def _listed_files(directory: Path) -> list[Path]:
    if (directory / _SINGLE).is_file():
        return [directory / _SINGLE]
    index = directory / _INDEX
    if index.is_file():
        try:
            names = sorted(
                set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            )
            missing = [n for n in names if not (directory / n).is_file()]
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise _damaged(index, f"{type(error).__name__}: {error}") from error
        if missing:
            raise ModelError(
                "RF3015",
                f"{len(missing)} of {len(names)} weight files are missing",
                where=f"{directory}: {', '.join(missing[:5])}",
                remedy="copy or download the model again",
            )
        return [directory / n for n in names]
    pickles = sorted(p.name for pattern in _PICKLES for p in directory.glob(pattern))
    if pickles:
        raise ModelError(
            "RF3014",
            "the weights are pickled files, which can run code when they are opened",
            where=f"{directory}: {', '.join(pickles[:5])}",
            expected="safetensors",
            remedy="convert where you trust them: "
            "AutoModelForCausalLM.from_pretrained(d).save_pretrained(new_d)",
        )
    raise ModelError(
        "RF3015",
        "the directory holds no weights",
        where=str(directory),
        expected=f"{_SINGLE} or {_INDEX} with its shards",
        remedy="copy or download the model again",
    )


def _check_whole(file: Path, digest: str | None) -> None:
    try:
        # Reads the header and compares its offsets with the length of the file.
        with safe_open(file, framework="pt") as handle:
            handle.keys()
    except (SafetensorError, OSError) as error:
        raise _damaged(file, str(error)) from error
    if digest is not None and sha256(file) != digest:
        raise _damaged(file, f"its SHA-256 is not the one in {MANIFEST}")


def _damaged(file: Path, reason: str) -> ModelError:
    return ModelError(
        "RF3016",
        f"the weight file is damaged: {reason}",
        where=str(file),
        remedy="copy, download or export the model again",
    )


def _manifest_digests(directory: Path) -> dict[str, str]:
    file = directory / MANIFEST
    if not file.is_file():
        return {}
    try:
        listed = json.loads(file.read_text(encoding="utf-8"))["sha256"]
        return {str(name): str(digest) for name, digest in listed.items()}
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise _damaged(file, f"{type(error).__name__}: {error}") from error


def write_manifest(directory: Path) -> None:
    """Record the SHA-256 of every safetensors file: safetensors itself has no checksum."""
    digests = {f.name: sha256(f) for f in sorted(directory.glob("*.safetensors"))}
    text = json.dumps({"sha256": digests}, indent=2)
    (directory / MANIFEST).write_text(text + "\n", encoding="utf-8")


def sha256(file: Path) -> str:
    """Hexadecimal digest of a file's bytes."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
