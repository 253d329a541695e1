"""Weight views: how generation sees the parameters that training updates.

`AliasedWeights` is the view of one device: every parameter of the model becomes a view of one flat
buffer per dtype, and projections that read the same input lie side by side (q|k|v, gate|up). Their
concatenation, which a fused product reads, is then a view too: generation uses the very bytes the
optimizer writes, and a switch between the two costs nothing. Parameters stay the objects they were,
so optimizers, checkpoints and hooks do not notice.

Views of sharded parameters are made in `sharded_views`, over a twin of the module.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from rlhf_fast.distributed.flat_shards import adjacent, padded_numel
from rlhf_fast.distributed.placement import ADJACENT
from rlhf_fast.engine.buffers import allocate_again, give_up
from rlhf_fast.errors import GenerationError
from rlhf_fast_kernels import native


def base_linear(module: Any) -> Any:
    """The plain layer under a peft adapter, or the module itself."""
    return getattr(module, "base_layer", module)


def _adjacent_groups(module: nn.Module) -> Iterable[list[nn.Parameter]]:
    """Parameters that must lie side by side: weights of fused projections, then their biases."""
    for part in module.modules():
        for names in ADJACENT:
            layers = [base_linear(getattr(part, name, None)) for name in names]
            if not all(isinstance(layer, nn.Linear) for layer in layers):
                continue
            yield [layer.weight for layer in layers]
            if all(layer.bias is not None for layer in layers):
                yield [layer.bias for layer in layers]


def _lies_nowhere(parameter: Tensor) -> bool:
    """A size alone: on the meta device, or its memory was given back."""
    return parameter.is_meta or parameter.untyped_storage().nbytes() == 0


def why_not_aliased(module: nn.Module) -> str | None:
    """None if all parameters can become views of one buffer, otherwise why not."""
    if len({p.device for p in module.parameters()}) > 1:
        return "parameters lie on several devices"
    spans = []
    for name, parameter in module.named_parameters():
        if type(parameter.data) is not Tensor or not parameter.is_contiguous():
            return f"{name} is not an ordinary dense tensor"
        if _lies_nowhere(parameter):
            continue
        start = parameter.data_ptr()
        spans.append((start, start + parameter.numel() * parameter.itemsize, name))
    spans.sort()
    for (_, end, name), (start, _, other) in itertools.pairwise(spans):
        if start < end:
            return f"{name} and {other} share storage"
    seen: set[int] = set()
    for group in _adjacent_groups(module):
        ids = {id(p) for p in group}
        if len(ids) < len(group) or ids & seen or len({p.dtype for p in group}) > 1:
            return "a projection is used in two places"
        seen |= ids
    return None


def _groups(module: nn.Module) -> list[list[nn.Parameter]]:
    """All parameters in the order of the flat buffers: those that lie side by side together."""
    groups = [g for g in _adjacent_groups(module) if len({p.dtype for p in g}) == 1]
    grouped = {id(p) for group in groups for p in group}
    return groups + [[p] for p in module.parameters() if id(p) not in grouped]


def flat_numel(module: nn.Module, dtype: torch.dtype) -> int:
    """Elements of the flat buffer of this type; the module may be on the meta device."""
    return sum(padded_numel(g) for g in _groups(module) if g[0].dtype == dtype)


def _names(module: nn.Module) -> dict[str, int]:
    """Which parameter each name means, tied ones under all of theirs."""
    return {n: id(p) for n, p in module.named_parameters(remove_duplicate=False)}


Allocate = Callable[[int, torch.dtype], Tensor]


def _beside(parameter: Tensor) -> Allocate:
    return lambda count, dtype: torch.empty(count, dtype=dtype, device=parameter.device)


# One view a module, whoever asks; a second layout would pull the bytes away from the first.
_views: WeakKeyDictionary[nn.Module, AliasedWeights] = WeakKeyDictionary()


class AliasedWeights:
    """All parameters of a module as views of one flat buffer per dtype.

    Args:
        module: its parameters move into new storage, once; gradients must not exist yet.
        allocate: elements and a type to a flat buffer that may lie on another device; None: beside
            the parameters.

    Raises:
        GenerationError: RF4030, a parameter is no ordinary dense tensor.
    """

    def __init__(self, module: nn.Module, *, allocate: Allocate | None = None) -> None:
        self._module = ref(module)
        self._names = _names(module)
        self._places: list[tuple[str, nn.Parameter, int]] = []
        self._buffers: dict[torch.dtype, Tensor] = {}
        names = {id(p): name for name, p in module.named_parameters()}
        groups = _groups(module)
        fault = why_not_aliased(module)
        if fault is not None:
            raise GenerationError(
                "RF4030",
                f"the weights cannot become views of one buffer: {fault}",
                expected="dense, contiguous parameters with storage of their own, on one device",
                remedy="use engine.path=modules for this model",
            )
        for dtype in dict.fromkeys(p.dtype for p in module.parameters()):
            chosen = [g for g in groups if g[0].dtype == dtype]
            self._lay_out(chosen, dtype, names, allocate or _beside(chosen[0][0]))

    @classmethod
    def of(cls, module: nn.Module, *, allocate: Allocate | None = None) -> AliasedWeights:
        """The view of this module: the one it has, if its parameters still lie there."""
        known = _views.get(module)
        if known is not None and known.holds:
            return known
        made = cls(module, allocate=allocate)
        _views[module] = made
        return made

    def _lay_out(
        self,
        groups: Sequence[list[nn.Parameter]],
        dtype: torch.dtype,
        names: dict[int, str],
        allocate: Allocate,
    ) -> None:
        starts, total = [], 0
        for group in groups:
            starts.append(total)
            total += padded_numel(group)
        # A storage of its own, to the byte: what lies between groups is never read.
        # A caller's inference mode would leave parameters that can never be trained.
        with torch.inference_mode(False), torch.no_grad():
            buffer = allocate(total, dtype)
            native.advise_huge_pages(buffer)
            buffer.zero_()
            for group, start in zip(groups, starts, strict=True):
                for parameter in group:
                    view = buffer[start : start + parameter.numel()].view(parameter.shape)
                    view.copy_(parameter)
                    parameter.data = view
                    self._places.append((names[id(parameter)], parameter, view.data_ptr()))
                    start += parameter.numel()
        self._buffers[dtype] = buffer

    @property
    def nbytes(self) -> int:
        """Bytes of the flat buffers."""
        return sum(b.numel() * b.itemsize for b in self._buffers.values())

    def buffer(self, dtype: torch.dtype) -> Tensor:
        """The flat buffer of this type; views of its parameters have offsets in it."""
        return self._buffers[dtype]

    @property
    def buffers(self) -> dict[torch.dtype, Tensor]:
        """All flat buffers, one a type."""
        return dict(self._buffers)

    def give_up(self) -> None:
        """Give the memory back; parameters keep their shapes and lose their values."""
        give_up(self._buffers.values())

    def allocate_again(self) -> None:
        """After `give_up`: memory for all parameters, which hold nothing yet."""
        allocate_again(self._buffers.values())
        self._places = [(name, p, p.data_ptr()) for name, p, _ in self._places]

    @property
    def changes(self) -> int:
        """In-place writes to parameters so far, as PyTorch counts them."""
        return sum(parameter._version for _, parameter, _ in self._places)

    @property
    def holds(self) -> bool:
        """Whether every parameter still lies where it was put."""
        module = self._module()
        if module is None:
            return False
        return _names(module) == self._names and all(
            parameter.data_ptr() == address for _, parameter, address in self._places
        )

    def check(self) -> None:
        """Refuse to generate from memory that training no longer updates.

        Raises:
            GenerationError: RF4031, a parameter was moved, cast or replaced.
        """
        if not self.holds:
            raise GenerationError(
                "RF4031",
                "parameters no longer lie where generation reads them",
                expected="a model that is not moved, cast or re-assigned after the engine was made",
                remedy="move the model to its device and dtype first, then make the engine",
            )

    def concatenated(self, parameters: Sequence[Tensor]) -> Tensor | None:
        """See `adjacent`."""
        return adjacent(parameters)
