"""What a rank receives over the process groups, counted where PyTorch is asked for collectives.

A ring of n ranks is assumed, which is what bandwidth-optimal implementations cost:

    all-gather       (n - 1) / n of the result
    reduce-scatter   (n - 1) / n of the input
    all-reduce       2 (n - 1) / n of the tensor
    all-to-all       (n - 1) / n of the tensor
    broadcast        the tensor
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def _result(arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
    return arguments[0] if arguments else next(iter(options.values()))


def _input(arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
    names = ("input", "input_tensor", "input_list", "tensor")
    return arguments[1] if len(arguments) > 1 else next(options[n] for n in names if n in options)


# name -> (which argument counts, times how much of (n - 1) / n; None: all of it)
_COUNTED: dict[str, tuple[Callable[..., Any], float | None]] = {
    "all_gather": (_result, 1),
    "all_gather_into_tensor": (_result, 1),
    "all_gather_single": (_result, 1),
    "reduce_scatter": (_input, 1),
    "reduce_scatter_tensor": (_input, 1),
    "reduce_scatter_single": (_input, 1),
    "all_reduce": (_result, 2),
    "all_to_all_single": (_result, 1),
    "broadcast": (_result, None),
}


def _group(arguments: tuple[Any, ...], options: dict[str, Any]) -> dist.ProcessGroup | None:
    given = [x for x in arguments if isinstance(x, dist.ProcessGroup)]
    return given[0] if given else options.get("group")


def _nbytes(tensors: Any) -> int:
    if isinstance(tensors, Tensor):
        return tensors.numel() * tensors.itemsize
    return sum(_nbytes(tensor) for tensor in tensors)


class Traffic:
    """Bytes received and collectives called, by phase.

    Modules of the engine that keep a collective under a name of their own are counted as well. What
    PyTorch sends without its Python functions (object collectives, stores, barriers) is not.

    Attributes:
        phase: under which name what comes is counted.
        nbytes: phase -> bytes.
        calls: phase -> collectives.
    """

    def __init__(self) -> None:
        self.phase = "other"
        self.nbytes: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()
        self._inside = False

    @contextmanager
    def counting(self) -> Iterator[None]:
        """While this is entered, collectives of `torch.distributed` are counted."""
        originals = {name: getattr(dist, name) for name in _COUNTED if hasattr(dist, name)}
        places = [(dist, name, name) for name in originals]
        names = {id(function): name for name, function in originals.items()}
        for module_name, module in list(sys.modules.items()):
            if module_name.startswith("rlhf_fast"):
                places += [
                    (module, attribute, names[id(value)])
                    for attribute, value in vars(module).items()
                    if id(value) in names
                ]
        for owner, attribute, name in places:
            setattr(owner, attribute, self._counted(name, originals[name]))
        try:
            yield
        finally:
            for owner, attribute, name in places:
                setattr(owner, attribute, originals[name])

    def take(self) -> tuple[dict[str, int], dict[str, int]]:
        """Bytes and calls by phase since the last call; starts again from zero."""
        taken = dict(self.nbytes), dict(self.calls)
        self.nbytes.clear()
        self.calls.clear()
        return taken

    def _counted(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        which, factor = _COUNTED[name]

        def call(*arguments: Any, **options: Any) -> Any:
            if self._inside:  # one name implemented by another
                return function(*arguments, **options)
            ranks = dist.get_world_size(_group(arguments, options))
            share = 1.0 if factor is None else factor * (ranks - 1) / ranks
            with torch.no_grad():
                self.nbytes[self.phase] += int(share * _nbytes(which(arguments, options)))
            self.calls[self.phase] += 1
            self._inside = True
            try:
                return function(*arguments, **options)
            finally:
                self._inside = False

        return call
