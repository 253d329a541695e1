"""Values and errors that all ranks know: what one rank met, every rank acts on.

Everything travels as JSON; nothing is unpickled, not even between ranks. All functions are
collective in a world of several ranks: call them on the main thread, in the same order everywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from rlhf_fast import errors
from rlhf_fast.distributed.json_state import dump_json, parse_json
from rlhf_fast.distributed.world import World
from rlhf_fast.errors import CheckpointError, RLHFError

ALONE = World(torch.device("cpu"))


def share(world: World, value: Any) -> list[Any]:
    """The values (plain JSON) of all ranks, in their order."""
    if world.mesh is None:
        return [value]
    data = bytearray(dump_json(value, sort_keys=False))
    rows = torch.frombuffer(data, dtype=torch.uint8).to(world.device)
    return [parse_json(part.cpu().numpy().tobytes()) for part in world.gather_rows(rows)]


def agree(world: World, error: Exception | None) -> None:
    """Raise on every rank if some rank has an error.

    A rank raises its own; a rank without one raises that of the lowest rank that has one, of the
    same kind and code, with that rank named. An error that is no `RLHFError` arrives as RF8010.
    """
    entries = share(world, None if error is None else _to_dict(error))
    if error is not None:
        raise error
    for rank, entry in enumerate(entries):
        if entry is not None:
            raise _from_dict(rank, entry)


def on_main(world: World, work: Callable[[], Any]) -> Any:
    """What `work` returns (plain JSON) on rank 0, where alone it runs; raises as `agree`."""
    value, error = None, None
    if world.is_main:
        try:
            value = work()
            dump_json(value, sort_keys=False)  # what cannot travel is that rank's fault, not a hang
        except Exception as caught:
            error = caught
    agree(world, error)
    return share(world, value)[0]


def _to_dict(error: Exception) -> dict[str, str]:
    if isinstance(error, RLHFError):
        fields = ("code", "what", "where", "expected", "remedy")
        return {"kind": type(error).__name__} | {name: getattr(error, name) for name in fields}
    return {"kind": type(error).__name__, "what": str(error)}


def _from_dict(rank: int, entry: dict[str, str]) -> RLHFError:
    kind, what = entry["kind"], entry["what"]
    if "code" in entry:
        raised: type[RLHFError] = getattr(errors, kind, CheckpointError)
        texts = {name: entry[name] for name in ("where", "expected", "remedy")}
        error = raised(entry["code"], f"rank {rank}: {what}", **texts)
    else:
        error = CheckpointError(
            "RF8010",
            f"rank {rank} could not do its part: {kind}: {what}",
            remedy=f"see what rank {rank} says; checkpoints that were complete before are intact",
        )
    error.of_another_rank = True
    return error
