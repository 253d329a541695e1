"""One save in progress: files into a fresh directory, which a rename makes a checkpoint."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from torch import Tensor

from rlhf_fast.distributed.agreement import ALONE, agree, on_main, share
from rlhf_fast.distributed.checkpoint_directory import (
    LATEST_NAME,
    candidates,
    remove,
    step_name,
    superseded,
    unfinished,
)
from rlhf_fast.distributed.durable import (
    LOCAL,
    FileSystem,
    make_directories,
    replace_directory,
    storage_fault,
    unique_suffix,
    write_atomically,
    write_file,
)
from rlhf_fast.distributed.manifest import (
    MANIFEST_NAME,
    FileRecord,
    Manifest,
    TensorRecord,
    library_versions,
    parse_file,
    read_manifest,
)
from rlhf_fast.distributed.tensor_file import DTYPE_NAMES, SUFFIX, stream
from rlhf_fast.distributed.world import World
from rlhf_fast.errors import CheckpointError, EnvironmentFault

T = TypeVar("T")


@dataclass(frozen=True)
class Piece:
    """A box of a tensor: its values, where it begins, and the shape of the whole."""

    tensor: Tensor
    offsets: tuple[int, ...]
    whole: tuple[int, ...]


class CheckpointWriter:
    """One save in progress: `begin`, then files, then `commit`, or `abort`.

    `begin`, `collect` and `commit` are collective; the others touch this rank's files alone.

    Args:
        root: directory that holds the checkpoints of a run; created if missing.
        step: training step, >= 0.
        fs: where the system calls go.
        world: the ranks that write; rank 0 makes the directory and commits.

    Attributes:
        records: what this rank has written; after `collect`, what all ranks have.
    """

    def __init__(
        self, root: Path, step: int, fs: FileSystem = LOCAL, *, world: World = ALONE
    ) -> None:
        if step < 0 or step >= 10**18:
            raise ValueError(f"step must be in [0, 10**18), got {step}")
        self.root = Path(root)
        self.step = step
        self.world = world
        self.records: dict[str, FileRecord] = {}
        self._fs = fs
        self._committed = False
        self._directory = self.root / f"{step_name(step)}.tmp-{unique_suffix()}"

    def begin(self) -> None:
        """Remove what unfinished saves left behind, then create the fresh directory.

        Raises:
            EnvironmentFault: the disk refused (RF7101), or the ranks do not see one directory
                (RF7106).
        """
        self._directory = self.root / on_main(self.world, lambda: self._guarded(self._create))
        seen = self._directory.is_dir()
        agree(self.world, None if seen else _not_shared(self._directory, self.world.rank))

    def _create(self) -> str:
        make_directories(self.root, self._fs)
        for leftover in [*unfinished(self.root), *superseded(self.root)]:
            remove(leftover, self._fs)
        self._fs.make_directory(self._directory)
        return self._directory.name

    def add_tensors(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Write whole tensors as the group `name`.

        Raises:
            CheckpointError: a tensor that cannot be stored (RF8004).
            OSError: the file system refused.
        """
        self.add_pieces(
            name,
            {
                key: Piece(tensor, (0,) * tensor.dim(), tuple(tensor.shape))
                for key, tensor in tensors.items()
            },
        )

    def add_pieces(self, group: str, pieces: Mapping[str, Piece]) -> str:
        """Write this rank's boxes of a group into one file; errors as `add_tensors`.

        Returns:
            the file's name: `<group>.safetensors`, with `.rank-<r>` before the suffix among
            several ranks.
        """
        several = self.world.size > 1
        stem = f"{group}.rank-{self.world.rank:05d}" if several else group
        file_name = f"{stem}{SUFFIX}"
        tensors = {name: piece.tensor for name, piece in pieces.items()}
        size, digest = write_file(self._directory / file_name, stream(tensors), self._fs)
        listing = {name: _record(piece) for name, piece in pieces.items()}
        self.records[file_name] = FileRecord(size, digest, listing, group if several else None)
        return file_name

    def add_bytes(self, file_name: str, data: bytes) -> None:
        """Write a small file as it is; raises OSError."""
        size, digest = write_file(self._directory / file_name, [data], self._fs)
        self.records[file_name] = FileRecord(size, digest)

    def sync(self) -> None:
        """Make the names of this rank's files durable; raises OSError."""
        if not self.world.is_main:  # rank 0 does it last, in `commit`
            self._fs.sync_directory(self._directory)

    def collect(self) -> None:
        """Bring the records of all ranks together."""
        if self.world.mesh is None:
            return
        own = {name: record.to_dict() for name, record in self.records.items()}
        for entries in share(self.world, own):
            for name, entry in entries.items():
                self.records[name] = parse_file(name, entry, self._directory, sharded=True)

    def commit(self) -> Path:
        """Write the manifest, rename, point `LATEST` here.

        Returns:
            the committed directory.

        Raises:
            CheckpointError: the ranks' boxes do not make up the tensors (RF8004).
            EnvironmentFault: the disk refused (RF7101).
        """
        return self.root / on_main(self.world, lambda: self._guarded(self._commit))

    def _commit(self) -> str:
        newest = max((c.commit for c in candidates(self.root)), default=0)
        manifest = Manifest(self.step, max(newest, 0) + 1, self.records, library_versions())
        _require_whole(manifest, self._directory)
        write_file(self._directory / MANIFEST_NAME, [manifest.dump()], self._fs)
        self._fs.sync_directory(self._directory)
        final = self.root / step_name(self.step)
        old = replace_directory(self._directory, final, self._fs)
        self._committed = True
        write_atomically(self.root / LATEST_NAME, f"{final.name}\n".encode(), self._fs)
        if old is not None:
            remove(old, self._fs)
        return final.name

    def abort(self) -> None:
        """Remove the unfinished directory; a committed one stays.

        Rank 0 does it, once no other rank writes any more.
        """
        if self.world.is_main and not self._committed and self._directory.exists():
            with contextlib.suppress(OSError):
                self._fs.remove_tree(self._directory)

    def _guarded(self, work: Callable[[], T]) -> T:
        try:
            return work()
        except OSError as error:
            raise storage_fault(error, self.root) from error


