"""Backward functions of which there is no second derivative."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch


def first_order(op: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A decorator for the backward of an op: with create_graph=True it raises a RuntimeError.

    `once_differentiable` raises only where the upstream gradient has a graph of its own; otherwise
    a gradient of the gradient passes, and misses the op's part.
    """

    def decorate(backward: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(backward)
        def checked(ctx: Any, *upstream: Any) -> Any:
            if torch.is_grad_enabled():
                raise RuntimeError(
                    f"{op}: gradients of its gradients do not exist; call backward without "
                    "create_graph=True, or form the logits and the loss in plain PyTorch"
                )
            return backward(ctx, *upstream)

        return checked

    return decorate
