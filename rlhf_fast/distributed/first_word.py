"""Which rank speaks of a fault before the ranks have joined: the first to have one.

Most such faults (a key of the config, a missing file) are the same on every rank, and one message
is enough. They need not be: a file may be missing on one machine alone. The store that torchrun
serves is there before any process group.
"""

from __future__ import annotations

import os
from datetime import timedelta

import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

_KEY = "rlhf_fast/failed before joining"
_PATIENCE = timedelta(seconds=5)
_joined = False


def attempt_store(timeout: timedelta) -> Store:
    """The store that torchrun serves, for this attempt alone.

    It outlives the ranks that `--max-restarts` starts again, which would else look for each other
    at the addresses of those that are gone.
    """
    store, _, _ = next(rendezvous("env://", timeout=timeout))
    return PrefixStore(f"attempt/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def note_joined() -> None:
    """From now on the ranks' own board says who speaks."""
    global _joined
    _joined = True


def another_spoke_first() -> bool:
    """Whether another rank has had a fault before this one; false once they have joined.

    Without torchrun's store every rank speaks for itself.
    """
    if _joined or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return False
    try:
        return attempt_store(_PATIENCE).add(_KEY, 1) > 1
    except (dist.DistError, RuntimeError, ValueError):
        return False
