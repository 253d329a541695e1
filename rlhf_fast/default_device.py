"""Work on the host in programs that call `torch.set_default_device`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import ParamSpec, TypeVar

import torch

_P = ParamSpec("_P")
_R = TypeVar("_R")


def host_by_default() -> AbstractContextManager[object]:
    """Tensors that name no device are the host's, whatever the program's default is.

    Nothing is entered where the host is the default already: a device as a context costs every call
    of torch a microsecond.
    """
    return nullcontext() if torch.get_default_device().type == "cpu" else torch.device("cpu")


def on_the_host(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """The function, run with `host_by_default`."""

    @functools.wraps(function)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        with host_by_default():
            return function(*args, **kwargs)

    return run
