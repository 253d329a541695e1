"""Settings of a run on several processes, started by `torchrun` (docs/distributed.md)."""

from __future__ import annotations

from dataclasses import dataclass

from rlhf_fast.config_setting import setting


@dataclass(frozen=True)
class DistributedConfig:
    """How the processes that torchrun started share the work; alone, nothing of it counts."""

    replicas: int = setting(
        1,
        "copies of the sharded models; the ranks of one copy hold it between them. As many as "
        "there are ranks: each holds whole models and sums gradients",
        low=1,
    )
    weights: str = setting(
        "auto",
        "how generation reads sharded weights: as tensor-parallel slices, gathered, or gathered a "
        "layer at a time; auto chooses by memory and divisibility",
        choices=("auto", "tp", "gather", "layerwise"),
    )
    timeout_seconds: float = setting(
        600.0, "a rank that waits longer for another ends the run; one step must fit", above=0
    )
