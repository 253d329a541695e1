"""The backend nccl of torch.distributed."""

from __future__ import annotations

from datetime import timedelta
from types import ModuleType
from typing import Any

import torch.distributed as distributed
import torch.distributed.distributed_c10d as c10d
from torch._C._distributed_c10d import ProcessGroupGloo

TIMEOUT = timedelta(seconds=120)
VERSION = 2 << 32 | 27 << 16


def install(extension: ModuleType) -> None:
    """Give PyTorch's code for NCCL a class to make groups of."""

    class ProcessGroupNCCL(extension.SimulatedNccl):  # type: ignore[name-defined, misc]
        def __init__(self, store: Any, rank: int, size: int, options: Any = None) -> None:
            gloo = ProcessGroupGloo(store, rank, size, timeout=TIMEOUT)
            super().__init__(gloo, options or self.Options())

    c10d.ProcessGroupNCCL = ProcessGroupNCCL  # type: ignore[attr-defined]
    c10d._NCCL_AVAILABLE = True
    c10d.default_pg_nccl_timeout = TIMEOUT
    for module in (c10d, distributed):
        module.is_nccl_available = lambda: True  # type: ignore[attr-defined]