def make_newest(directory: Path, *, world: World = ALONE, fs: FileSystem = LOCAL) -> None:
    """Put a committed checkpoint behind all others in the order of saves, if it is not there.

    For a run that goes on from an older one. Were it killed before its next save, it would else go
    on from the state that it has left, whose log it has cut; and `prune` would keep that state
    rather than this one.

    Args:
        directory: of the checkpoint. A crash leaves its place as it was, or the new one.
        world: its ranks, each of which calls this.
        fs: where the system calls go.

    Raises:
        CheckpointError: its manifest cannot be read any more (RF8001).
        EnvironmentFault: the disk refused (RF7101).
    """
    root = directory.parent

    def work() -> None:
        manifest = read_manifest(directory)
        others = [c.commit for c in candidates(root) if c.path.name != directory.name]
        if manifest.commit > max(others, default=0):
            return
        try:
            moved = replace(manifest, commit=max(others) + 1)
            write_atomically(directory / MANIFEST_NAME, moved.dump(), fs)
            write_atomically(root / LATEST_NAME, f"{directory.name}\n".encode(), fs)
        except OSError as error:
            raise storage_fault(error, root) from error

    on_main(world, work)


def _record(piece: Piece) -> TensorRecord:
    dtype, shape = DTYPE_NAMES[piece.tensor.dtype], tuple(piece.tensor.shape)
    if shape == piece.whole:
        return TensorRecord(dtype, shape)
    return TensorRecord(dtype, shape, piece.offsets, piece.whole)


def _require_whole(manifest: Manifest, directory: Path) -> None:
    try:
        manifest.groups(directory)
    except CheckpointError as error:
        raise CheckpointError(
            "RF8004",
            f"the ranks' parts do not make up the state: {error.what}",
            where=str(directory),
            expected="the same tensors, placed in the same way, on every rank",
        ) from error


def _not_shared(directory: Path, rank: int) -> EnvironmentFault:
    return EnvironmentFault(
        "RF7106",
        f"rank {rank} does not see the directory that rank 0 has made",
        where=str(directory),
        expected="run.output_dir on a file system that all machines of the run share",
        remedy="move run.output_dir to one",
    )
