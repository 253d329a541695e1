"""PyTorch's distributed checkpoint (DCP) over our files: its planners, our storage.

DCP knows which box of a tensor a rank holds and which boxes of a file a rank needs, so a state that
k ranks saved is loaded by any m. What it writes by itself is not used: its `.metadata` and its
non-tensor values are pickles, its files carry no checksum, and its directory is not atomic. Here a
`StorageWriter` puts a rank's boxes into plain safetensors files of an open `CheckpointWriter`, and
a `StorageReader` serves them from verified ones. Both are of DCP's public extension interface:
`torch.distributed.checkpoint.save(..., storage_writer=ShardWriter(writer))` works too.

`ShareOfState` decides without communication what a rank writes, so that planning and writing need
no collective and can run in a background thread.
"""

from __future__ import annotations

import dataclasses
import os
import warnings
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    SavePlan,
    SavePlanner,
    WriteItem,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.futures import Future

from rlhf_fast.distributed.checkpoint_writer import CheckpointWriter, Piece
from rlhf_fast.distributed.host_buffers import HostBuffers
from rlhf_fast.distributed.stored import StoredTensors
from rlhf_fast.distributed.world import World
from rlhf_fast.errors import CheckpointError

_SEPARATOR = "/"


def full_name(group: str, name: str) -> str:
    """A tensor's name in a DCP state dict; a group's name has no slash."""
    return f"{group}{_SEPARATOR}{name}"


class ShareOfState(DefaultSavePlanner):
    """What this rank writes: of every box of every tensor exactly one rank has a share.

    Ordinary tensors are the same on all ranks; rank 0 writes its own. Of the copies of a shard on
    several replicas one is written, dealt by name so that all replicas write about as much. Empty
    shards are not written.

    Args:
        world: the ranks that hold the state.
    """

    def __init__(self, world: World) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._world = world
        self._staged: dict[str, Tensor] | None = None

    def create_local_plan(self) -> SavePlan:
        """The boxes that this rank writes."""
        plan = super().create_local_plan()
        items = [item for item in plan.items if self._is_mine(item)]
        self.plan = dataclasses.replace(plan, items=items)
        return self.plan

    def stage(self, buffers: HostBuffers) -> None:
        """Copy the planned boxes to the host; from then on those are what is written.

        The state itself is let go of: moments that move to the host while the files are written
        would else stay on their device too, until the save is committed.
        """
        self._staged = {
            item.index.fqn: buffers.copy(item.index.fqn, self.resolve_data(item))
            for item in self.plan.items
        }
        buffers.synchronize()
        self.state_dict = {}

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        """The box of an item: a copy if the state was staged, else the live tensor."""
        if self._staged is not None:
            return self._staged[write_item.index.fqn]
        found = super().resolve_data(write_item)
        assert isinstance(found, Tensor)
        return found

    def _is_mine(self, item: WriteItem) -> bool:
        tensor = self.state_dict[item.index.fqn]
        if not isinstance(tensor, DTensor):
            return self._world.is_main
        copy, copies = self._copy_held(tensor)
        if copy != zlib.crc32(item.index.fqn.encode()) % copies:
            return False
        if tensor.numel():
            return tensor.to_local().numel() > 0
        # All shards of an empty tensor are empty: the first stands for it.
        mesh = tensor.device_mesh
        return not any(
            mesh.get_local_rank(dim)
            for dim, placement in enumerate(tensor.placements)
            if isinstance(placement, Shard)
        )

    def _copy_held(self, tensor: DTensor) -> tuple[int, int]:
        """Which of how many copies of its shard this rank holds."""
        mesh, copy, copies = tensor.device_mesh, 0, 1
        for dim, placement in enumerate(tensor.placements):
            if isinstance(placement, Replicate):
                copy = copy * mesh.size(dim) + mesh.get_local_rank(dim)
                copies *= mesh.size(dim)
        if mesh.size() < self._world.size:  # a mesh of one replica: the others hold the same
            copy = copy * self._world.replicas + self._world.replica
            copies *= self._world.replicas
        return copy, copies


