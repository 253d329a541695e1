"""Saved tensors by name, read when they are asked for, whatever files their chunks lie in."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from rlhf_fast.distributed.chunks import StoredRecord
from rlhf_fast.distributed.manifest import FileRecord, corrupt, verify_file
from rlhf_fast.distributed.tensor_file import DTYPE_NAMES, DTYPES, TensorFile


class ShardFile:
    """One safetensors file of a checkpoint, opened on first use and compared with the manifest.

    Args:
        directory: the checkpoint.
        name: of the file in it.
        record: what the manifest says of it.
    """

    def __init__(self, directory: Path, name: str, record: FileRecord) -> None:
        self.path = directory / name
        self.record = record

    def verify(self) -> None:
        """Check the SHA-256 and open the file.

        Raises:
            CheckpointError: it is not what was written (RF8001).
        """
        verify_file(self.path.parent, self.path.name, self.record)
        self.open()

    def open(self) -> TensorFile:
        """The file as a mapping; not hashed, but a regular file of the right size and contents."""
        return self._tensors

    def close(self) -> None:
        """Let go of the file; it is opened again when a tensor of it is asked for."""
        self.__dict__.pop("_tensors", None)

    @functools.cached_property
    def _tensors(self) -> TensorFile:
        verify_file(self.path.parent, self.path.name, self.record, digest=False)
        file = TensorFile(self.path)
        listed = {key: (t.dtype, t.shape) for key, t in (self.record.tensors or {}).items()}
        if file.describe() != listed:
            raise corrupt(
                f"{self.path.name} holds other tensors than the manifest lists", file.path
            )
        return file


@dataclass(frozen=True)
class Chunk:
    """A box of a tensor: where it begins, how long it is, and how to get it (a CPU tensor)."""

    offsets: tuple[int, ...]
    lengths: tuple[int, ...]
    read: Callable[[], Tensor]


@dataclass(frozen=True)
class Stored:
    """A tensor that can be read: dtype, shape, and the chunks that tile it."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]

    def read(self) -> Tensor:
        """The whole tensor: the map of its file if it lies in one piece, else put together."""
        if len(self.chunks) == 1:
            return self.chunks[0].read()
        whole = torch.empty(self.shape, dtype=self.dtype)
        for chunk in self.chunks:
            box = tuple(
                slice(begin, begin + length)
                for begin, length in zip(chunk.offsets, chunk.lengths, strict=True)
            )
            whole[box] = chunk.read()
        return whole


class StoredTensors(Mapping[str, Tensor]):
    """Read-only mapping of name to whole tensor, on the CPU, read when it is asked for.

    The tensors may be views of a private memory map: copy them into their destination, do not keep
    them. `entries` says what there is without reading it.
    """

    def __init__(self, entries: Mapping[str, Stored]) -> None:
        self.entries = dict(entries)

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> StoredTensors:
        """Tensors in memory (each one chunk), or what is stored already."""
        if isinstance(tensors, StoredTensors):
            return tensors
        return cls({name: _in_memory(tensor) for name, tensor in tensors.items()})

    @classmethod
    def in_files(
        cls, records: Mapping[str, StoredRecord], files: Mapping[str, ShardFile]
    ) -> StoredTensors:
        """Tensors of a checkpoint's group.

        Args:
            records: as `Manifest.groups` gives them.
            files: by name.
        """
        entries = {}
        for name, record in records.items():
            chunks = tuple(
                Chunk(c.offsets, c.lengths, functools.partial(_from_file, files[c.file], name))
                for c in record.chunks
            )
            entries[name] = Stored(DTYPES[record.dtype], record.shape, chunks)
        return cls(entries)

    def renamed(self, sources: Mapping[str, str]) -> StoredTensors:
        """Some of the tensors under other names: new name -> name here."""
        return StoredTensors({name: self.entries[source] for name, source in sources.items()})

    def describe(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """name -> (safetensors dtype, shape)."""
        return {name: (DTYPE_NAMES[e.dtype], e.shape) for name, e in self.entries.items()}

    def __getitem__(self, name: str) -> Tensor:
        return self.entries[name].read()

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self.entries))

    def __len__(self) -> int:
        return len(self.entries)


def dealt(files: Iterable[ShardFile], ranks: int) -> list[list[ShardFile]]:
    """Which rank verifies which file: each file once, the bytes spread evenly."""
    parts: list[list[ShardFile]] = [[] for _ in range(ranks)]
    loads = [0] * ranks
    for file in sorted(files, key=lambda f: (-f.record.size, f.path.name)):
        rank = loads.index(min(loads))
        parts[rank].append(file)
        loads[rank] += file.record.size
    return parts


def _from_file(file: ShardFile, name: str) -> Tensor:
    return file.open()[name]


def _in_memory(tensor: Tensor) -> Stored:
    shape = tuple(tensor.shape)
    return Stored(tensor.dtype, shape, (Chunk((0,) * len(shape), shape, lambda: tensor),))
