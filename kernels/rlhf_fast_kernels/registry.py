"""Registration with torch.library for ops without gradient.

Eager calls go straight to the launcher, because the dispatcher costs about 20 us a call;
torch.compile and tensor subclasses see one opaque op with a fake implementation, and the choice of
implementation is made when that op runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

NAMESPACE = "rlhf_fast"
# Anything else, a subclass of Tensor above all, is the dispatcher's business.
_PLAIN_TYPES = frozenset({torch.Tensor, torch.nn.Parameter, float, int, bool, str, type(None)})


def opaque_op(
    name: str, run: Callable[..., Any], fake: Callable[..., Any]
) -> Callable[..., tuple[torch.Tensor, ...]]:
    """Register `run` as `torch.ops.rlhf_fast.<name>`.

    Args:
        name: name of the op.
        run: the computation; its annotations become the schema, its outputs must be new tensors.
        fake: same arguments, outputs of the right shape, dtype and device without data.

    Returns:
        A function of the same positional arguments. Its outputs carry no gradient.
    """
    op = torch.library.custom_op(f"{NAMESPACE}::{name}", run, mutates_args=())
    op.register_fake(fake)

    def call(*arguments: Any) -> Any:
        if not torch.compiler.is_compiling() and is_plain(arguments):
            return run(*arguments)
        return op(*(x.detach() if isinstance(x, torch.Tensor) else x for x in arguments))

    return call


def refuse_wrappers(op: str, **tensors: torch.Tensor | None) -> None:
    """TypeError for tensors without memory of their own: DTensors, fake tensors and their like.

    For ops that hand addresses to a kernel: those of such a tensor are 0 or another's.
    """
    if is_plain(tuple(tensors.values())):
        return
    for name, x in tensors.items():
        if x is None or type(x).__torch_dispatch__ is torch.Tensor.__torch_dispatch__:
            continue
        hint = "its local shard (to_local())" if type(x).__name__ == "DTensor" else "a plain tensor"
        raise TypeError(
            f"{op}: {name} is a {type(x).__name__}, which has no memory to be read; pass {hint}"
        )


def is_plain(arguments: tuple[Any, ...]) -> bool:
    """Whether an eager call may pass the dispatcher by: no tensor is of a subclass."""
    # By exact type, in a loop: isinstance of a tensor and `all` of a generator cost 2 us more.
    for x in arguments:  # noqa: SIM110
        if type(x) not in _PLAIN_TYPES:
            return False
    return True
