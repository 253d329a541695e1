"""Causal attention over packed segments, as an attention implementation of transformers.

Inside `packed_attention_mode(module)` every attention layer of a Hugging Face model calls
`packed_attention_forward`; outside it the model is stock. Linear layers then run on exactly the N
packed tokens, and attention costs the sum of squared segment lengths instead of N squared.

On CUDA in half precision a variable-length flash kernel reads the packed tensors as they lie;
elsewhere, and where no such library is installed, our op `packed_attention` does. What it does not
take (fp64, heads wider than 256, a processor without the compiled module) is gathered into
right-padded groups for `scaled_dot_product_attention(is_causal=True)`: with padding on the right a
causal query never sees a padded key, so no mask has to exist.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from rlhf_fast.models.attention_mode import attention_configs, attention_mode
from rlhf_fast.models.fused_layers import FusedLayers, fused_layers, replaced_forwards
from rlhf_fast.transfer import sent
from rlhf_fast.types import PackedSequences
from rlhf_fast_kernels.packed_attention import packed_attention, unsupported

PACKED_ATTENTION = "rlhf_fast_packed"

# Below this ratio of padded to real tokens one launch beats several smaller ones.
_MAX_PADDING_RATIO = 2.0


@dataclass(frozen=True)
class SegmentGroup:
    """k segments padded on the right to `width` tokens.

    Args:
        count: k.
        width: tokens of the longest of them.
        gather: [k*width] int64 packed index of each slot, or None if the group is the packed
            sequence itself. A padded slot repeats its own segment's last token, so that nothing of
            one segment, NaN included, ever enters another.
    """

    count: int
    width: int
    gather: Tensor | None


@dataclass(frozen=True)
class PaddedGroups:
    """All segments of a packed batch in right-padded groups.

    Args:
        groups: they cover every token once.
        ungather: [N] int64 slot of each packed token in the groups' concatenated slots, or None if
            slots and packed tokens are the same.
    """

    groups: tuple[SegmentGroup, ...]
    ungather: Tensor | None


@dataclass(frozen=True)
class PackedLayout:
    """Where the segments of a packed batch lie; built once per forward, read by every layer.

    Args:
        cu_seqlens: [K+1] int32 on the device of the forward.
        lengths: [K] int64 on the host.
    """

    cu_seqlens: Tensor
    lengths: Tensor

    @classmethod
    def build(cls, sequences: PackedSequences, device: torch.device) -> PackedLayout:
        """The layout of `sequences` for a forward on `device`.

        Sequences on the host cost the device no synchronisation.
        """
        return cls(sent(sequences.cu_seqlens, device), sequences.lengths.cpu())

    @functools.cached_property
    def max_length(self) -> int:
        """Tokens of the longest segment."""
        return int(self.lengths.max())

    @functools.cached_property
    def padded(self) -> PaddedGroups:
        """Segments grouped so that padding at most doubles the work.

        If padding all of them to the longest costs more than that, segments are grouped by the
        power of two their length falls under. Only the SDPA path asks for it.
        """
        lengths, device = self.lengths, self.cu_seqlens.device
        keep, total = torch.nonzero(lengths > 0).squeeze(1), int(lengths.sum())
        slots = len(keep) * self.max_length
        if total == slots:
            return PaddedGroups((SegmentGroup(len(keep), self.max_length, None),), None)
        if slots <= _MAX_PADDING_RATIO * total:
            members = [keep]
        else:
            buckets = torch.ceil(torch.log2(lengths[keep].double())).long()
            members = [keep[buckets == b] for b in buckets.unique().tolist()]
        starts = lengths.cumsum(0) - lengths
        ungather, offset = torch.empty(total, dtype=torch.int64), 0
        groups = []
        for segments in members:
            size, width = lengths[segments, None], int(lengths[segments].max())
            column = torch.arange(width)[None, :]
            index = (starts[segments, None] + torch.minimum(column, size - 1)).flatten()
            real = (column < size).flatten()
            ungather[index[real]] = offset + torch.nonzero(real).squeeze(1)
            groups.append(SegmentGroup(len(segments), width, sent(index, device)))
            offset += index.numel()
        return PaddedGroups(tuple(groups), sent(ungather, device))


def packed_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    packed_layout: PackedLayout,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention that keeps segments apart, with the signature transformers calls.

    Args:
        module: the calling attention layer.
        query: [1, heads, N, head dim].
        key, value: [1, key/value heads, N, head dim]; heads is a multiple of key/value heads.
        attention_mask: always None, because no mask function is registered under this name.
        packed_layout: where the segments lie.
        scaling: factor of the scores; None is 1/sqrt(head dim).
        dropout: must be 0, as in every role.
        sliding_window: a token looks at itself and at the `sliding_window - 1` tokens before it.

    Returns:
        [1, N, heads, head dim] and None for the attention weights.
    """
    extra = [name for name in ("softcap", "s_aux", "position_bias") if kwargs.get(name) is not None]
    if extra or attention_mask is not None or dropout:
        raise ValueError(
            f"{type(module).__name__}: packed attention has no {extra or 'mask or dropout'}"
        )
    query, key, value = (_autocast(t) for t in (query, key, value))
    window = sliding_window if (sliding_window or 0) < packed_layout.max_length else None
    kernel = _varlen_kernel(query.device.type, query.dtype, query.shape[-1])
    if kernel is None and unsupported(query) is None:
        kernel = _our_kernel
    if kernel is not None:
        q, k, v = (t.squeeze(0).transpose(0, 1) for t in (query, key, value))
        return kernel(q, k, v, packed_layout, scaling, window)[None], None
    out = _sdpa_groups(query, key, value, packed_layout, scaling, window)
    return out[None], None


