"""Bytes that forwards hold: saved for backward, logits of a chunk, a forward without graph.

Per packed token and layer, saved for backward. H width, I inner width, q = heads * head dim, k the
same of the key/value heads, c bytes of the compute type (4, or 2 under autocast), r rank of an
adapter. Residual stream and norms are fp32 under autocast over fp32 weights.

    gated (Llama, Mistral, Qwen2, Qwen3: RMSNorm, rotary, SwiGLU)
        norms      4 * 4H     inputs and normalised inputs of two norms, and their scales
        inputs     2 * 4H     of q|k|v and of gate|up; under autocast a cast each: 5 * 2H
        attention  (2q + 2k) c + 4 heads     q, k, v, output, log-sum-exp
        inner      4 * c I    gate, silu(gate), up, product
    gpt2 (LayerNorm, one q|k|v product, gelu_new)
        norms 2 * 4H;  inputs 2 * c H;  attention (2q + 2k) c + 4 heads;  inner 5 * c I

On a CPU in fp32 the gated families run our layer ops (`rlhf_fast.models.fused_layers`), which save
their inputs alone: norms 2 * 4H, inner 3 * c I. Where a whole layer is one op, it forms normalised
inputs and the product again: inputs 0, inner 2 * c I.

Norms of q and k (Qwen3) add their inputs and normalised inputs. With an adapter the base weights
are frozen: normalised inputs are not saved, inputs are saved by the adapted layers alone, and each
of those saves its r inner values. Segments that are padded into groups (see
`rlhf_fast.models.packed_attention`) are copied: q, k, v and output then count slots, not tokens.

With gradient checkpointing a layer saves its input alone; while one is recomputed, it holds the
above. `tests/engine/test_memory_activations.py` holds all of this against autograd.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch

from rlhf_fast.errors import ModelError
from rlhf_fast_kernels import dispatch
from rlhf_fast_kernels.linear_head import chunk_bounds

_GATED = ("llama", "mistral", "qwen2", "qwen3")
_READ_ONE_INPUT = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "c_attn", "c_fc")


@dataclass(frozen=True)
class DecoderShape:
    """Sizes of a decoder's layers.

    Args:
        gated: RMSNorm and a gated MLP, else LayerNorm and a plain one.
        known: whether the formulas above were written for this architecture; if not they are those
            of the nearest one.
        layers, width, inner, heads, kv_heads, head_dim, vocab: as in its config.
        qk_norm: whether queries and keys are normalised.
        plain: whether the layers of a gated family have no bias in their MLP.
    """

    gated: bool
    known: bool
    layers: int
    width: int
    inner: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    qk_norm: bool
    plain: bool

    @classmethod
    def of(cls, config: Any) -> DecoderShape:
        """From a transformers config.

        Raises:
            ModelError: RF3072, it has no layers of attention heads.
        """
        known = config.model_type in (*_GATED, "gpt2")
        text = config.get_text_config(decoder=True)
        gpt2 = config.model_type == "gpt2"
        sizes = ("num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size")
        lacking = [name for name in sizes if not getattr(text, name, 0)]
        if lacking:
            raise ModelError(
                "RF3072",
                f"no memory plan for this architecture: it has no {', '.join(lacking)}",
                where=f"model_type {config.model_type}",
                expected="a decoder of layers with attention heads",
                remedy="name a transformer as model",
            )
        inner = text.n_inner if gpt2 else getattr(text, "intermediate_size", None)
        heads = text.num_attention_heads
        return cls(
            gated=not gpt2,
            known=known,
            layers=text.num_hidden_layers,
            width=text.hidden_size,
            inner=inner or 4 * text.hidden_size,
            heads=heads,
            kv_heads=getattr(text, "num_key_value_heads", None) or heads,
            head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
            vocab=text.vocab_size,
            qk_norm=config.model_type == "qwen3",
            plain=not getattr(text, "mlp_bias", False),
        )


@dataclass(frozen=True)
class ForwardPlan:
    """One packed forward of a decoder.

    Args:
        shape: of the decoder.
        tokens: packed tokens, N.
        compute: bytes of the compute type, 4 or 2.
        slots: tokens after padding where attention pads segments into groups, else None.
        rank: of the adapter that is trained; 0: every weight is.
        adapted: ends of the names of a block's layers that have an adapter, repeats included.
        checkpointing: layers are recomputed in backward.
        lean: norms and SwiGLU are our layer ops, see `runs_layer_ops`.
    """

    shape: DecoderShape
    tokens: int
    compute: int
    slots: int | None = None
    rank: int = 0
    adapted: tuple[str, ...] = ()
    checkpointing: bool = False
    lean: bool = False

    @property
    def whole(self) -> bool:
        """Whether a layer is one op: no adapter and no bias in the MLP."""
        return self.lean and self.rank == 0 and self.shape.plain

    def saved(self) -> int:
        """Bytes saved for backward when the forward has ended, weights and casts of them aside."""
        return self.shape.layers * self.saved_by_layer() + self._saved_outside()

    def recomputed(self) -> int:
        """Bytes that one recomputed layer holds in backward; 0 without checkpointing."""
        return replace(self, checkpointing=False).saved_by_layer() if self.checkpointing else 0

    def saved_by_layer(self) -> int:
        """Bytes that one layer saves."""
        if self.checkpointing:
            return self.tokens * self.shape.width * self._stream
        norms, inputs, inner = self._gated_parts() if self.shape.gated else self._plain_parts()
        low_rank = self.rank * self.compute * len(self.adapted)
        return self.tokens * (norms + inputs + inner + low_rank) + self._attention()

    def without_graph(self) -> int:
        """Bytes a forward without graph holds at once: in the MLP of a layer, and the result."""
        s, c = self.shape, self.compute
        if self.whole:  # input, stream in the middle, result; beside them the MLP or attention
            heads = (s.heads + s.kv_heads) * s.head_dim * (3 if s.qk_norm else 2)
            return self.tokens * (3 * 4 * s.width + c * max(2 * s.inner, heads))
        inner = (3 if s.gated else 4) * s.inner * c
        return self.tokens * (s.width * (2 * self._stream + c + 4) + inner)

    def head(self, device: str, *, trained: bool, sides: int = 1) -> int:
        """Bytes of the fused loss: logits of one chunk, gradients of hidden states and of the head.

        Args:
            device: type of the device; it decides the size of a chunk.
            trained: whether gradients are made.
            sides: 2 if the reference's logits stand beside the actor's.
        """
        s, narrow = self.shape, device != "cpu" and self.compute == 2
        bounds = chunk_bounds(self.tokens, s.vocab, torch.device(device), None)
        rows = max((b - a for a, b in itertools.pairwise(bounds)), default=0)
        total = sides * rows * s.vocab * (4 + (2 if narrow and trained else 0))
        total += sides * s.vocab * s.width * 2 if narrow else 0
        if trained:
            total += 4 * self.tokens * s.width
            total += 4 * s.vocab * s.width if self.rank == 0 else 0
        return total

    @property
    def _stream(self) -> int:
        """Bytes of a value of the residual stream; a bf16 trunk has it in bf16."""
        return self.compute if self.rank else 4

    def _gated_parts(self) -> tuple[int, int, int]:
        s, c = self.shape, self.compute
        q, k = s.heads * s.head_dim, s.kv_heads * s.head_dim
        full = self.rank == 0
        if self.lean:
            norms = 2 * 4 * s.width + (4 * (q + k) if s.qk_norm else 0)
        else:
            norms = (4 if full else 2) * 4 * s.width + 8
            if s.qk_norm:
                norms += (q + k) * (4 + (c if full else 0)) + 4 * (s.heads + s.kv_heads)
        if self.whole:
            return norms, 0, 2 * s.inner * c
        read = set(_READ_ONE_INPUT) if full else set(self.adapted)
        of_attention = len(read & {"q_proj", "k_proj", "v_proj"})
        of_mlp = len(read & {"gate_proj", "up_proj"})
        if c == 4:  # one tensor, which all layers that read it save
            inputs = 4 * s.width * (min(of_attention, 1) + min(of_mlp, 1))
        else:
            inputs = 2 * s.width * (of_attention + of_mlp)
            inputs += 2 * q if "o_proj" in self.adapted else 0  # cast to fp32 and back
        inner = s.inner * c * (4 if full or "down_proj" in self.adapted else 3)
        return norms, inputs, inner - (s.inner * c if self.lean else 0)

    def _plain_parts(self) -> tuple[int, int, int]:
        s, c = self.shape, self.compute
        full = self.rank == 0
        stream = self._stream
        norms = 2 * stream * s.width + 4 * stream
        read = {"c_attn", "c_fc"} & (set(_READ_ONE_INPUT) if full else set(self.adapted))
        inputs = c * s.width * len(read)
        if c == 2 and "c_proj" in self.adapted:
            inputs += 2 * s.heads * s.head_dim
        return norms, inputs, 5 * s.inner * c

    def _attention(self) -> int:
        s, c = self.shape, self.compute
        q, k = s.heads * s.head_dim, s.kv_heads * s.head_dim
        slots = self.tokens if self.slots is None else self.slots
        total = slots * ((2 * q + 2 * k) * c + 4 * s.heads)
        # What the output projection reads is a copy then; counted with its casts under autocast.
        read = {"o_proj", "c_proj"} & set(self.adapted) if c == 4 else set()
        if self.slots is not None and (self.rank == 0 or read):
            total += self.tokens * q * c
        return total

    def _saved_outside(self) -> int:
        """The final norm, rotary tables, ids."""
        s, full = self.shape, self.rank == 0
        if not s.gated:
            last = self._stream * (s.width + 2) + (16 if full else 0)
            return self.tokens * last if full or self.checkpointing else 0
        norm = 4 * s.width if self.lean else (8 if full else 4) * s.width + 4
        # A frozen embedding needs no gradient, so the first layer's norm saves as much less.
        last = norm + (8 if full else 0) if full or self.checkpointing else 0
        tables = 0 if self.checkpointing else 2 * s.head_dim * (4 if full else self.compute)
        return self.tokens * (last + tables)


def runs_layer_ops(shape: DecoderShape, compute: int, device: str) -> bool:
    """Whether a packed forward runs `rlhf_fast.models.fused_layers` there.

    Args:
        shape: of the decoder.
        compute: bytes of the compute type.
        device: type of the device.
    """
    if device != "cpu" or compute != 4 or not (shape.gated and shape.known):
        return False
    return dispatch.choose("swiglu", None, torch.empty(0)).impl != "reference"


def adapted_names(layers: Iterable[str], blocks: int) -> tuple[str, ...]:
    """Ends of the names of one block's adapted layers, from the full names of those of all."""
    ends = [name.rsplit(".", 1)[-1] for name in layers]
    return tuple(end for end in dict.fromkeys(ends) for _ in range(round(ends.count(end) / blocks)))