def check_placements(name: str, tensor: Tensor, world: World) -> None:
    """Refuse a sharded tensor whose boxes cannot be told apart.

    Raises:
        CheckpointError: RF8004: partial sums, strided shards, a mesh that is neither the world's
            nor that of one replica, or a sharded tensor without a world.
    """
    if not isinstance(tensor, DTensor):
        return
    if any(type(p) not in (Shard, Replicate) for p in tensor.placements):
        problem = f"it is placed as {tensor.placements}"
    elif tensor.device_mesh.size() not in (world.size, world.shards):
        problem = f"it lies on {tensor.device_mesh.size()} of {world.size} ranks"
    else:
        return
    raise CheckpointError(
        "RF8004",
        f"tensor {name!r} cannot be stored: {problem}",
        expected="shards or copies over the ranks of the world that saves",
    )


def _done(value: Any) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(value)
    return future


class ShardWriter(StorageWriter):
    """Writes planned boxes as safetensors files, one a group, into an open checkpoint.

    Args:
        writer: begun; its `records` grow by the files written here.
        groups: written by rank 0 even if there is nothing in them.
    """

    def __init__(self, writer: CheckpointWriter, groups: Sequence[str] = ()) -> None:
        self._writer = writer
        self._groups = tuple(groups)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """No identifier makes one of these: it belongs to an open writer."""
        return False

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Nothing: a writer is used once."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing: the directory is there."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """The plan as it is."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """The plans as they are: a file is named after the writer's rank."""
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write and fsync this rank's files; no collective.

        Raises:
            OSError: the file system refused.
        """
        groups: dict[str, dict[str, Piece]] = {}
        if self._writer.world.is_main:
            groups = {group: {} for group in self._groups}
        items: dict[str, list[WriteItem]] = {}
        for item in plan.items:
            group, _, name = item.index.fqn.partition(_SEPARATOR)
            data = item.tensor_data
            assert data is not None, "values that are no tensors belong to the JSON state"
            box = planner.resolve_data(item)
            assert isinstance(box, Tensor)
            piece = Piece(box, tuple(data.chunk.offsets), tuple(data.size))
            groups.setdefault(group, {})[name] = piece
            items.setdefault(group, []).append(item)
        results = []
        for group, pieces in groups.items():
            file = self._writer.add_pieces(group, pieces)
            record = self._writer.records[file]
            results += [
                WriteResult(item.index, record.size, (file, record))
                for item in items.get(group, [])
            ]
        self._writer.sync()
        return _done(results)

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Collect the records of all ranks' files; the commit is the writer's."""
        for result in (r for rank in results for r in rank):
            file, record = result.storage_data
            self._writer.records[file] = record


class ShardReader(StorageReader):
    """Serves boxes of stored tensors."""

    def __init__(self, source: StoredTensors) -> None:
        self._source = source
        self._chunks = {
            (name, chunk.offsets): chunk
            for name, entry in source.entries.items()
            for chunk in entry.chunks
        }

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """No identifier makes one of these: it belongs to an open checkpoint."""
        return False

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Nothing: a reader has no state."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The manifest in DCP's terms."""
        found: dict[str, Any] = {
            name: TensorStorageMetadata(
                TensorProperties(dtype=entry.dtype),
                torch.Size(entry.shape),
                [
                    ChunkStorageMetadata(torch.Size(c.offsets), torch.Size(c.lengths))
                    for c in entry.chunks
                ],
            )
            for name, entry in self._source.entries.items()
        }
        return Metadata(found)

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        """Nothing: the files are verified and open on first use."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """The plan as it is."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """The plans as they are."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Copy every box of the plan into its place.

        Raises:
            CheckpointError: a file changed since it was verified (RF8001).
        """
        for item in plan.items:
            index = item.storage_index
            part = self._chunks[index.fqn, tuple(index.offset or ())].read()
            boxes = zip(item.storage_offsets, item.lengths, strict=True)
            for dim, (begin, length) in enumerate(boxes):
                part = part.narrow(dim, begin, length)
            target = planner.resolve_tensor(item).detach()
            target.copy_(part)
            planner.commit_tensor(item, target)
        return _done(None)


def fill(targets: Mapping[str, Tensor], source: StoredTensors) -> None:
    """Copy stored tensors into live ones of the same name, shape and dtype, sharded or not.

    A rank reads the boxes that it holds. No collective.

    Raises:
        CheckpointError: RF8001.
    """
    state: dict[str, Any] = {name: target.detach() for name, target in targets.items()}
    with warnings.catch_warnings(), torch.no_grad():
        # `no_dist` is what we want: every rank plans for itself.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            load(
                state,
                storage_reader=ShardReader(source),
                planner=DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
                no_dist=True,
            )
        except CheckpointException as error:
            cause = next(iter(error.failures.values()))[0]
            raise cause from error
