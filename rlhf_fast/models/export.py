"""Write a model directory that stock transformers loads to identical outputs, all or nothing."""

from __future__ import annotations

import copy
import ctypes
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn

from rlhf_fast.distributed.agreement import ALONE, agree
from rlhf_fast.distributed.world import World
from rlhf_fast.errors import EnvironmentFault, ModelError
from rlhf_fast.models.checks import choose_pad_token
from rlhf_fast.models.directory import ADAPTER_CONFIG, write_manifest
from rlhf_fast.models.dropout import dropout_before
from rlhf_fast.models.loading import quiet_transformers
from rlhf_fast.models.sharded_export import GatheredWeights, own_weights

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def export_model(
    module: nn.Module, tokenizer: Any, directory: str | Path, *, world: World = ALONE
) -> Path:
    """Write weights (safetensors), config, generation config and tokenizer.

    The directory is ready for the next stage and for stock transformers: `AutoModelForCausalLM` or
    `AutoModelForSequenceClassification` give identical outputs (to the last bit once the weights
    are copied out of the mapped file, where they lie unaligned). Dropout fields of the config are
    those the model came with; a pad token is set (see `choose_pad_token`), the chat template is
    kept, and generation stops at EOS. A calibration stays in config.json; plain transformers
    returns raw scores.

    Everything is written and synced beside `directory` and then exchanged with it in one step, so
    an interrupted export leaves the old directory as it was.

    Args:
        module: Hugging Face causal LM or sequence classifier; not changed. Sharded weights are
            gathered one by one, and the files are those of the same model in one process.
        tokenizer: its tokenizer; not changed.
        directory: where to; replaced if it is a model directory. Of a link, what it leads to.
        world: the ranks that hold the module, each of which calls this; rank 0 writes.

    Returns:
        The directory.

    Raises:
        ModelError: `directory` holds something that is no model (RF3030), or sharded weights that
            cannot be stored one by one (RF3031).
        EnvironmentFault: the disk is full, or writing is not permitted (RF7201).
    """
    if world.size == 1:
        return publish(directory, lambda draft: _write(module, copy.deepcopy(tokenizer), draft))
    return export_gathered(
        module, GatheredWeights(module, own_weights(module)), tokenizer, directory, world
    )


def export_gathered(
    module: Any, weights: GatheredWeights, tokenizer: Any, directory: str | Path, world: World
) -> Path:
    """As `export_model`, of weights that all ranks gather and rank 0 writes."""

    def write(draft: Path) -> None:
        _write(module, copy.deepcopy(tokenizer), draft, weights)

    return publish_on_main(directory, write, world, finally_=weights.drain)


def publish_on_main(
    directory: str | Path,
    write: Callable[[Path], None],
    world: World,
    *,
    finally_: Callable[[], None] = lambda: None,
) -> Path:
    """`publish` on rank 0; what it raises all raise.

    Args:
        directory, write: as there.
        world: the ranks, each of which calls this.
        finally_: called by every rank in the end, whether or not writing failed.
    """
    error = None
    if world.is_main:
        try:
            publish(directory, write)
        except Exception as caught:
            error = caught
    finally_()
    agree(world, error)
    return Path(os.path.abspath(directory))


def publish(directory: str | Path, write: Callable[[Path], None]) -> Path:
    """Let `write` fill a directory beside `directory`, then put it in its place in one step.

    Errors and result as for `export_model`.
    """
    given = Path(os.path.abspath(directory))
    # A link stays where it is: beside what it leads to there is room, and a disk to rename on.
    target = Path(os.path.realpath(given))
    draft = target.with_name(f".{target.name}.exporting")
    try:
        _require_replaceable(target)
        if draft.exists():
            shutil.rmtree(draft)
        draft.mkdir(parents=True)
        write(draft)
        write_manifest(draft)
        _sync(draft)
        _publish(draft, target)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(draft, ignore_errors=True)
        raise EnvironmentFault(
            "RF7201",
            f"the model cannot be written: {error}",
            where=str(target),
            remedy="free disk space or choose another output directory; the old export is intact",
        ) from error
    return given


def _require_replaceable(target: Path) -> None:
    is_model = any((target / name).is_file() for name in ("config.json", ADAPTER_CONFIG))
    empty = target.is_dir() and not any(target.iterdir())
    if target.exists() and not is_model and not empty:
        raise ModelError(
            "RF3030",
            "the export would replace something that is no model",
            where=str(target),
            expected="a path that does not exist, an empty directory or an earlier export",
            remedy="choose another directory",
        )


def _write(
    module: Any, tokenizer: Any, draft: Path, weights: GatheredWeights | None = None
) -> None:
    pad = choose_pad_token(tokenizer, int(module.get_input_embeddings().weight.shape[0]))
    with quiet_transformers():
        if weights is None:
            module.save_pretrained(draft)
        else:
            module.save_pretrained(draft, state_dict={})  # the configs, and a file of no weights
            weights.write(draft)
    save_tokenizer(tokenizer, draft)
    always = {**dropout_before(module), "pad_token_id": pad}
    defaults = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id}
    _patch_json(draft / "config.json", always, defaults)
    generation = draft / "generation_config.json"
    if generation.is_file():
        _patch_json(generation, {"pad_token_id": pad}, defaults)
        _add_eos(generation, tokenizer.eos_token_id)


def save_tokenizer(tokenizer: Any, draft: Path) -> None:
    """Write the files of a tokenizer.

    Raises:
        OSError: the file system refused, or the path is no text.
    """
    try:
        with quiet_transformers():
            tokenizer.save_pretrained(draft)
    except Exception as error:
        # The Rust side has no type of its own for a full disk.
        if type(error) is Exception or isinstance(error, UnicodeEncodeError):
            raise OSError(str(error)) from error
        raise


def _patch_json(file: Path, always: dict[str, Any], defaults: dict[str, Any]) -> None:
    content = json.loads(file.read_text(encoding="utf-8"))
    content.update(always)
    for key, value in defaults.items():
        if content.get(key) is None and value is not None:
            content[key] = value
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _add_eos(file: Path, eos: int | None) -> None:
    """Stop at the tokenizer's EOS too: it is what was learnt, whatever ended the base's texts."""
    content = json.loads(file.read_text(encoding="utf-8"))
    known = content.get("eos_token_id")
    stops = known if isinstance(known, list) else [known]
    if eos is not None and eos not in stops:
        _patch_json(file, {"eos_token_id": [eos, *stops]}, {})


def _sync(directory: Path) -> None:
    """Bring every file and the directory itself to the disk."""
    for path in [*(p for p in directory.rglob("*") if p.is_file()), directory]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _publish(draft: Path, target: Path) -> None:
    """Put `draft` in the place of `target`; at every instant `target` is the old or the new."""
    if not target.exists() or not any(target.iterdir()):
        os.replace(draft, target)
    elif _exchange(draft, target):
        shutil.rmtree(draft)
    else:
        # No atomic exchange on this system: for the instant between the two renames the old
        # export bears this name.
        previous = target.with_name(f".{target.name}.previous")
        if previous.exists():
            shutil.rmtree(previous)
        os.replace(target, previous)
        os.replace(draft, target)
        shutil.rmtree(previous)
    if sys.platform != "win32":
        _sync_entry(target.parent)


def _sync_entry(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two directories atomically; false where kernel or file system cannot."""
    if not sys.platform.startswith("linux"):
        return False
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:  # musl before 1.2.5
        return False
    paths = os.fsencode(first), os.fsencode(second)
    code: int = renameat2(_AT_FDCWD, paths[0], _AT_FDCWD, paths[1], _RENAME_EXCHANGE)
    return code == 0