def _autocast(tensor: Tensor) -> Tensor:
    # Rotary embeddings leave q and k in fp32 under autocast while v is bf16; kernels want one type.
    device = tensor.device.type
    if not torch.is_autocast_enabled(device):
        return tensor
    return tensor.to(torch.get_autocast_dtype(device))


def _sdpa_groups(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: PackedLayout,
    scaling: float | None,
    window: int | None,
) -> Tensor:
    """[N, heads, head dim] by one SDPA call per padded group."""
    gqa = query.shape[1] != key.shape[1]
    slots = []
    for group in layout.padded.groups:
        q, k, v = (_pad(t, group) for t in (query, key, value))
        narrow = window is not None and window < group.width
        mask = _band(group.width, window or 0, query.device) if narrow else None
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=gqa
        )
        slots.append(out.transpose(1, 2).flatten(0, 1))
    flat = slots[0] if len(slots) == 1 else torch.cat(slots)
    ungather = layout.padded.ungather
    return flat if ungather is None else flat.index_select(0, ungather)


def _pad(tensor: Tensor, group: SegmentGroup) -> Tensor:
    """[1, heads, N, head dim] -> [k, heads, width, head dim]."""
    tokens = tensor.squeeze(0).transpose(0, 1)
    if group.gather is not None:
        tokens = tokens.index_select(0, group.gather)
    return tokens.unflatten(0, (group.count, group.width)).transpose(1, 2)


def _band(width: int, window: int, device: torch.device) -> Tensor:
    """[width, width] bool, true where 0 <= query - key < window."""
    index = torch.arange(width, device=device)
    distance = index[:, None] - index[None, :]
    return (distance >= 0) & (distance < window)


VarlenKernel = Callable[[Tensor, Tensor, Tensor, PackedLayout, float | None, int | None], Tensor]


def _varlen_kernel(device: str, dtype: torch.dtype, head_dim: int) -> VarlenKernel | None:
    if device != "cuda" or dtype not in (torch.float16, torch.bfloat16):
        return None
    if head_dim > 256 or head_dim % 8:
        return None
    return _flash_attn_kernel() or _torch_varlen_kernel()


