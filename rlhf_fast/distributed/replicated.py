"""Data parallelism with whole models: gradients summed over the ranks before each step.

For models that fit on one device with their optimizer. Losses are divided by the token count of
the whole optimizer step already, so the sum of the ranks' gradients is the gradient.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from rlhf_fast.distributed.world import World

# One collective for so many bytes: few enough calls, and a buffer that is small beside a model.
BUCKET_BYTES = 32 * 2**20


def sum_gradients(world: World, parameters: Iterable[nn.Parameter]) -> None:
    """Put the sum over all ranks in the place of every gradient, in buckets.

    A parameter that has a gradient on some ranks gets one on all; one without any keeps none.
    """
    if world.size == 1:
        return
    named = list(parameters)
    present = torch.tensor([p.grad is not None for p in named], dtype=torch.int32)
    somewhere = world.sum(present.to(world.device)).tolist()
    grads: list[Tensor] = []
    for parameter, ranks in zip(named, somewhere, strict=True):
        if not ranks:
            continue
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        grads.append(parameter.grad)
    for bucket in _buckets(grads):
        flat = torch.cat([grad.flatten() for grad in bucket])
        world.sum(flat)
        parts = flat.split([grad.numel() for grad in bucket])
        for grad, part in zip(bucket, parts, strict=True):
            grad.copy_(part.view_as(grad))


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


def _buckets(grads: Sequence[Tensor]) -> list[list[Tensor]]:
    """Neighbours of one dtype, up to `BUCKET_BYTES` together or one alone."""
    buckets: list[list[Tensor]] = []
    used = 0
    for grad in grads:
        full = used + grad.nbytes > BUCKET_BYTES
        if not buckets or full or buckets[-1][0].dtype != grad.dtype:
            buckets.append([])
            used = 0
        buckets[-1].append(grad)
        used += grad.nbytes
    return buckets
