"""The ranks of a run: who there is, on which mesh, and the few collectives that are not FSDP's.

`torchrun` starts the processes; one started by itself is a world of one rank, without any process
group, in which every collective here returns what it was given. A mesh has two axes:

    replicate   copies of the sharded model (HSDP); 1 unless asked for
    shard       the ranks that hold one model between them

Every rank trains on samples of its own, whatever the axes. What a method returns is the same on all
ranks, bit for bit, so that decisions taken from it agree.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import Store, _get_default_store

from rlhf_fast.distributed.fault_board import FaultBoard
from rlhf_fast.distributed.first_word import attempt_store, note_joined
from rlhf_fast.errors import EnvironmentFault, LoneOutOfMemory
from rlhf_fast.launch import launched_ranks

REPLICATE, SHARD = "replicate", "shard"


def require_replicas(size: int, replicas: int) -> None:
    """Refuse a number of ranks that is no multiple of the replicas.

    Raises:
        EnvironmentFault: RF7050.
    """
    if size % replicas:
        raise EnvironmentFault(
            "RF7050",
            f"{size} ranks cannot be {replicas} replicas",
            where="distributed.replicas",
            expected="a divisor of the number of processes that torchrun starts",
            remedy="change distributed.replicas or --nproc-per-node",
        )


@dataclass(frozen=True)
class World:
    """The ranks of a run.

    Args:
        device: of this rank.
        rank: of this process among all.
        size: number of ranks.
        local_rank: of this process on its machine.
        mesh: [replicas, shards] with the axes `replicate` and `shard`; None for one rank.
        board: notes of what ranks do, and of who failed first.
        patience_seconds: how long a rank that ran out of memory waits for the others to come out of
            the same work; longer than what is left of one forward and backward.
    """

    device: torch.device
    rank: int = 0
    size: int = 1
    local_rank: int = 0
    mesh: DeviceMesh | None = None
    board: FaultBoard = field(default_factory=lambda: FaultBoard(None, 0, 1))
    patience_seconds: float = 60.0

    @classmethod
    def join(
        cls,
        device: torch.device,
        *,
        replicas: int = 1,
        timeout_seconds: float = 600.0,
        store: Store | None = None,
        rank: int | None = None,
        size: int | None = None,
    ) -> World:
        """Make the default process group and the mesh, as the environment of `torchrun` says.

        Args:
            device: of this rank, `cuda:<local rank>` on GPUs: NCCL there, gloo on the CPU.
            replicas: copies of the sharded model; divides the number of ranks.
            timeout_seconds: after which a collective that some rank does not join is an error.
            store, rank, size: in the place of the environment's.

        Raises:
            EnvironmentFault: RF7050, the number of ranks is no multiple of `replicas`; RF7054, the
                ranks do not find each other.
        """
        rank = int(os.environ.get("RANK", 0)) if rank is None else rank
        size = launched_ranks() if size is None else size
        local_rank = int(os.environ.get("LOCAL_RANK", rank))
        require_replicas(size, replicas)
        if size == 1:
            return cls(device)
        gpu = device.type == "cuda"
        if gpu:  # FSDP and NCCL work on the current device, whatever they are given
            torch.cuda.set_device(device)
        timeout = timedelta(seconds=timeout_seconds)
        try:
            dist.init_process_group(
                "nccl" if gpu else "gloo",
                timeout=timeout,
                store=attempt_store(timeout) if store is None else store,
                rank=rank,
                world_size=size,
                device_id=device if gpu else None,
            )
        except (dist.DistError, RuntimeError, ValueError) as error:
            raise EnvironmentFault(
                "RF7054",
                f"rank {rank} of {size} did not find the others: {error}",
                where=f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}",
                expected="the processes of one torchrun, all alive, that reach each other",
                remedy="see that all machines were started with the same --rdzv-endpoint, that it "
                "can be reached, and GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME where there are "
                "several networks",
            ) from error
        ranks = torch.arange(size).view(replicas, size // replicas)
        mesh = DeviceMesh(device.type, ranks, mesh_dim_names=(REPLICATE, SHARD))
        board = FaultBoard(_get_default_store(), rank, size)
        note_joined()
        return cls(device, rank, size, local_rank, mesh, board)

    def leave(self, *, failed: bool = False) -> None:
        """Destroy the process groups; does nothing in a world of one, or a second time.

        Args:
            failed: other ranks may be stuck in a collective, which is not waited for.
        """
        if self.mesh is None or not dist.is_initialized():
            return
        if failed and self.device.type == "cuda":
            dist.distributed_c10d._abort_process_group()  # of NCCL alone; gloo never waits
        else:
            dist.destroy_process_group()
        if not failed:
            # Threads of gloo that are there when the interpreter ends may still be about to drop a
            # tensor, which then aborts the process; they end with their group. The mesh has the
            # groups of its axes, and DTensor's caches have the mesh to the end of the process; cut
            # models have them too, in cycles.
            getattr(self.mesh, "_pg_registry", {}).clear()
            gc.collect()

    @property
    def is_main(self) -> bool:
        """Whether this rank writes files and talks to people."""
        return self.rank == 0

    @property
    def shards(self) -> int:
        """Ranks that hold one model between them."""
        return 1 if self.mesh is None else self.mesh.size(1)

    @property
    def replicas(self) -> int:
        """Copies of the sharded model."""
        return 1 if self.mesh is None else self.mesh.size(0)

    @property
    def shard_rank(self) -> int:
        """Which shard this rank holds."""
        return 0 if self.mesh is None else self.mesh.get_local_rank(SHARD)

    @property
    def replica(self) -> int:
        """Which copy this rank belongs to."""
        return 0 if self.mesh is None else self.mesh.get_local_rank(REPLICATE)

    @property
    def shard_mesh(self) -> DeviceMesh:
        """[shards]: the axis along which the model is cut.

        Raises:
            ValueError: there is one rank only.
        """
        if self.mesh is None:
            raise ValueError("a world of one rank has no mesh")
        return self.mesh[SHARD]

    # ---- collectives --------------------------------------------------------------------------

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over all ranks, of one shape everywhere; in place, and returned."""
        if self.mesh is not None:
            dist.all_reduce(tensor)
        return tensor

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on some rank."""
        if self.mesh is None:
            return flag
        found = torch.tensor([flag], dtype=torch.int32, device=self.device)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return bool(found)

    def any_exhausted(self, flag: bool) -> bool:
        """Whether memory ran out on some rank, in work with collectives that it then broke off.

        The others may be waiting for it inside that work, where nothing reaches them.

        Raises:
            LoneOutOfMemory: RF7063, on a rank with the flag: they are. The job has to end.
        """
        if self.mesh is None:
            return flag
        if self.device.type == "cuda":
            # Collectives of a GPU are only asked for so far. One that waits for a rank which broke
            # off would meet what that rank asks for next: who comes has to be through with all.
            torch.cuda.synchronize(self.device)
        if not self.board.come(self.patience_seconds if flag else 0.0) and flag:
            raise LoneOutOfMemory(
                "RF7063",
                f"out of memory on rank {self.rank}, while other ranks wait for it in the same "
                "forward or backward",
                where=f"rank {self.rank} of {self.size}",
                remedy="the same command goes on from the last checkpoint with half the batch; "
                "torchrun --max-restarts N does so by itself",
            )
        return self.any(flag)

    def gather_rows(self, rows: Tensor) -> list[Tensor]:
        """The tensors [n_r, ...] of all ranks in their order; only n_r may differ."""
        if self.mesh is None:
            return [rows]
        counts = [torch.zeros((), dtype=torch.int64, device=self.device) for _ in range(self.size)]
        dist.all_gather(counts, torch.tensor(len(rows), device=self.device))
        lengths = [int(count) for count in counts]
        padded = rows.new_zeros((max(lengths), *rows.shape[1:]))
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in lengths]
        dist.all_gather(parts, padded)
        return [part[:n] for part, n in zip(parts, lengths, strict=True)]

    def broadcast(self, tensors: Sequence[Tensor], source: int = 0) -> None:
        """Overwrite the tensors, contiguous ones, with those of rank `source`."""
        if self.mesh is None:
            return
        for tensor in tensors:
            if tensor.numel():
                # Bytes, because not every type travels everywhere.
                dist.broadcast(tensor.detach().view(-1).view(torch.uint8), source)

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self.mesh is not None:
            dist.barrier(device_ids=[self.device.index] if self.device.type == "cuda" else None)