def _our_kernel(
    q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout, scale: float | None, win: int | None
) -> Tensor:
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    out, _ = packed_attention(
        q, k, v, layout.cu_seqlens, scale=scale, window=win, max_length=layout.max_length
    )
    return out


@functools.cache
def _flash_attn_kernel() -> VarlenKernel | None:
    if importlib.util.find_spec("flash_attn") is None:
        return None
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError:  # built for another torch or CUDA
        return None

    def kernel(
        q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout, scale: float | None, win: int | None
    ) -> Tensor:
        cu, longest = layout.cu_seqlens, layout.max_length
        window = (-1, -1) if win is None else (win - 1, 0)
        out: Tensor = flash_attn_varlen_func(
            q, k, v, cu, cu, longest, longest, softmax_scale=scale, causal=True, window_size=window
        )
        return out

    return kernel


@functools.cache
def _torch_varlen_kernel() -> VarlenKernel | None:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    # The first releases spelled causality differently and had no grouped heads.
    if not {"scale", "window_size", "enable_gqa"} <= set(inspect.signature(varlen_attn).parameters):
        return None

    def kernel(
        q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout, scale: float | None, win: int | None
    ) -> Tensor:
        cu, longest = layout.cu_seqlens, layout.max_length
        window = (-1, 0) if win is None else (win - 1, 0)
        gqa = q.shape[1] != k.shape[1]
        out = varlen_attn(
            q, k, v, cu, cu, longest, longest, scale=scale, window_size=window, enable_gqa=gqa
        )
        assert isinstance(out, Tensor)  # no auxiliary output was asked for
        return out

    return kernel


AttentionInterface.register(PACKED_ATTENTION, packed_attention_forward)

_Surroundings = tuple[Callable[[], AbstractContextManager[None]], ...]


@dataclass(frozen=True)
class _Mode:
    """What is switched in a model: its configs, and layers with a forward of ours."""

    configs: tuple[Any, ...] = ()
    layers: FusedLayers = ()


_active: ContextVar[_Mode] = ContextVar("rlhf_fast_packed_mode", default=_Mode())  # noqa: B039
_surroundings: ContextVar[_Surroundings] = ContextVar("rlhf_fast_recomputed_in", default=())


@contextmanager
def _switched(mode: _Mode) -> Iterator[None]:
    token = _active.set(mode)
    try:
        with attention_mode(mode.configs, PACKED_ATTENTION), replaced_forwards(mode.layers):
            yield
    finally:
        _active.reset(token)


def packed_attention_mode(module: nn.Module) -> AbstractContextManager[None]:
    """Make every attention layer of `module` packed until the block is left, however it is left.

    The implementation is switched in each config object that a submodule holds, sub-configs
    included, and put back afterwards: generation over the same module keeps its own. Layers of
    which `fused_layers` has a faster form take it for as long.
    """
    layers = fused_layers(module, packed_attention_forward)
    return _switched(_Mode(attention_configs(module), layers))


@contextmanager
def recomputed_in(enter: Callable[[], AbstractContextManager[None]]) -> Iterator[None]:
    """Layers that run in this block and are recomputed in backward are so inside `enter()`."""
    token = _surroundings.set((*_surroundings.get(), enter))
    try:
        yield
    finally:
        _surroundings.reset(token)


def recompute_contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """`context_fn` of `torch.utils.checkpoint`: recompute under the attention of the forward.

    Backward recomputes a layer long after `packed_attention_mode` was left; without this the layer
    would run stock attention over the packed tokens and mix the segments. The same goes for
    whatever else surrounded the forward: see `recomputed_in`.
    """
    return nullcontext(), _as_in_forward(_active.get(), _surroundings.get())


@contextmanager
def _as_in_forward(mode: _Mode, surroundings: _Surroundings) -> Iterator[None]:
    with ExitStack() as stack:
        for enter in surroundings:
            stack.enter_context(enter())
        if mode.configs:
            stack.enter_context(_switched(mode))
        yield
