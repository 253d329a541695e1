"""Checkpoints, and what a training state is made of.

Save and load, from any number of ranks to any other: `save`, `BackgroundSaver`, `load`. Taking a
state apart and putting it together, without pickle: `module_tensors`, `optimizer_state`,
`scheduler_state`, `rng_state` and their `load_` counterparts.
"""

from rlhf_fast.distributed.background import BackgroundSaver
from rlhf_fast.distributed.checkpoint import save
from rlhf_fast.distributed.checkpoint_directory import steps
from rlhf_fast.distributed.checkpoint_reading import Checkpoint, load
from rlhf_fast.distributed.checkpoint_writer import CheckpointWriter, make_newest
from rlhf_fast.distributed.durable import staged_directory
from rlhf_fast.distributed.module_state import (
    load_module_tensors,
    module_tensors,
    require_same_frozen,
)
from rlhf_fast.distributed.optimizer_state import (
    load_optimizer_state,
    load_scheduler_state,
    optimizer_state,
    scheduler_state,
)
from rlhf_fast.distributed.rng_state import load_rng_state, rng_state

__all__ = [
    "BackgroundSaver",
    "Checkpoint",
    "CheckpointWriter",
    "load",
    "load_module_tensors",
    "load_optimizer_state",
    "load_rng_state",
    "load_scheduler_state",
    "make_newest",
    "module_tensors",
    "optimizer_state",
    "require_same_frozen",
    "rng_state",
    "save",
    "scheduler_state",
    "staged_directory",
    "steps",
]
