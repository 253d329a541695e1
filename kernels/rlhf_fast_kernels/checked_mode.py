"""When the values of a call's tensors are looked at, not only their shapes and dtypes."""

from __future__ import annotations

import os

import torch
from torch import Tensor

ENVIRONMENT = "RLHF_FAST_CHECK"


def reads_values(x: Tensor) -> bool:
    """True on the CPU, and on an accelerator in checked mode (`RLHF_FAST_CHECK=1`).

    Looking makes the host wait for an accelerator. False while torch.compile traces: the ops look
    when they run.
    """
    if torch.compiler.is_compiling():
        return False
    return x.device.type == "cpu" or os.environ.get(ENVIRONMENT, "0") not in ("", "0")
