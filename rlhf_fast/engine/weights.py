"""Weight views: how generation sees the parameters that training updates.

`AliasedWeights` is the view of one device: every parameter of the model becomes a view of one flat
buffer per dtype, and projections that read the same input lie side by side (q|k|v, gate|up). Their
concatenation, which a fused product reads, is then a view too: generation uses the very bytes the
optimizer writes, and a switch between the two costs nothing. Parameters stay the objects they were,
so optimizers, checkpoints and hooks do not notice.

Other views (shards that are tensor-parallel slices, a gathered buffer) will answer the same three
questions: `linear(...)`, `check()`, `nbytes`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from rlhf_fast.distributed.flat_shards import ALIGNMENT_BYTES, adjacent
from rlhf_fast.distributed.placement import ADJACENT
from rlhf_fast.errors import GenerationError


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


def why_not_aliased(module: nn.Module) -> str | None:
    """None if all parameters can become views of one buffer, otherwise why not."""
    if len({p.device for p in module.parameters()}) > 1:
        return "parameters lie on several devices"
    spans = []
    for name, parameter in module.named_parameters():
        if type(parameter.data) is not Tensor or not parameter.is_contiguous():
            return f"{name} is not an ordinary dense tensor"
        if parameter.is_meta:
            continue  # a size alone, which lies nowhere
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


def _padded_numel(group: Sequence[nn.Parameter]) -> int:
    step = ALIGNMENT_BYTES // group[0].itemsize
    return -(-sum(p.numel() for p in group) // step) * step


def flat_numel(module: nn.Module, dtype: torch.dtype) -> int:
    """Elements of the flat buffer of this type; the module may be on the meta device."""
    return sum(_padded_numel(g) for g in _groups(module) if g[0].dtype == dtype)


def _names(module: nn.Module) -> dict[str, int]:
    """Which parameter each name means, tied ones under all of theirs."""
    return {n: id(p) for n, p in module.named_parameters(remove_duplicate=False)}


# One view a module, whoever asks; a second layout would pull the bytes away from the first.
_views: WeakKeyDictionary[nn.Module, AliasedWeights] = WeakKeyDictionary()


class AliasedWeights:
    """All parameters of a module as views of one flat buffer per dtype.

    Args:
        module: its parameters move into new storage, once; gradients must not exist yet.

    Raises:
        GenerationError: RF4030, a parameter is no ordinary dense tensor.
    """

    def __init__(self, module: nn.Module) -> None:
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
            self._lay_out([g for g in groups if g[0].dtype == dtype], dtype, names)

    @classmethod
    def of(cls, module: nn.Module) -> AliasedWeights:
        """The view of this module: the one it has, if its parameters still lie there."""
        known = _views.get(module)
        if known is not None and known.holds:
            return known
        made = cls(module)
        _views[module] = made
        return made

    def _lay_out(
        self, groups: Sequence[list[nn.Parameter]], dtype: torch.dtype, names: dict[int, str]
    ) -> None:
        starts, total = [], 0
        for group in groups:
            starts.append(total)
            total += _padded_numel(group)
        device = groups[0][0].device
        # A storage of its own, to the byte: what lies between groups is never read.
        # A caller's inference mode would leave parameters that can never be trained.
        with torch.inference_mode(False), torch.no_grad():
            buffer = torch.zeros(total, dtype=dtype, device=device)
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
        """[sum of rows, ...] view over parameters that lie side by side; None if they do not."""
        return adjacent(parameters)
