"""Python's garbage collector during a run."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def old_objects_apart() -> Iterator[None]:
    """Until the block is left, collections pass over what existed before it.

    Packages and models, 400,000 objects in a small PPO run, live as long as it does; looking at
    them again and again took 3 % of the processor time of its steps on a CPU. Garbage is freed
    first, so none is kept. Does nothing where somebody else has put objects apart, to take them
    back.
    """
    if gc.get_freeze_count():
        yield
        return
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
