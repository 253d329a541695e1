"""What entering a block exchanges between ranks and takes from the allocator."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_COLLECTIVES = frozenset({"c10d", "_c10d_functional", "c10d_functional", "symm_mem"})


@dataclass
class Seen:
    """Collectives by name, bytes of all tensors that they were given, and bytes allocated."""

    collectives: list[str] = field(default_factory=list)
    moved: int = 0
    allocated: int = 0


class _Collectives(TorchDispatchMode):
    """Every operator passes here, by whichever name of Python it was called."""

    def __init__(self, seen: Seen) -> None:
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in _COLLECTIVES:
            self.seen.collectives.append(func.name())
            tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
            self.seen.moved += sum(t.numel() * t.itemsize for t in tensors)
        return func(*args, **(kwargs or {}))


@contextmanager
def watched() -> Iterator[Seen]:
    """Count in the block, which computes on this thread and on the CPU; read the result after it.

    Bytes are those that the allocator reports: storages that are resized are among them.
    """
    seen = Seen()
    with (
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found,
        _Collectives(seen),
    ):
        yield seen
    events = found.profiler.kineto_results.events()
    memory = [event.nbytes() for event in events if event.name() == "[memory]"]
    seen.allocated = sum(size for size in memory if size > 0)
