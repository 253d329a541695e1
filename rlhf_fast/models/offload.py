"""A frozen model that lives in host memory and is read on the device a layer at a time.

Reference and reward model run forward only, a few times in a step. Their weights need not be on the
device in between, nor all at once: while layer i computes, layer i + 1 is copied on a stream of its
own. Two layers and the largest of the other weights (embedding, final norm, head) exist there, and
nothing between two forwards. The outputs are those of the resident model to the bit.

A forward costs one copy of the model, so it should read many tokens: a token is 2 FLOPs a
parameter, a copy 2 or 4 bytes a parameter, and the copy is hidden from about
`bytes_per_parameter / 2 * FLOP/s / bandwidth` tokens on (estimate for 5e14 FLOP/s, 55 GB/s and 2
bytes: 9000).

On a CPU the copies go to ordinary memory and there is no stream; everything else is the same code.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_fast.distributed.placement import decoder_layers, why_not_by_layers
from rlhf_fast.errors import ModelError
from rlhf_fast.models.forward import compute_dtype, set_device

# Every weight begins where an allocation of its own could: products at other addresses may take
# other code paths and round differently.
_ALIGNMENT = 256


def _aligned(parameter: Tensor) -> int:
    return -(-parameter.nbytes // _ALIGNMENT) * _ALIGNMENT


@dataclass(frozen=True)
class StreamSizes:
    """What `StreamedModule` will take.

    Args:
        blocks: bytes of each block of host memory.
        device: bytes on the device at most, during a forward.
    """

    blocks: tuple[int, ...]
    device: int


def stream_sizes(module: nn.Module) -> StreamSizes:
    """The sizes of a frozen module in host memory; its weights may be on the meta device.

    Raises:
        ModelError: as `StreamedModule`.
    """
    wrapped: Any = module
    trunk: nn.Module = wrapped.base_model
    layers = [sum(map(_aligned, layer.parameters())) for layer in _decoder_layers(module, trunk)]
    inside = {m for layer in _decoder_layers(module, trunk) for m in layer.modules()}
    of_trunk = set(trunk.modules())
    heads, singles, others = set(), 0, set()
    for part in module.modules():
        own = [] if part in inside else list(part.parameters(recurse=False))
        others.update(own)
        if part in of_trunk:
            singles = max(singles, sum(map(_aligned, own)))
        else:
            heads.update(own)
    # While layers pass, embedding or final norm is there beside them; the head comes after them.
    device = max(2 * max(layers) + singles, sum(map(_aligned, heads)))
    return StreamSizes((*layers, *map(_aligned, others)), device)


class _HostWeights:
    """Parameters that travel together, back to back in one run of host memory (pinned for CUDA)."""

    def __init__(self, parameters: Sequence[nn.Parameter], *, pin: bool) -> None:
        self.parameters = tuple(parameters)
        self.offsets, end = [], 0
        for parameter in self.parameters:
            self.offsets.append(end)
            end += _aligned(parameter)
        self.host = torch.empty(end, dtype=torch.uint8, pin_memory=pin)
        for parameter, view in zip(self.parameters, self._views(self.host), strict=True):
            view.copy_(parameter.detach())
        self.bind(self.host)

    @property
    def nbytes(self) -> int:
        return self.host.nbytes

    def _views(self, memory: Tensor) -> Iterator[Tensor]:
        for parameter, offset in zip(self.parameters, self.offsets, strict=True):
            flat = memory[offset : offset + parameter.nbytes]
            yield flat.view(parameter.dtype).view(parameter.shape)

    def bind(self, memory: Tensor) -> None:
        """Let the parameters be views of `memory`, which holds a copy of the host or will."""
        for parameter, view in zip(self.parameters, self._views(memory), strict=True):
            parameter.data = view


class _LayerBuffers:
    """Two buffers on the device through which the layers pass in turn, the next one ahead of use.

    Made by the stream that computes; the stream that copies waits for it before it writes into a
    buffer, and is waited for before the buffers are given back.
    """

    def __init__(self, layers: Sequence[_HostWeights], device: torch.device) -> None:
        self._layers = layers
        size = max(layer.nbytes for layer in layers)
        self._slots = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2)]
        self._holds: list[int | None] = [None, None]
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._copied: list[Any] = [None, None]
        self._fetch(0)

    @property
    def nbytes(self) -> int:
        return sum(slot.nbytes for slot in self._slots)

    def enter(self, index: int) -> None:
        """Bind layer `index` to its copy and start copying the next one."""
        slot = index % 2
        if self._holds[slot] != index:
            self._fetch(index)
        if self._stream is not None:
            torch.cuda.current_stream(self._slots[slot].device).wait_event(self._copied[slot])
        self._layers[index].bind(self._slots[slot])
        if index + 1 < len(self._layers):
            self._fetch(index + 1)

    def leave(self, index: int) -> None:
        """Point layer `index` back to the host."""
        self._layers[index].bind(self._layers[index].host)

    def _fetch(self, index: int) -> None:
        slot, source = index % 2, self._layers[index].host
        target = self._slots[slot][: source.nbytes]
        self._holds[slot] = index
        if self._stream is None:
            target.copy_(source)
            return
        # What has been asked for so far includes the last reading of what the buffer held.
        self._stream.wait_stream(torch.cuda.current_stream(target.device))
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
            self._copied[slot] = self._stream.record_event()

    def close(self) -> None:
        """Point every layer back to the host; the buffers may be given back then."""
        for index in range(len(self._layers)):
            self.leave(index)
        if self._stream is not None:
            torch.cuda.current_stream(self._slots[0].device).wait_stream(self._stream)


class StreamedModule:
    """Moves a frozen Hugging Face model to host memory and brings it in for one forward at a time.

    `with streamed.reading(): ...` allows one forward of `module` or of its trunk on `device`;
    the head stays on the device to the end of the block. The module itself remains ordinary:
    names, shapes and state dict are as before, its parameters lie on the host.

    Args:
        module: causal LM or classifier whose parameters are frozen; changed in place.
        device: where it computes.

    Attributes:
        most_device_bytes: the most that `device_bytes` has been since someone set this to 0.

    Raises:
        ModelError: RF3070, no list of decoder layers in it, a trained parameter, or weights that
            two layers share.
    """

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        wrapped: Any = module
        trunk: nn.Module = wrapped.base_model
        layers = _decoder_layers(module, trunk)
        pin = device.type == "cuda"
        self.module = module
        self.device = device
        self._layers = [_HostWeights(list(layer.parameters()), pin=pin) for layer in layers]
        inside = {m for layer in layers for m in layer.modules()}
        self._others: dict[nn.Parameter, _HostWeights] = {}
        for part in module.modules():
            if part not in inside:
                for parameter in part.parameters(recurse=False):
                    if parameter not in self._others:  # tied weights are held once
                        self._others[parameter] = _HostWeights([parameter], pin=pin)
        for buffer in module.buffers():
            buffer.data = buffer.data.to(device)
        set_device(module, device)
        self._reading = False
        self.most_device_bytes = 0
        self._buffers: _LayerBuffers | None = None
        self._loaded: dict[nn.Parameter, Tensor] = {}
        self._hook(trunk, layers, inside)

    @property
    def host_bytes(self) -> int:
        """Bytes of weights in host memory, less what alignment and pinning add."""
        return sum(p.nbytes for p in self.module.parameters())

    @property
    def device_bytes(self) -> int:
        """Bytes of weights and buffers for them on the device now; 0 outside `reading`."""
        buffers = 0 if self._buffers is None else self._buffers.nbytes
        return buffers + sum(copy.nbytes for copy in self._loaded.values())

    @contextmanager
    def reading(self) -> Iterator[None]:
        """One forward may run inside; whatever happens there, all weights are on the host after."""
        if self._reading:
            raise RuntimeError("StreamedModule.reading: the model is being read already")
        self._reading = True
        try:
            yield
        finally:
            self._reading = False
            self._close_layers()
            self._release(list(self._loaded))

    def _hook(self, trunk: nn.Module, layers: nn.ModuleList, inside: set[nn.Module]) -> None:
        trunk.register_forward_pre_hook(lambda *_: self._open_layers())
        for index, layer in enumerate(layers):
            layer.register_forward_pre_hook(lambda *_, i=index: self._enter_layer(i))
            layer.register_forward_hook(lambda *_, i=index: self._leave_layer(i))
        for part in trunk.modules():
            own = list(part.parameters(recurse=False))
            if own and part not in inside:
                part.register_forward_pre_hook(lambda *_, own=own: self._load(own))
                part.register_forward_hook(lambda *_, own=own: self._release(own))
        # Heads are read by fused ops as well as called, so they come in as a whole.
        of_trunk = set(trunk.modules())
        heads = [
            parameter
            for part in self.module.modules()
            if part not in of_trunk
            for parameter in part.parameters(recurse=False)
        ]
        trunk.register_forward_hook(lambda *_: self._close_layers())
        trunk.register_forward_hook(lambda *_: self._load(heads))

    def _open_layers(self) -> None:
        if self._reading:
            self._buffers = _LayerBuffers(self._layers, self.device)
            self._note()

    def _enter_layer(self, index: int) -> None:
        if self._buffers is not None:
            self._buffers.enter(index)

    def _leave_layer(self, index: int) -> None:
        if self._buffers is not None:
            self._buffers.leave(index)

    def _close_layers(self) -> None:
        if self._buffers is not None:
            self._buffers.close()
            self._buffers = None

    def _load(self, parameters: Sequence[nn.Parameter]) -> None:
        for parameter in parameters if self._reading else ():
            if parameter not in self._loaded:
                weights = self._others[parameter]
                copy = torch.empty_like(weights.host, device=self.device, pin_memory=False)
                copy.copy_(weights.host, non_blocking=True)
                weights.bind(copy)
                self._loaded[parameter] = copy
        self._note()

    def _note(self) -> None:
        self.most_device_bytes = max(self.most_device_bytes, self.device_bytes)

    def _release(self, parameters: Sequence[nn.Parameter]) -> None:
        for parameter in parameters:
            if self._loaded.pop(parameter, None) is not None:
                self._others[parameter].bind(self._others[parameter].host)


def round_layer_weights(module: nn.Module) -> None:
    """Hold the linear layers of a frozen model's decoder in bfloat16 if it computes in that.

    Autocast rounds their fp32 weights so in every forward; done once, it gives the same bits from
    half the bytes. Embeddings, norms and heads stay fp32: what they compute is not rounded.
    """
    trunk: Any = module
    if compute_dtype(module) != "bfloat16":
        return
    for layers in (m for m in trunk.base_model.modules() if isinstance(m, nn.ModuleList)):
        for part in layers.modules():
            if type(part) is nn.Linear:
                for parameter in part.parameters():
                    parameter.data = parameter.data.bfloat16()


def _decoder_layers(module: nn.Module, trunk: nn.Module) -> nn.ModuleList:
    """The list of decoder layers: of all lists in the trunk the one with the most weights."""
    layers = decoder_layers(trunk)
    problem = why_not_by_layers(layers)
    if any(p.requires_grad for p in module.parameters()):
        problem = "it is trained"
    if layers is None or problem:
        raise ModelError(
            "RF3070",
            f"the model cannot be read a layer at a time: {problem}",
            where=type(module).__name__,
            expected="a frozen model with a list of decoder layers of their own weights",
            remedy="keep it on the device: memory.reference=resident, memory.reward_model=resident",
        )
    return layers
