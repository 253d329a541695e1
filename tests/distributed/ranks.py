"""Functions on k ranks: `on_ranks(k, function, *arguments)` returns what each rank returned.

Ranks are forked from a server that has imported torch and transformers once and has never computed
anything: a process costs milliseconds, not seconds, and no thread pool is inherited. The function
belongs to a module that the ranks can import, takes a `World` first, and returns what pickles.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from rlhf_fast.distributed.world import World

TIMEOUT_SECONDS = 120.0
# A rank that waits for one that failed gives up soon after.
_COLLECTIVE_SECONDS = 60.0

# The server imports what this process would, also where another tree is installed.
os.environ["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    ["torch.distributed.fsdp", "transformers", "rlhf_fast.stages.ppo", "tests.distributed.ranks"]
)


def on_ranks(
    size: int,
    function: Callable[..., Any],
    *arguments: Any,
    replicas: int = 1,
    timeout: float = TIMEOUT_SECONDS,
) -> list[Any]:
    """Run `function(world, *arguments)` on `size` ranks over gloo.

    Raises:
        AssertionError: a rank raised (with its traceback), died or did not end in time; the others
            are gone then.
    """
    with tempfile.TemporaryDirectory() as folder:
        pipes, processes = [], []
        for rank in range(size):
            here, there = _context.Pipe(duplex=False)
            process = _context.Process(
                target=_rank,
                args=(there, folder, rank, size, replicas, function, arguments),
                daemon=True,
            )
            process.start()
            there.close()
            pipes.append(here)
            processes.append(process)
        try:
            return _collect(pipes, time.monotonic() + timeout)
        finally:
            for process in processes:
                process.kill()
                process.join()


def _collect(pipes: list[Connection], deadline: float) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(pipes):
        left = [pipe for rank, pipe in enumerate(pipes) if rank not in results]
        ready = wait(left, max(0.0, deadline - time.monotonic()))
        if not ready:
            missing = [rank for rank in range(len(pipes)) if rank not in results]
            raise AssertionError(f"ranks {missing} did not end in time")
        for pipe in ready:
            rank = pipes.index(pipe)  # type: ignore[arg-type]
            try:
                passed, value = pipe.recv()  # type: ignore[union-attr]
            except EOFError:
                raise AssertionError(f"rank {rank} died") from None
            if not passed:
                raise AssertionError(f"rank {rank}:\n{value}")
            results[rank] = value
    return [results[rank] for rank in range(len(pipes))]


def _rank(
    pipe: Connection,
    folder: str,
    rank: int,
    size: int,
    replicas: int,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    os.environ["LOCAL_RANK"] = str(rank)
    torch.set_num_threads(1)
    try:
        store = dist.FileStore(str(Path(folder) / "store"), size)
        world = World.join(
            torch.device("cpu"),
            replicas=replicas,
            timeout_seconds=_COLLECTIVE_SECONDS,
            store=store,
            rank=rank,
            size=size,
        )
        pipe.send((True, function(world, *arguments)))
        world.leave()
    except BaseException:
        pipe.send((False, traceback.format_exc()))
