"""Data parallelism with whole models: every rank begins with the weights of rank 0.

For models that fit on one device with their optimizer; `gradients` adds up what the ranks find.
"""

from __future__ import annotations

import torch
from torch import nn

from rlhf_fast.distributed.world import World


def same_weights(world: World, module: nn.Module) -> None:
    """Overwrite parameters and buffers with those of rank 0; what is in host memory is left."""
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.device != world.device:
                continue
            sent = tensor.detach().contiguous()
            world.broadcast([sent])
            if sent.data_ptr() != tensor.data_ptr():
                tensor.copy_(sent)
