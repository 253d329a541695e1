"""Weights of a sharded model, gathered tensor by tensor into the files that transformers writes.

Every rank takes part in every gather, in one order; rank 0 writes. So a device holds one whole
tensor at a time and the host one tensor, never the model.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers.core_model_loading import revert_weight_conversion

from rlhf_fast.distributed.durable import write_file
from rlhf_fast.distributed.tensor_file import DTYPE_NAMES, file_order, stream_lazily
from rlhf_fast.errors import ModelError

# transformers' own default; a model below it is one file.
MAX_FILE = "50GB"
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


def whole(tensor: Tensor) -> Tensor:
    """A tensor in one piece, detached: gathered if it is sharded, which is collective."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is put together when it is written.

    Args:
        dtype: of the whole tensor.
        shape: of the whole tensor.
        gather: makes it, on every rank; collective.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    gather: Callable[[], Tensor]


class GatheredWeights:
    """The weights of a model as files: `write` on rank 0; `drain` on all, for what is left.

    Args:
        module: a Hugging Face model; its parameters may be DTensors.
        tensors: its weights by name in the order of its state dict, tied ones once.
        max_file: of a weight file, as transformers' `max_shard_size`.

    Raises:
        ModelError: RF3031, the architecture stores its weights in another shape than it runs them.
    """

    def __init__(
        self, module: Any, tensors: Mapping[str, LazyTensor], *, max_file: str = MAX_FILE
    ) -> None:
        meta = {
            name: torch.empty(t.shape, dtype=t.dtype, device="meta") for name, t in tensors.items()
        }
        names = {id(tensor): name for name, tensor in meta.items()}
        stored = dict(revert_weight_conversion(module, dict(meta)))
        if not all(id(tensor) in names for tensor in stored.values()):
            raise ModelError(
                "RF3031",
                f"{type(module).__name__} stores its weights in other tensors than it runs",
                where="export of sharded weights",
                expected="one stored tensor for every tensor of the model",
                remedy="resume the run in one process, which exports it in any form",
            )
        self._tensors = {name: tensors[names[id(tensor)]] for name, tensor in stored.items()}
        self._layout = {
            name: (DTYPE_NAMES[tensor.dtype], tuple(tensor.shape))
            for name, tensor in stored.items()
        }
        split = split_torch_state_dict_into_shards(
            stored, filename_pattern="model{suffix}.safetensors", max_shard_size=max_file
        )
        self._files = {
            file: {name: self._layout[name] for name in listed}
            for file, listed in split.filename_to_tensors.items()
        }
        self._index = None
        if split.is_sharded:
            total = sum(p.numel() for p in module.parameters())
            self._index = {
                "metadata": {"total_parameters": total, **split.metadata},
                "weight_map": split.tensor_to_filename,
            }
        self._left: Iterator[str] = iter(
            [name for layout in self._files.values() for name in file_order(layout)]
        )

    def write(self, directory: Path) -> None:
        """Write the weight files, and their index if there are several.

        Raises:
            OSError: the file system refused; `drain` then, for the other ranks go on gathering.
        """
        (directory / _SINGLE).unlink(missing_ok=True)
        for file, layout in self._files.items():
            write_file(directory / file, stream_lazily(layout, self._next))
        if self._index is not None:
            text = json.dumps(self._index, indent=2, sort_keys=True) + "\n"
            (directory / _INDEX).write_text(text, encoding="utf-8")

    def drain(self) -> None:
        """Take part in the gathers that are left."""
        for name in self._left:
            self._tensors[name].gather()

    def _next(self, name: str) -> Tensor:
        following = next(self._left)
        assert following == name, "ranks gather in one order"
        return self._tensors[name].gather()


def own_weights(module: Any) -> dict[str, LazyTensor]:
    """The weights of a model by name, tied ones under the name that transformers keeps."""
    ignored = set(module._keys_to_ignore_on_save or ())
    tied = set(module.all_tied_weights_keys or ())
    named = {
        name: tensor
        for name, tensor in module.state_dict(keep_vars=True).items()
        if name not in ignored
    }
    # Of the names of one tensor those that the model would tie again give way.
    kept: dict[int, str] = {}
    for name, tensor in named.items():
        other = kept.get(id(tensor))
        if other is None or (other in tied and name not in tied):
            kept[id(tensor)] = name
    names = set(kept.values())
    return {name: lazily(tensor) for name, tensor in named.items() if name in names}


def lazily(tensor: Tensor) -> LazyTensor:
    """A live tensor, gathered when it is written."""
    return LazyTensor(tensor.dtype, tuple(tensor.shape), lambda: whole(tensor))
