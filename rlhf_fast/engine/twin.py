"""A second module of the same structure, whose parameters are others.

Sharded parameters cannot be generated from as they lie in the trained module: its forward would
gather every layer for every token, and all ranks would have to take the same steps. A twin is
the same tree of layers, adapters and settings, with parameters of its own (slices or gathered
weights) that training does not know of.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from rlhf_fast.distributed.flat_shards import adjacent, groups, padded_numel
from rlhf_fast.engine.buffers import allocate_again, give_up, nbytes_of
from rlhf_fast.engine.fused_support import COMPUTE, active_adapters, why_not_fused
from rlhf_fast.engine.module_forward import unwrapped
from rlhf_fast.errors import GenerationError
from rlhf_fast.models.forward import compute_dtype

_HEAD_NORMS = ("q_norm.weight", "k_norm.weight")


def twin_of(module: nn.Module, device: torch.device | None = None) -> nn.Module:
    """A copy of a module's structure with every parameter on the meta device.

    Buffers (rotary frequencies) and settings are copied; tied parameters stay tied. Of adapters
    those come along that are active.

    Args:
        module: a causal LM, or a peft wrapper around one, with the adapters that generate active;
            before it is sharded, whose hooks are of no use here.
        device: where the buffers go; None: where they are.
    """
    memo: dict[int, object] = {}
    for parameter in module.parameters():
        meta = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
        memo[id(parameter)] = meta
    twin = copy.deepcopy(module, memo)
    for layer in [part for part in twin.modules() if isinstance(part, LoraLayer)]:
        for adapter in set(layer.lora_A) - set(active_adapters(layer)):
            layer.delete_adapter(adapter)
    for part in twin.modules() if device is not None else ():
        for key, buffer in part._buffers.items():
            part._buffers[key] = None if buffer is None else buffer.to(device)
    return twin.eval().requires_grad_(False)


def put(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Give the module another parameter of this name; under its other names too, where tied."""
    former = module.get_parameter(name)
    replaced = nn.Parameter(tensor, requires_grad=False)
    for part in module.modules():
        for key, parameter in part._parameters.items():
            if parameter is former:
                part._parameters[key] = replaced


def read_types(twin: nn.Module, trained: Mapping[str, Tensor]) -> dict[str, torch.dtype]:
    """The type in which generation reads every parameter, so that it computes what training does.

    Products and what acts on their results are in the type of the computation, all else (embedding,
    norms of the residual stream, adapters) in the type of the parameter. A head that is tied to an
    embedding of another type becomes a parameter of its own in the twin.

    Args:
        twin: of the trained module.
        trained: its parameters by name, tied ones under all of theirs.
    """
    compute = COMPUTE[compute_dtype(twin)]
    fused = why_not_fused(twin) is None
    head: Any = unwrapped(twin).get_output_embeddings()
    embedding: Any = unwrapped(twin).get_input_embeddings()
    held = {id(p): trained[name].dtype for name, p in twin.named_parameters()}
    if head.weight is embedding.weight and held[id(embedding.weight)] is not compute:
        head.weight = nn.Parameter(embedding.weight.detach(), requires_grad=False)
    types = {}
    for name, _ in twin.named_parameters():
        owner = twin.get_submodule(name.rpartition(".")[0])
        operand = isinstance(owner, nn.Linear | Conv1D) and ".lora_" not in name
        operand = operand or (fused and name.endswith(_HEAD_NORMS))
        types[name] = compute if operand else trained[name].dtype
    return types


class TwinBuffers:
    """Values that a twin holds for the length of a rollout, in one buffer per dtype.

    Projections of one input lie side by side, as in `AliasedWeights`.

    Args:
        twin: gets the parameters.
        wanted: their names, shapes and types.
        device: where.
    """

    def __init__(
        self,
        twin: nn.Module,
        wanted: Mapping[str, tuple[Sequence[int], torch.dtype]],
        device: torch.device,
    ) -> None:
        self._buffers: list[Tensor] = []
        self._parameters: list[nn.Parameter] = []
        for dtype in dict.fromkeys(dtype for _, dtype in wanted.values()):
            sizes = {name: shape for name, (shape, kind) in wanted.items() if kind is dtype}
            self._lay_out(twin, sizes, dtype, device)
        self.release()

    def _lay_out(
        self,
        twin: nn.Module,
        sizes: Mapping[str, Sequence[int]],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        empty = {n: torch.empty(*shape, dtype=dtype, device="meta") for n, shape in sizes.items()}
        together = list(groups(empty))
        numels = [padded_numel([empty[name] for name in group]) for group in together]
        with torch.inference_mode(False):
            buffer = torch.empty(sum(numels), dtype=dtype, device=device)
        for group, piece in zip(together, buffer.split(numels), strict=True):
            start = 0
            for name in group:
                stop = start + empty[name].numel()
                put(twin, name, piece[start:stop].view(empty[name].shape))
                self._parameters.append(twin.get_parameter(name))
                start = stop
        self._buffers.append(buffer)

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the buffers have now."""
        return nbytes_of(self._buffers)

    def restore(self) -> None:
        """Memory for all of them, without values."""
        allocate_again(self._buffers)

    def release(self) -> None:
        """Give the memory back; parameters stay views of it."""
        give_up(self._buffers)

    def check(self) -> None:
        """See `Weights`: a twin belongs to nobody who could move it."""
        if any(p.untyped_storage().nbytes() == 0 for p in self._parameters if p.numel()):
            raise GenerationError(
                "RF4031",
                "gathered weights are read outside of a rollout",
                remedy="generate through the engine",
            )

    def concatenated(self, parameters: Sequence[Tensor]) -> Tensor | None:
        """See `Weights`."""
        return adjacent(parameters)

    def buffer(self, dtype: torch.dtype) -> Tensor:
        """Asked for where products run in another type, which a twin's parameters have already."""
        raise AssertionError(f"operands of the twin are {dtype}")

    @property
    def changes(self) -> int:
        """See `Weights`."""
        return sum(parameter._version for parameter in self._parameters)
