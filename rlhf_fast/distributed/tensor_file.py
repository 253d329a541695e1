"""Tensors in safetensors files: written as a stream, read lazily through a memory map.

The writer is our own because `safetensors.torch.save_file` neither fsyncs, nor hashes while it
writes, nor accepts views of one storage (which is what parameters laid out in a flat buffer are).
Tensors leave their device one at a time, so the extra host memory is one tensor, not one model.

Format: https://huggingface.co/docs/safetensors/index#format
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from rlhf_fast.errors import CheckpointError

SUFFIX = ".safetensors"

# In the order in which safetensors itself lays types out, widest items first: every tensor starts
# at a multiple of its item size, and a file written here has the bytes that `save_file` writes.
DTYPE_NAMES: dict[torch.dtype, str] = {
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_RANK = {name: place for place, name in enumerate(DTYPE_NAMES.values())}
DTYPES: dict[str, torch.dtype] = {name: dtype for dtype, name in DTYPE_NAMES.items()}
ITEM_BYTES: dict[str, int] = {name: dtype.itemsize for dtype, name in DTYPE_NAMES.items()}

_METADATA = "__metadata__"


def check_storable(name: str, tensor: Any) -> None:
    """Raise CheckpointError (RF8004) unless `tensor` is dense, has data and a known dtype."""
    if not isinstance(tensor, Tensor):
        problem = f"a {type(tensor).__name__}, not a tensor"
    elif tensor.device.type == "meta":
        problem = "on the meta device: it has no data"
    elif tensor.layout != torch.strided or tensor.is_quantized:
        problem = f"stored in layout {tensor.layout}"
    elif tensor.dtype not in DTYPE_NAMES:
        problem = f"of dtype {tensor.dtype}"
    elif not name or name == _METADATA:
        problem = "called by a reserved name"
    else:
        return
    raise CheckpointError(
        "RF8004",
        f"tensor {name!r} cannot be stored: it is {problem}",
        expected="dense tensors of " + ", ".join(sorted(ITEM_BYTES)),
    )


def stream(tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    """The bytes of a safetensors file, header first, then one tensor after the other.

    Args:
        tensors: name -> tensor of any shape, stride and device.

    Raises:
        CheckpointError: a value that cannot be stored (RF8004), before the first byte.
    """
    for name, tensor in tensors.items():
        check_storable(name, tensor)
    layout = {name: (DTYPE_NAMES[t.dtype], tuple(t.shape)) for name, t in tensors.items()}
    return stream_lazily(layout, tensors.__getitem__)


def file_order(layout: Mapping[str, tuple[str, tuple[int, ...]]]) -> list[str]:
    """The order in which tensors lie in a file: by type, then by name."""
    return sorted(layout, key=lambda name: (_RANK[layout[name][0]], name))


def stream_lazily(
    layout: Mapping[str, tuple[str, tuple[int, ...]]], read: Callable[[str], Tensor]
) -> Iterator[bytes | memoryview]:
    """As `stream`, of tensors that need not exist yet.

    Args:
        layout: name -> (safetensors dtype, shape).
        read: called once a tensor, in `file_order`, when its bytes are due.
    """
    order = file_order(layout)
    header: dict[str, Any] = {_METADATA: {"format": "pt"}}
    offset = 0
    for name in order:
        dtype, shape = layout[name]
        end = offset + math.prod(shape) * ITEM_BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name in order:
        tensor = read(name)
        if tensor.numel():
            flat = tensor.detach().to("cpu").contiguous().reshape(-1)
            yield flat.view(torch.uint8).numpy().data


class TensorFile(Mapping[str, Tensor]):
    """A safetensors file as a read-only mapping; a tensor is read when it is asked for.

    The tensors are views of a private memory map: copy them into their destination, do not keep
    them.

    Raises:
        CheckpointError: not a valid safetensors file (RF8001).
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = safe_open(str(path), framework="pt", device="cpu")
        except Exception as error:  # SafetensorError derives from Exception directly
            raise CheckpointError(
                "RF8001", f"not a valid safetensors file: {error}", where=str(path)
            ) from error
        self._names = frozenset(self._file.keys())

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        tensor: Tensor = self._file.get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._names))

    def __len__(self) -> int:
        return len(self._names)

    def describe(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """name -> (safetensors dtype, shape), from the header alone."""
        found = {}
        for name in self._names:
            view = self._file.get_slice(name)
            found[name] = (str(view.get_dtype()), tuple(view.get_shape()))
        return found
